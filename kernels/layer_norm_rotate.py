"""Layer norm with weights, rotated and in 8 bits; with the residual before it if there is one.

    as in layer_norm_quantize.py, but that each run of 128 channels of `out` is multiplied by the orthonormal Hadamard
    matrix before it is rounded

Grid       (tokens,), one program per token.
Tile       a token in registers as halves [RUNS, 64] of its runs of 128 channels, RUNS a power of two; C <= 8192.
Numerics   as in layer_norm_quantize.py; the rotation rounds `out` to bf16 first.
Traffic    as in layer_norm_quantize.py.
Reference  layer_norm_quantize_reference, with rotated=True.
Source     Wan-Video/Wan2.2, wan/modules/model.py, WanAttentionBlock.forward; the rotation: QuaRot, arXiv 2404.00456.
"""

import torch

from ._launch import on_device_of, tl, triton
from ._quantized import GROUP, Quantized, hadamard, rotate_halves, round_8bit, scale_of
from ._row_norm import RowNorm, added, weighted

MIN_RUNS = 16  # a product of matrices has at least so many rows

# (runs of 128 channels at most, warps)
RUN_WARPS = ((32, 4), (64, 8))


def rotated_tile(channels: int) -> dict[str, int]:
    """Launch parameters for tokens of so many channels, a multiple of 128."""
    runs = max(MIN_RUNS, 1 << (channels // GROUP - 1).bit_length())
    return {"RUNS": runs, "num_warps": next(warps for most, warps in RUN_WARPS if runs <= most)}


@triton.jit(do_not_specialize=["T", "first_tokens"])
def _layer_norm_rotate_kernel(
    x_ptr,  # [B, T, C], contiguous
    y_ptr,  # [B, T, C], contiguous
    gate_ptr,  # [B, R, C], channels adjacent; R is 1 or 2
    scale_ptr,  # [B, R, C], channels adjacent; R is 1 or 2
    shift_ptr,  # [B, R, C], channels adjacent
    values_ptr,  # [B, T, C] int8 or e4m3, contiguous
    values_scale_ptr,  # [B, T] fp32, contiguous
    T,
    first_tokens,  # tokens that take row 0
    gate_stride_b,
    gate_stride_r,  # from row 0 to the last row; 0 where R is 1
    scale_stride_b,
    scale_stride_r,
    shift_stride_b,
    shift_stride_r,
    eps,
    ADDED: tl.constexpr,  # NOTHING, UNGATED or GATED
    OFFSET: tl.constexpr,  # what the scale is added to
    C: tl.constexpr,  # a multiple of 128
    RUNS: tl.constexpr,  # power of two, at least 16 and C / 128
):
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)  # b * T + t
    b, t = token // T, token % T
    r = tl.where(t < first_tokens, 0, 1)
    row = token * C
    gate_row = gate_ptr + b * gate_stride_b + r * gate_stride_r
    run = tl.arange(0, RUNS)[:, None]
    live = run < C // 128
    low = run * 128 + tl.arange(0, 64)[None, :]
    high = low + 64

    x_low = added(x_ptr + row, y_ptr + row, gate_row, low, live, ADDED)
    x_high = added(x_ptr + row, y_ptr + row, gate_row, high, live, ADDED)
    mean = tl.sum(tl.sum(x_low + x_high, 1), 0) / C
    x_low = tl.where(live, x_low - mean, 0.0)  # dead lanes must not reach the variance
    x_high = tl.where(live, x_high - mean, 0.0)
    variance = tl.sum(tl.sum(x_low * x_low + x_high * x_high, 1), 0) / C
    rstd = tl.rsqrt(variance + eps)

    scale_row = scale_ptr + b * scale_stride_b + r * scale_stride_r
    shift_row = shift_ptr + b * shift_stride_b + r * shift_stride_r
    out_low = weighted(x_low * rstd, scale_row, shift_row, low, live, OFFSET)  # dead lanes stay 0
    out_high = weighted(x_high * rstd, scale_row, shift_row, high, live, OFFSET)

    out_low, out_high = rotate_halves(out_low, out_high, hadamard(64))
    absmax = tl.max(tl.max(tl.maximum(tl.abs(out_low), tl.abs(out_high)), 1), 0)
    values_scale, inverse = scale_of(absmax, dtype)
    tl.store(values_ptr + row + low, round_8bit(out_low * inverse, dtype), mask=live)
    tl.store(values_ptr + row + high, round_8bit(out_high * inverse, dtype), mask=live)
    tl.store(values_scale_ptr + token, values_scale)  # in bounds: one scale per program


def layer_norm_rotate_triton(norm: RowNorm, dtype: torch.dtype) -> Quantized:
    """Launch the kernel on checked arguments."""
    x = norm.x
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _layer_norm_rotate_kernel[(norm.tokens,)](
            *norm.tensors(), values, scale, *norm.counts(), **norm.constants(), **rotated_tile(x.shape[-1])
        )
    return Quantized(values, scale, rotated=True)
