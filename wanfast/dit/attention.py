"""Softmax attention over heads: the one place the DiT calls it."""

from torch import Tensor

from wanfast import kernels
from wanfast.kernels import BlockLists


def attention(q: Tensor, k: Tensor, v: Tensor, *, last_count: int = 1, lists: BlockLists | None = None) -> Tensor:
    """Let every query attend to every key, or to those of the listed blocks: softmax(q k^T / sqrt(D)) v.

    Args:
        q: [B, T, N, D]; any float dtype.
        k: [B, S, N, D], q's dtype.
        v: [B, S, N, D], q's dtype.
        last_count: how many times the last key stands there: n equal keys weigh as much as one whose logit has log(n)
            more.
        lists: of q's blocks, from `kernels.block_mask`; the last key then counts once.

    Returns:
        [B, T, N * D], heads side by side, in q's dtype.
    """
    if lists is not None:
        return kernels.attention_sparse(q, k, v, lists).flatten(2)
    return kernels.attention(q, k, v, last_count=last_count).flatten(2)
