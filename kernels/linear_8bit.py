"""Linear, W8A8: 8-bit tokens times an 8-bit weight, with bias and low-rank term, to a float dtype.

    y[m, n] = (sum_k x[m, k] * w[n, k]) * x_scale[m, g] * w_scale[n] + bias[n] + sum_r t[m, r] * up[n, r]

Grid       (tiles of y,), 8 rows of tiles together so that their weights stay in the L2 cache.
Tile       BLOCK_M x BLOCK_N of y in registers, BLOCK_K channels per step; see _tiles_8bit.py.
Numerics   int8: exact sums in int32; e4m3: fp16 sums of 128 in fp32, or fp32. Then fp32, rounded once, on the store.
Traffic    x once per 8 rows of tiles and w once from memory, y written; bound by the tensor cores at Wan's sizes.
Reference  linear_8bit_reference, below.
Source     ModelTC/LightX2V, lightx2v/common/ops/mm (a scale per token and per output channel).
"""

from itertools import pairwise

import torch
from torch import Tensor

from ._checks import COMPUTE_DTYPES, require
from ._launch import on_device_of, runs_triton, tl, triton
from ._matmul_8bit import (
    LowRank,
    check_operands,
    finish_tile,
    launch_arguments,
    matmul_reference,
    sum_products,
    tile_at,
)
from ._quantized import Quantized, QuantizedWeight


def linear_8bit_reference(
    x: Quantized,
    weight: QuantizedWeight,
    bias: Tensor | None,
    *,
    low_rank: LowRank | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    y = matmul_reference(x, weight, bias, low_rank)
    return y.to(out_dtype) if out is None else out.copy_(y)


@triton.jit(do_not_specialize=["M", "R"])
def _linear_8bit_kernel(
    x_ptr,  # [M, K] int8 or e4m3, contiguous
    x_scale_ptr,  # [M, G] fp32, contiguous; G is 1 or K / 128
    w_ptr,  # [N, K], x's dtype, contiguous
    w_scale_ptr,  # [N] fp32
    bias_ptr,  # [N], or None
    t_ptr,  # [M, R], contiguous, or None
    up_ptr,  # [N, R], contiguous, or None
    y_ptr,  # [M, N], columns adjacent
    M,
    N: tl.constexpr,
    K: tl.constexpr,  # a multiple of 128
    R,
    y_stride_m,
    GROUPED: tl.constexpr,  # G is K / 128
    FP16_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_N // 2 if SPLIT else BLOCK_N
    tile_m, tile_n = tile_at(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    row = tile_m.to(tl.int64) * BLOCK_M
    column = tile_n.to(tl.int64) * BLOCK_N
    last_row = (M - 1 - row).to(tl.int32)
    if t_ptr is not None:
        t_ptr += row * R
    scales = (K // 128) if GROUPED else 1
    low, high = sum_products(
        x_ptr + row * K,
        x_scale_ptr + row * scales,
        w_ptr + column * K,
        last_row,
        (N - 1 - column).to(tl.int32),
        N % BLOCK_N == 0,
        K,
        GROUPED,
        FP16_SUMS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SPLIT,
    )
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tile_n * BLOCK_N + tl.arange(0, HALF)
    y_at = y_ptr + row * y_stride_m + column + (m * y_stride_m + tl.arange(0, HALF)[None, :])
    low, high = finish_tile(low, high, w_scale_ptr, bias_ptr, t_ptr, up_ptr, last_row, n, N, R, BLOCK_M, SPLIT)
    tl.store(y_at, low, mask=(m <= last_row) & (n < N)[None, :])
    if SPLIT:
        n += HALF
        tl.store(y_at + HALF, high, mask=(m <= last_row) & (n < N)[None, :])


def linear_8bit_triton(
    x: Quantized,
    weight: QuantizedWeight,
    bias: Tensor | None,
    *,
    low_rank: LowRank | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Launch the kernel on checked arguments."""
    outputs = weight.shape[0]
    if out is None:
        out = torch.empty(*x.shape[:-1], outputs, dtype=out_dtype, device=x.device)
    rows = out.view(-1, outputs)
    tile, arguments = launch_arguments(x, weight, bias, low_rank, "bias")
    if len(rows) > 0:
        grid = (-(-len(rows) // tile.rows) * -(-outputs // tile.columns),)
        with on_device_of(x.values):
            _linear_8bit_kernel[grid](y_ptr=rows, M=len(rows), y_stride_m=rows.stride(0), **arguments)
    return out


def linear_8bit(
    x: Quantized,
    weight: QuantizedWeight,
    bias: Tensor | None,
    *,
    low_rank: LowRank | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply 8-bit tokens by an 8-bit weight's transpose, and add the bias.

    Args:
        x: [..., K] in 8 bits; on a GPU K is a multiple of 128.
        weight: [N, K], of x's dtype and device, rotated if and only if x is.
        bias: [N], contiguous; float32, bfloat16 or float16; or None.
        low_rank: (t, up), a term t @ up^T on the same pass: t [..., R] = x @ down^T, and up [N, R] with the term's
            scale in it; both bfloat16 or both float16, contiguous. R of several terms is their sum.
        out_dtype: of a new result: float32, bfloat16 or float16.
        out: [..., N] to write to instead, of one of those dtypes, columns adjacent and rows evenly spaced: a run of
            tokens or of columns of a larger tensor.

    Returns:
        [..., N], `out` where it was given; rounded once from fp32.

    Raises:
        ValueError: a shape, dtype, stride, device or rotation is not as above.
    """
    check_operands(x, weight, bias, low_rank)
    require(out_dtype in COMPUTE_DTYPES, "out_dtype: must be float32, bfloat16 or float16", out_dtype)
    check_out(out, (*x.shape[:-1], weight.shape[0]), x.device)
    run = linear_8bit_triton if runs_triton(x.values) else linear_8bit_reference
    return run(x, weight, bias, low_rank=low_rank, out_dtype=out_dtype, out=out)


def check_out(out: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse memory that a result [..., N] cannot be written to row by row; None is none.

    Raises:
        ValueError: a shape, dtype, stride or device is another.
    """
    if out is None:
        return
    require(tuple(out.shape) == shape, f"out: must be {shape}", tuple(out.shape))
    require(out.dtype in COMPUTE_DTYPES, "out: must be float32, bfloat16 or float16", out.dtype)
    require(out.device == device, f"out: must be on {device}, like x", out.device)
    rule = "out: must have adjacent columns and evenly spaced rows"
    require(_has_even_rows(out), rule, f"strides {out.stride()} for shape {shape}")


def _has_even_rows(tensor: Tensor) -> bool:
    """Whether [..., N] is one run of rows of adjacent numbers, however far apart."""
    sizes, strides = tensor.shape[:-1], tensor.stride()
    steps = [(size, stride) for size, stride in zip(sizes, strides, strict=False) if size > 1]
    even = all(outer == size * inner for (_, outer), (size, inner) in pairwise(steps))
    return even and (tensor.shape[-1] == 1 or strides[-1] == 1)
