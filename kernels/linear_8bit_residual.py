"""Linear, W8A8, whose result is gated and added to the residual stream where it lies.

    y[m, n] = (sum_k x[m, k] * w[n, k]) * x_scale[m, g] * w_scale[n] + bias[n] + sum_r t[m, r] * up[n, r]
    residual[b, t, n] += gate[b, r, n] * y[b, t, n],    r = 0 for t < first_tokens, else the last row; no gate: 1

Grid       (B * tiles of one sample,), 8 rows of tiles together so that their weights stay in the L2 cache.
Tile       BLOCK_M x BLOCK_N of one sample in registers; see _tiles_8bit.py.
Numerics   as linear_8bit.py up to y, which stays in fp32; the residual is fp32.
Traffic    as linear_8bit.py, with the residual read and written; the gate's rows stay in cache.
Reference  linear_8bit_residual_reference, below.
Source     Wan-Video/Wan2.2, wan/modules/model.py, WanAttentionBlock.forward.
"""

import torch
from torch import Tensor

from ._checks import check_modulation, require
from ._launch import on_device_of, runs_triton, tl, triton
from ._matmul_8bit import (
    LowRank,
    check_operands,
    finish_half,
    finish_tile,
    launch_arguments,
    matmul_reference,
    sum_products,
    tile_at,
)
from ._quantized import Quantized, QuantizedWeight
from ._rows import row_strides, split_tokens


def linear_8bit_residual_reference(
    x: Quantized,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
    *,
    first_tokens: int = 0,
    low_rank: LowRank | None = None,
) -> Tensor:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    y = matmul_reference(x, weight, bias, low_rank)
    if gate is None:
        return residual.add_(y)
    runs = (split_tokens(tensor, gate.shape[1], first_tokens) for tensor in (residual, y))
    for r, (residual_run, y_run) in enumerate(zip(*runs, strict=True)):
        residual_run.addcmul_(y_run, gate[:, r : r + 1].float())
    return residual


