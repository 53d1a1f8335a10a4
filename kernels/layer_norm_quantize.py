"""Layer norm with weights, into the 8 bits that the next linear reads; with the residual before it if there is one.

    x      = x + gate[b, r, :] * y, or x + y, written over x; or x as it is
    out    = n * (1 + scale[b, r, :]) + shift[b, r, :]      with the scale and shift of a timestep, or
    out    = n * weight + bias                              learned ones
    result = out in 8 bits, one scale per token (_quantized.py)
    n      = (x - mean) * rsqrt(var + eps);  r = 0 for t < first_tokens, else the last row

Grid       (tokens,), one program per token.
Tile       a token in registers, in two power-of-two parts (see _tiles.py); C <= 8192.
Numerics   in fp32, two-pass variance; a new x is rounded to its own dtype before it is normalised, as if it had been
           read back, and the result once, to 8 bits.
Traffic    B*T*C elements of x read, B*T*C bytes and 4 per token written; with a residual, y read and x written too. The
           rows of weights stay in cache. Bandwidth-bound.
Reference  layer_norm_quantize_reference, below.
Source     Wan-Video/Wan2.2, wan/modules/model.py, WanAttentionBlock.forward.
"""

import torch
from torch import Tensor

from ._checks import require
from ._launch import on_device_of, runs_triton, tl, triton
from ._quantized import EIGHT_BIT, GROUP, Quantized, quantize_reference, round_8bit, scale_of
from ._row_norm import RowNorm, added, row_norm_reference, weighted
from ._tiles import row_tile
from .layer_norm_rotate import layer_norm_rotate_triton


def layer_norm_quantize_reference(norm: RowNorm, dtype: torch.dtype, *, rotated: bool = False) -> Quantized:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    return quantize_reference(row_norm_reference(norm), dtype, rotated=rotated)


@triton.jit(do_not_specialize=["T", "first_tokens"])
def _layer_norm_quantize_kernel(
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
    C: tl.constexpr,
    HEAD: tl.constexpr,  # power of two, at most C
    TAIL: tl.constexpr,  # power of two, HEAD + TAIL at least C
):
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)  # b * T + t
    b, t = token // T, token % T
    r = tl.where(t < first_tokens, 0, 1)
    row = token * C
    gate_row = gate_ptr + b * gate_stride_b + r * gate_stride_r
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    live = tail < C

    x_head = added(x_ptr + row, y_ptr + row, gate_row, head, head < C, ADDED)
    x_tail = added(x_ptr + row, y_ptr + row, gate_row, tail, live, ADDED)
    mean = (tl.sum(x_head, 0) + tl.sum(x_tail, 0)) / C
    x_head -= mean
    x_tail = tl.where(live, x_tail - mean, 0.0)  # dead lanes must not reach the variance
    variance = (tl.sum(x_head * x_head, 0) + tl.sum(x_tail * x_tail, 0)) / C
    rstd = tl.rsqrt(variance + eps)

    scale_row = scale_ptr + b * scale_stride_b + r * scale_stride_r
    shift_row = shift_ptr + b * shift_stride_b + r * shift_stride_r
    out_head = weighted(x_head * rstd, scale_row, shift_row, head, head < C, OFFSET)
    out_tail = weighted(x_tail * rstd, scale_row, shift_row, tail, live, OFFSET)  # dead lanes stay 0

    absmax = tl.maximum(tl.max(tl.abs(out_head), 0), tl.max(tl.abs(out_tail), 0))
    values_scale, inverse = scale_of(absmax, dtype)
    tl.store(values_ptr + row + head, round_8bit(out_head * inverse, dtype))  # in bounds: HEAD <= C
    tl.store(values_ptr + row + tail, round_8bit(out_tail * inverse, dtype), mask=live)
    tl.store(values_scale_ptr + token, values_scale)  # in bounds: one scale per program


def layer_norm_quantize_triton(norm: RowNorm, dtype: torch.dtype) -> Quantized:
    """Launch the kernel on checked arguments."""
    x = norm.x
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    tile = row_tile(x.shape[-1])
    with on_device_of(x):
        _layer_norm_quantize_kernel[(norm.tokens,)](
            *norm.tensors(),
            values,
            scale,
            *norm.counts(),
            **norm.constants(),
            HEAD=tile.head,
            TAIL=tile.tail,
            num_warps=tile.num_warps,
        )
    return Quantized(values, scale, rotated=False)


def normalise_to_8bit(norm: RowNorm, dtype: torch.dtype, *, rotated: bool) -> Quantized:
    """Check arguments and run the kernel they are for, or its reference.

    Raises:
        ValueError: they do not fit together, dtype is not int8 or e4m3, or C is no multiple of 128 where it must be.
    """
    norm.check()
    channels = norm.x.shape[-1]
    require(dtype in EIGHT_BIT, "dtype: must be int8 or float8_e4m3fn", dtype)
    whole = channels % GROUP == 0
    require(whole or not rotated, f"x: rotated channels must be a multiple of {GROUP}", channels)
    if not runs_triton(norm.x):
        return layer_norm_quantize_reference(norm, dtype, rotated=rotated)
    return layer_norm_rotate_triton(norm, dtype) if rotated else layer_norm_quantize_triton(norm, dtype)


def layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, *, eps: float, rotated: bool = False
) -> Quantized:
    """Normalise each token over its channels, apply the weight and bias, and round to 8 bits.

    Args:
        x: [..., C], finite, contiguous; float32, bfloat16 or float16; C <= 8192.
        weight: [C], contiguous, any of those dtypes, on x's device.
        bias: like weight.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.
        eps: added to the variance, in units of x squared.
        rotated: multiply each 128 channels by the orthonormal Hadamard matrix before rounding.

    Returns:
        [..., C] in 8 bits, one scale per token. x is not written to.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.
    """
    return normalise_to_8bit(RowNorm(x=x, scale=weight, shift=bias, eps=eps), dtype, rotated=rotated)


def layer_norm_modulate_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype,
    *,
    eps: float,
    first_tokens: int = 0,
    rotated: bool = False,
) -> Quantized:
    """Normalise each token over its channels, scale and shift it by its row of modulation, and round to 8 bits.

    Args:
        x: [B, T, C], finite, contiguous; float32, bfloat16 or float16; C <= 8192.
        scale: [B, R, C], channels adjacent, any of those dtypes, on x's device. R is 1 (one timestep per sample) or 2
            (the first tokens have a timestep of their own). Slices and expanded batches are fine.
        shift: like scale.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.
        eps: added to the variance, in units of x squared.
        first_tokens: tokens [0, first_tokens) take row 0, the others the last row; of no effect where R is 1.
        rotated: multiply each 128 channels by the orthonormal Hadamard matrix before rounding.

    Returns:
        [B, T, C] in 8 bits, one scale per token. x is not written to.

    Raises:
        ValueError: a shape, dtype, stride, device or first_tokens is not as above.
    """
    norm = RowNorm(x=x, scale=scale, shift=shift, eps=eps, first_tokens=first_tokens)
    return normalise_to_8bit(norm, dtype, rotated=rotated)
