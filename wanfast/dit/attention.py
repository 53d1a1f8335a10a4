"""Softmax attention over heads: the one place the DiT calls it."""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let every query attend to every key: softmax(q k^T / sqrt(D)) v, without a mask.

    Args:
        q: [B, T, N, D]; any float dtype.
        k: [B, S, N, D], q's dtype.
        v: [B, S, N, D], q's dtype.

    Returns:
        [B, T, N * D], heads side by side, in q's dtype.
    """
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)
