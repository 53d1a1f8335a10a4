"""Softmax attention over heads: the one place the DiT calls it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, last_count: int = 1) -> Tensor:
    """Let every query attend to every key: softmax(q k^T / sqrt(D)) v, without a mask.

    Args:
        q: [B, T, N, D]; any float dtype.
        k: [B, S, N, D], q's dtype.
        v: [B, S, N, D], q's dtype.
        last_count: how many times the last key stands there: n equal keys weigh as much as one whose logit has log(n)
            more.

    Returns:
        [B, T, N * D], heads side by side, in q's dtype.
    """
    bias = None
    if last_count > 1:
        bias = torch.zeros(1, 1, 1, k.shape[1], dtype=q.dtype, device=q.device)
        bias[..., -1] = math.log(last_count)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
    return out.transpose(1, 2).flatten(2)
