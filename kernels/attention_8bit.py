"""8-bit attention from 16-bit tensors: the four kernels that prepare its operands and run it, in one call.

    out = softmax(softmax_scale * q k^T) v, with q and k in int8, weights and v in e4m3 or fp16

The operands are what quantize_queries.py, quantize_keys.py and quantize_values.py make, the attention is
attention_int8.py's. Without a GPU each runs its reference, which rounds as its kernel does.
"""

import torch
from torch import Tensor

from ._checks import require
from .attention_int8 import attention_int8
from .block_mask import BlockLists
from .quantize_keys import quantize_keys
from .quantize_queries import quantize_queries
from .quantize_values import quantize_values

VARIANTS = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16}


def attention_8bit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    variant: str = "fp8",
    lists: BlockLists | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend in 8 bits, from tensors that are not quantised yet.

    Args:
        q: [B, T, N, D], channels adjacent; float32, bfloat16 or float16; D 64 or 128.
        k: [B, S, N, D], like q.
        v: [B, S, N, D], like q.
        softmax_scale: factor of q . k under the softmax; 1 / sqrt(D) where None.
        variant: what softmax weights and v are rounded to: "fp8" (e4m3) or "fp16", slower and nearer.
        lists: which key blocks each block of queries attends to; all where None.
        out: [B, T, N, D], contiguous, to write to; made in q's dtype where None.

    Returns:
        [B, T, N, D]. q, k and v are not written to.

    Raises:
        ValueError: a shape, dtype, stride, device or name is not as above.
    """
    require(variant in VARIANTS, f"variant: must be one of {', '.join(VARIANTS)}", variant)
    return attention_int8(
        quantize_queries(q, softmax_scale=softmax_scale),
        quantize_keys(k),
        quantize_values(v, dtype=VARIANTS[variant]),
        out=out,
        out_dtype=q.dtype,
        lists=lists,
    )