@triton.jit
def _add_half(
    residual_at,  # [BLOCK_M, HALF] pointers
    y,  # [BLOCK_M, HALF] fp32
    gate_ptr,  # at the sample's row 0, or None
    gate_stride_r,
    is_first,  # [BLOCK_M, 1]: tokens that take row 0
    n,  # [1, HALF]
    live,  # [BLOCK_M, HALF]
    N,
):
    if gate_ptr is not None:
        first = tl.load(gate_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        last = tl.load(gate_ptr + gate_stride_r + n, mask=n < N, other=0.0).to(tl.float32)
        y *= tl.where(is_first, first, last)
    tl.store(residual_at, tl.load(residual_at, mask=live, other=0.0) + y, mask=live)


@triton.jit(do_not_specialize=["T", "R", "first_tokens"])
def _linear_8bit_residual_kernel(
    x_ptr,  # [B, T, K] int8 or e4m3, contiguous
    x_scale_ptr,  # [B, T, G] fp32, contiguous; G is 1 or K / 128
    w_ptr,  # [N, K], x's dtype, contiguous
    w_scale_ptr,  # [N] fp32
    bias_ptr,  # [N], or None
    t_ptr,  # [B, T, R], contiguous, or None
    up_ptr,  # [N, R], contiguous, or None
    residual_ptr,  # [B, T, N] fp32, contiguous; a program reads its own tile before it stores it
    gate_ptr,  # [B, 1 or 2, N], channels adjacent, or None
    T,
    N: tl.constexpr,
    K: tl.constexpr,  # a multiple of 128
    R,
    first_tokens,  # tokens that take gate row 0
    gate_stride_b,
    gate_stride_r,  # from row 0 to the last row; 0 where there is one
    GROUPED: tl.constexpr,  # G is K / 128
    FP16_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_N // 2 if SPLIT else BLOCK_N
    b = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = tile_at(tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    first_row = tile_m * BLOCK_M  # in its sample
    row = b * T + first_row
    column = tile_n.to(tl.int64) * BLOCK_N
    last_row = T - 1 - first_row
    if t_ptr is not None:
        t_ptr += row * R
    low, high = sum_products(
        x_ptr + row * K,
        x_scale_ptr + row * ((K // 128) if GROUPED else 1),
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
    at = residual_ptr + row * N + column + (m * N + tl.arange(0, HALF)[None, :])
    is_first = first_row + m < first_tokens
    live = m <= last_row
    if gate_ptr is not None:
        gate_ptr += b * gate_stride_b
    if t_ptr is not None:
        low, high = finish_tile(low, high, w_scale_ptr, bias_ptr, t_ptr, up_ptr, last_row, n, N, R, BLOCK_M, SPLIT)
    else:  # one half after the other, which takes fewer registers
        low = finish_half(low, w_scale_ptr, bias_ptr, n, N)
    _add_half(at, low, gate_ptr, gate_stride_r, is_first, n[None, :], live & (n < N)[None, :], N)
    if SPLIT:
        n += HALF
        if t_ptr is None:
            high = finish_half(high, w_scale_ptr, bias_ptr, n, N)
        _add_half(at + HALF, high, gate_ptr, gate_stride_r, is_first, n[None, :], live & (n < N)[None, :], N)


def linear_8bit_residual_triton(
    x: Quantized,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
    *,
    first_tokens: int = 0,
    low_rank: LowRank | None = None,
) -> Tensor:
    """Launch the kernel on checked arguments."""
    batch, tokens, outputs = residual.shape
    tile, arguments = launch_arguments(x, weight, bias, low_rank, "residual")
    gate_stride_b, gate_stride_r = (0, 0) if gate is None else row_strides(gate)
    grid = (-(-tokens // tile.rows) * -(-outputs // tile.columns), batch)
    if residual.numel() > 0:
        with on_device_of(x.values):
            _linear_8bit_residual_kernel[grid](
                residual_ptr=residual,
                gate_ptr=gate,
                T=tokens,
                first_tokens=first_tokens,
                gate_stride_b=gate_stride_b,
                gate_stride_r=gate_stride_r,
                **arguments,
            )
    return residual


def linear_8bit_residual(
    x: Quantized,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
    *,
    first_tokens: int = 0,
    low_rank: LowRank | None = None,
) -> Tensor:
    """Multiply 8-bit tokens by an 8-bit weight's transpose, add the bias, and add the gated result to a stream.

    Args:
        x: [B, T, K] in 8 bits; on a GPU K is a multiple of 128.
        weight: [N, K], of x's dtype and device, rotated if and only if x is.
        bias: [N], contiguous; float32, bfloat16 or float16; or None.
        residual: [B, T, N] fp32, contiguous, on x's device; it is written to.
        gate: [B, R, N], channels adjacent; float32, bfloat16 or float16, on x's device; R is 1 (one timestep per
            sample) or 2 (the first tokens have a timestep of their own). None: the result is added as it is.
        first_tokens: tokens [0, first_tokens) take row 0, the others the last row; of no effect where R is 1.
        low_rank: (t, up), a term t @ up^T on the same pass: t [..., R] = x @ down^T, and up [N, R] with the term's
            scale in it; both bfloat16 or both float16, contiguous. R of several terms is their sum.

    Returns:
        residual.

    Raises:
        ValueError: a shape, dtype, stride, device, count or rotation is not as above.
    """
    check_operands(x, weight, bias, low_rank)
    require(len(x.shape) == 3, "x: must be [B, T, K]", tuple(x.shape))
    shape = (*x.shape[:2], weight.shape[0])
    require(tuple(residual.shape) == shape, f"residual: must be {shape}", tuple(residual.shape))
    require(residual.dtype == torch.float32, "residual: must be float32", residual.dtype)
    require(residual.is_contiguous(), "residual: must be contiguous", f"strides {residual.stride()}")
    require(residual.device == x.device, f"residual: must be on {x.device}, like x", residual.device)
    if gate is not None:
        check_modulation(residual, gate, "gate", first_tokens)
    run = linear_8bit_residual_triton if runs_triton(x.values) else linear_8bit_residual_reference
    return run(x, weight, bias, residual, gate, first_tokens=first_tokens, low_rank=low_rank)
