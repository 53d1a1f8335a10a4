"""Queries for 8-bit attention: int8 with a scale per token and head, which carries the softmax's own factor.

    absmax[b, t, n] = max_d |q[b, t, n, d]|
    values[b, t, n, d] = round(q[b, t, n, d] * 127 / absmax)
    scale[b, t, n] = absmax / 127 * softmax_scale * log2(e)

so that values . keys, times both scales, is an exponent of 2 where softmax has exponents of e.

Grid       (ceil(T * N / ROWS), B), one program per ROWS rows (t, n) of a sample.
Tile       ROWS x D in registers.
Numerics   fp32, rounded half to even, never -128; a row of zeros stays zero. See _quantized.py.
Traffic    B*T*N*D elements of q read, as many bytes written, and a scale for every D; bandwidth-bound.
Reference  quantize_queries_reference, below.
Source     SageAttention (Zhang et al., 2024), with a scale per row in place of one per block.
"""

from dataclasses import dataclass
from math import e, log2

import torch
from torch import Tensor

from ._heads import check_heads
from ._launch import on_device_of, runs_triton, tl, triton
from ._quantized import quantize_reference, round_8bit, scale_of

ROWS = 64


@dataclass(frozen=True, slots=True)
class QuantizedQueries:
    """Queries in 8 bits: softmax_scale * log2(e) * q ~ values * scale."""

    values: Tensor  # [B, T, N, D], int8, contiguous
    scale: Tensor  # [B, T, N], fp32, contiguous


def quantize_queries_reference(q: Tensor, *, softmax_scale: float) -> QuantizedQueries:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    quantized = quantize_reference(q, torch.int8)
    return QuantizedQueries(quantized.values, quantized.scale[..., 0] * (softmax_scale * log2(e)))


@triton.jit(do_not_specialize=["rows"])
def _quantize_queries_kernel(
    q_ptr,  # [B, T, N, D], channels adjacent
    values_ptr,  # [B, T, N, D], contiguous
    scale_ptr,  # [B, T, N], contiguous
    rows,  # T * N
    N,
    q_stride_b,
    q_stride_t,
    q_stride_n,
    factor,  # softmax_scale * log2(e)
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # t * N + n
    d = tl.arange(0, D)
    live = row < rows

    start = b * q_stride_b + row // N * q_stride_t + row % N * q_stride_n
    q = tl.load(q_ptr + start[:, None] + d[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.abs(q), 1), tl.int8)
    values = round_8bit(q * inverse[:, None], tl.int8)
    tl.store(values_ptr + (b * rows + row)[:, None] * D + d[None, :], values, mask=live[:, None])
    tl.store(scale_ptr + b * rows + row, scale * factor, mask=live)


def quantize_queries_triton(q: Tensor, *, softmax_scale: float) -> QuantizedQueries:
    """Launch the kernel on checked arguments."""
    batch, tokens, heads, dim = q.shape
    values = torch.empty(q.shape, dtype=torch.int8, device=q.device)
    scale = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    rows = tokens * heads
    with on_device_of(q):
        _quantize_queries_kernel[(triton.cdiv(rows, ROWS), batch)](
            q, values, scale, rows, heads, *q.stride()[:3], softmax_scale * log2(e), D=dim, ROWS=ROWS, num_warps=4
        )
    return QuantizedQueries(values, scale)


def quantize_queries(q: Tensor, *, softmax_scale: float | None = None) -> QuantizedQueries:
    """Round queries to int8, each row by its own scale.

    Args:
        q: [B, T, N, D], channels adjacent; float32, bfloat16 or float16; D 64 or 128.
        softmax_scale: factor of q . k under the softmax; 1 / sqrt(D) where None.

    Returns:
        The rounded queries. q is not written to.

    Raises:
        ValueError: a shape, dtype or stride is not as above.
    """
    check_heads(q, "q")
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    run = quantize_queries_triton if runs_triton(q) else quantize_queries_reference
    return run(q, softmax_scale=softmax_scale)
