"""AdaLN: layer norm without affine, then the scale and shift that the timestep predicts.

    y[b, t, :] = (x[b, t, :] - mean) * rsqrt(var + eps) * (1 + scale[b, r, :]) + shift[b, r, :]
    r = 0 for t < first_tokens, else the last row

Grid       (B * T,), one program per token.
Tile       a token in registers, in two power-of-two parts (see _tiles.py); C <= 8192.
Numerics   reduce and modulate in fp32, two-pass variance, rounded once, on the store. Wan's code also rounds to x's
           dtype between norm and scale, which matters in its first block only (x is fp32 after it).
Traffic    B*T*C elements of x read and B*T*C of y written; the modulation rows stay in cache. Bandwidth-bound.
Reference  layer_norm_modulate_reference, below.
Source     Wan-Video/Wan2.2, wan/modules/model.py, WanAttentionBlock.forward and Head.forward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_channels, check_modulation, check_out_dtype, require
from ._launch import on_device_of, runs_triton, tl, triton
from ._rows import row_strides, split_tokens
from ._tiles import MAX_CHANNELS, row_tile


def layer_norm_modulate_reference(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float, first_tokens: int = 0, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    y = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    for r, run in enumerate(split_tokens(y, scale.shape[1], first_tokens)):
        row = slice(r, r + 1)
        torch.addcmul(shift[:, row].float(), run, 1 + scale[:, row].float(), out=run)  # spares a copy of all tokens
    return y.to(out_dtype or x.dtype)


@triton.jit(do_not_specialize=["T", "first_tokens"])
def _layer_norm_modulate_kernel(
    x_ptr,  # [B, T, C], contiguous
    scale_ptr,  # [B, R, C], channels adjacent; R is 1 or 2
    shift_ptr,  # [B, R, C], channels adjacent
    y_ptr,  # [B, T, C], contiguous
    T,
    first_tokens,  # tokens that take modulation row 0
    scale_stride_b,
    scale_stride_r,  # from row 0 to the last row; 0 where R is 1
    shift_stride_b,
    shift_stride_r,
    eps,
    C: tl.constexpr,
    HEAD: tl.constexpr,  # power of two, at most C
    TAIL: tl.constexpr,  # power of two, HEAD + TAIL at least C
):
    token = tl.program_id(0).to(tl.int64)  # b * T + t
    b, t = token // T, token % T
    r = tl.where(t < first_tokens, 0, 1)
    row = token * C
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    live = tail < C

    x_head = tl.load(x_ptr + row + head).to(tl.float32)  # in bounds: HEAD <= C
    x_tail = tl.load(x_ptr + row + tail, mask=live, other=0.0).to(tl.float32)
    mean = (tl.sum(x_head, 0) + tl.sum(x_tail, 0)) / C
    x_head -= mean
    x_tail = tl.where(live, x_tail - mean, 0.0)  # dead lanes must not reach the variance
    variance = (tl.sum(x_head * x_head, 0) + tl.sum(x_tail * x_tail, 0)) / C
    rstd = tl.rsqrt(variance + eps)

    scale_row = scale_ptr + b * scale_stride_b + r * scale_stride_r
    shift_row = shift_ptr + b * shift_stride_b + r * shift_stride_r
    scale_head = tl.load(scale_row + head).to(tl.float32)  # in bounds: HEAD <= C
    scale_tail = tl.load(scale_row + tail, mask=live, other=0.0).to(tl.float32)
    shift_head = tl.load(shift_row + head).to(tl.float32)  # in bounds: HEAD <= C
    shift_tail = tl.load(shift_row + tail, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr + row + head, x_head * rstd * (1.0 + scale_head) + shift_head)  # in bounds: HEAD <= C
    tl.store(y_ptr + row + tail, x_tail * rstd * (1.0 + scale_tail) + shift_tail, mask=live)


def layer_norm_modulate_triton(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float, first_tokens: int = 0, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Launch the kernel on checked arguments."""
    y = torch.empty_like(x, dtype=out_dtype or x.dtype)
    batch, tokens, channels = x.shape
    tile = row_tile(channels)
    with on_device_of(x):
        _layer_norm_modulate_kernel[(batch * tokens,)](
            x,
            scale,
            shift,
            y,
            tokens,
            first_tokens,
            *row_strides(scale),
            *row_strides(shift),
            eps,
            C=channels,
            HEAD=tile.head,
            TAIL=tile.tail,
            num_warps=tile.num_warps,
        )
    return y


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float, first_tokens: int = 0, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Normalise each token over its channels, then scale and shift it by the row of modulation it belongs to.

    Args:
        x: [B, T, C], contiguous; float32, bfloat16 or float16; C <= 8192.
        scale: [B, R, C], channels adjacent, any of those dtypes, on x's device. R is 1 (one timestep per sample) or 2
            (the first tokens have a timestep of their own). Slices and expanded batches are fine.
        shift: like scale.
        eps: added to the variance, in units of x squared.
        first_tokens: tokens [0, first_tokens) take row 0, the others the last row; of no effect where R is 1.
        out_dtype: of the result; x's dtype where None.

    Returns:
        [B, T, C] in out_dtype, rounded once from fp32. x is not written to.

    Raises:
        ValueError: a shape, dtype, stride, device or first_tokens is not as above.
    """
    check_channels(x, "x", max_channels=MAX_CHANNELS)
    check_modulation(x, scale, "scale", first_tokens)
    check_modulation(x, shift, "shift", first_tokens)
    require(scale.shape == shift.shape, f"shift: must have scale's shape {tuple(scale.shape)}", tuple(shift.shape))
    check_out_dtype(out_dtype)
    run = layer_norm_modulate_triton if runs_triton(x) else layer_norm_modulate_reference
    return run(x, scale, shift, eps=eps, first_tokens=first_tokens, out_dtype=out_dtype)
