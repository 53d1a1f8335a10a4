"""Softmax attention over heads: the one place the DiT calls it."""

from torch import Tensor

from wanfast import kernels


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
    return kernels.attention(q, k, v, last_count=last_count).flatten(2)
