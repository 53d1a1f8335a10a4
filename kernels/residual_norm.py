"""Residual and layer norm in one pass: the stream takes what was computed, and goes on normalised and weighted.

    x   = x + gate[b, r, :] * y            or x + y; written over x
    out = n * (1 + scale[b, r, :]) + shift[b, r, :]      with the scale and shift of a timestep, or
    out = n * weight + bias                              learned ones
    n   = (x - mean) * rsqrt(var + eps);  r = 0 for t < first_tokens, else the last row

Grid       (B * T,), one program per token.
Tile       a token in registers, in two power-of-two parts (see _tiles.py); C <= 8192.
Numerics   in fp32, two-pass variance; x is rounded to its own dtype before it is normalised, as if it had been read
           back, and the result once, on the store.
Traffic    B*T*C elements each of x and y read, of x and the result written: one read less than a residual and a norm.
           The rows of weights stay in cache. Bandwidth-bound.
Reference  residual_norm_reference, below.
Source     Wan-Video/Wan2.2, wan/modules/model.py, WanAttentionBlock.forward.
"""

import torch
from torch import Tensor

from ._checks import check_out_dtype
from ._launch import on_device_of, runs_triton, tl, triton
from ._row_norm import RowNorm, added, row_norm_reference, weighted
from ._tiles import row_tile


def residual_norm_reference(norm: RowNorm, out_dtype: torch.dtype) -> Tensor:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    return row_norm_reference(norm).to(out_dtype)


@triton.jit(do_not_specialize=["T", "first_tokens"])
def _residual_norm_kernel(
    x_ptr,  # [B, T, C], contiguous
    y_ptr,  # [B, T, C], contiguous
    gate_ptr,  # [B, R, C], channels adjacent; R is 1 or 2
    scale_ptr,  # [B, R, C], channels adjacent; R is 1 or 2
    shift_ptr,  # [B, R, C], channels adjacent
    out_ptr,  # [B, T, C], contiguous
    T,
    first_tokens,  # tokens that take row 0
    gate_stride_b,
    gate_stride_r,  # from row 0 to the last row; 0 where R is 1
    scale_stride_b,
    scale_stride_r,
    shift_stride_b,
    shift_stride_r,
    eps,
    ADDED: tl.constexpr,  # UNGATED or GATED
    OFFSET: tl.constexpr,  # what the scale is added to
    C: tl.constexpr,
    HEAD: tl.constexpr,  # power of two, at most C
    TAIL: tl.constexpr,  # power of two, HEAD + TAIL at least C
):
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
    out_tail = weighted(x_tail * rstd, scale_row, shift_row, tail, live, OFFSET)
    tl.store(out_ptr + row + head, out_head)  # in bounds: HEAD <= C
    tl.store(out_ptr + row + tail, out_tail, mask=live)


def residual_norm_triton(norm: RowNorm, out_dtype: torch.dtype) -> Tensor:
    """Launch the kernel on checked arguments."""
    x = norm.x
    out = torch.empty_like(x, dtype=out_dtype)
    tile = row_tile(x.shape[-1])
    with on_device_of(x):
        _residual_norm_kernel[(norm.tokens,)](
            *norm.tensors(),
            out,
            *norm.counts(),
            **norm.constants(),
            HEAD=tile.head,
            TAIL=tile.tail,
            num_warps=tile.num_warps,
        )
    return out


def _residual_norm(norm: RowNorm, out_dtype: torch.dtype | None) -> Tensor:
    norm.check()
    check_out_dtype(out_dtype)
    run = residual_norm_triton if runs_triton(norm.x) else residual_norm_reference
    return run(norm, out_dtype or norm.x.dtype)


def residual_layer_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    gate: Tensor | None = None,
    first_tokens: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Add y, or `gate * y`, to the residual stream in its memory, and return it normalised, times weight, plus bias.

    Args:
        x: [B, T, C], the residual stream, contiguous; float32, bfloat16 or float16; C <= 8192. Written to.
        y: [B, T, C], what the block computed, contiguous, any of those dtypes, on x's device.
        weight: [C], contiguous, any of those dtypes, on x's device.
        bias: like weight.
        eps: added to the variance, in units of x squared.
        gate: [B, R, C], channels adjacent, any of those dtypes, on x's device. R is 1 (one timestep per sample) or 2
            (the first tokens have a timestep of their own). Slices and expanded batches are fine.
        first_tokens: tokens [0, first_tokens) take row 0, the others the last row; of no effect where R is 1.
        out_dtype: of the result; x's dtype where None.

    Returns:
        [B, T, C] in out_dtype, rounded once from fp32.

    Raises:
        ValueError: a shape, dtype, stride, device or first_tokens is not as above.
    """
    norm = RowNorm(x=x, scale=weight, shift=bias, eps=eps, y=y, gate=gate, first_tokens=first_tokens)
    return _residual_norm(norm, out_dtype)


def residual_layer_norm_modulate(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float,
    gate: Tensor | None = None,
    first_tokens: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Add y, or `gate * y`, to the residual stream in its memory, and return it normalised, scaled and shifted.

    Args:
        x: [B, T, C], the residual stream, contiguous; float32, bfloat16 or float16; C <= 8192. Written to.
        y: [B, T, C], what the block computed, contiguous, any of those dtypes, on x's device.
        scale: [B, R, C], channels adjacent, any of those dtypes, on x's device. R is 1 (one timestep per sample) or 2
            (the first tokens have a timestep of their own). Slices and expanded batches are fine.
        shift: like scale.
        eps: added to the variance, in units of x squared.
        gate: [B, R, C], like scale; its R may be another.
        first_tokens: tokens [0, first_tokens) take row 0, the others the last row; of no effect where R is 1.
        out_dtype: of the result; x's dtype where None.

    Returns:
        [B, T, C] in out_dtype, rounded once from fp32.

    Raises:
        ValueError: a shape, dtype, stride, device or first_tokens is not as above.
    """
    norm = RowNorm(x=x, scale=scale, shift=shift, eps=eps, y=y, gate=gate, first_tokens=first_tokens)
    return _residual_norm(norm, out_dtype)
