"""What stands before every convolution of the VAE: RMS norm over a pixel's channels, then SiLU.

    n[b, :, p] = x[b, :, p] / max(|x[b, :, p]|, 1e-12) * weight          weight: sqrt(C) times the checkpoint's gamma
    y[b, :, p] = n / (1 + exp(-n))                                       p: a pixel of a frame

Grid       (ceil(P / PIXELS), B), one program per PIXELS pixels; P is frames * rows * columns.
Tile       PIXELS pixels in registers, their channels in two power-of-two parts (see _tiles.py); C <= 1024. Whichever of
           channels and pixels lie side by side in memory do so in a thread too.
Numerics   fp32, rounded once, on the store. Torch's chain in 16 bits rounds the reciprocal length and three times more.
Traffic    B*C*P elements of x read and B*C*P of y written; bandwidth-bound.
Reference  rms_norm_silu_reference, below.
Source     Wan-Video/Wan2.2, wan/modules/vae2_1.py and vae2_2.py, RMS_norm and ResidualBlock.
"""

from itertools import pairwise
from math import e, log2

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import COMPUTE_DTYPES, require
from ._launch import on_device_of, runs_triton, tl, triton
from ._tiles import row_tile

MAX_CHANNELS = 1024  # of Wan's VAEs
SMALLEST_LENGTH = 1e-12
SMALLEST_ON_DEVICE = tl.constexpr(SMALLEST_LENGTH)
_LOG2_E = tl.constexpr(log2(e))

# A program holds about so many numbers, and at least so many pixels where those lie side by side: 32 bytes of 16 bits.
PROGRAM_ELEMENTS = 8192
ADJACENT_PIXELS = 16


def rms_norm_silu_reference(x: Tensor, weight: Tensor, *, overwrite: bool = False) -> Tensor:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    scale = length.clamp_min_(SMALLEST_LENGTH).reciprocal_()
    wide = x.float()
    is_free = overwrite or wide is not x  # a widened copy may take the result
    wide = torch.mul(wide, scale, out=wide if is_free else None)
    y = F.silu(wide.mul_(weight.float().view(-1, *[1] * (x.dim() - 2))), inplace=True)
    return x.copy_(y) if overwrite and x.dtype != torch.float32 else y.to(x.dtype)


@triton.jit
def silu(n):
    """Apply SiLU on the device, in fp32."""
    root = tl.rsqrt(1.0 + tl.exp2(n * -_LOG2_E))  # with a quotient the kernel has a third more instructions
    return n * root * root


@triton.jit
def _rms_norm_silu_kernel(
    x_ptr,  # [B, C, P]
    weight_ptr,  # [C], contiguous
    y_ptr,  # [B, C, P]; may be x: a program has read its pixels before it stores
    P,  # a multiple of 16 has code of its own, with 16-byte accesses where pixels are adjacent
    x_stride_b,
    x_stride_c,
    x_stride_p,
    y_stride_b,
    y_stride_c,
    y_stride_p,
    C: tl.constexpr,
    HEAD: tl.constexpr,  # power of two, at most C
    TAIL: tl.constexpr,  # power of two, HEAD + TAIL at least C
    PIXELS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    head = tl.arange(0, HEAD)[None, :].to(tl.int64)  # a plane of a long video is so far from the last
    tail = HEAD + tl.arange(0, TAIL)[None, :].to(tl.int64)
    live_head = pixel < P
    live_tail = live_head & (tail < C)

    x_pixel = x_ptr + b * x_stride_b + pixel * x_stride_p
    x_head = tl.load(x_pixel + head * x_stride_c, mask=live_head, other=0.0).to(tl.float32)
    x_tail = tl.load(x_pixel + tail * x_stride_c, mask=live_tail, other=0.0).to(tl.float32)
    weight_head = tl.load(weight_ptr + head).to(tl.float32)  # in bounds: HEAD <= C
    weight_tail = tl.load(weight_ptr + tail, mask=tail < C, other=0.0).to(tl.float32)

    length = tl.sqrt(tl.sum(x_head * x_head, 1) + tl.sum(x_tail * x_tail, 1))
    scale = (1.0 / tl.maximum(length, SMALLEST_ON_DEVICE))[:, None]
    y_pixel = y_ptr + b * y_stride_b + pixel * y_stride_p
    tl.store(y_pixel + head * y_stride_c, silu(x_head * scale * weight_head), mask=live_head)
    tl.store(y_pixel + tail * y_stride_c, silu(x_tail * scale * weight_tail), mask=live_tail)


def pixel_tile(channels: int, *, channels_last: bool) -> dict[str, int]:
    """Launch parameters for pixels of so many channels, which lie side by side or a plane apart."""
    tile = row_tile(channels)
    pixels = max(PROGRAM_ELEMENTS // (tile.head + tile.tail), 1 if channels_last else ADJACENT_PIXELS)
    pixels = min(1 << (pixels.bit_length() - 1), 128)
    warps = 8 if pixels * (tile.head + tile.tail) > PROGRAM_ELEMENTS else 4
    return {"HEAD": tile.head, "TAIL": tile.tail, "PIXELS": pixels, "num_warps": warps}


def rms_norm_silu_triton(x: Tensor, weight: Tensor, *, overwrite: bool = False) -> Tensor:
    """Launch the kernel on checked arguments."""
    strides = pixel_strides(x)
    assert strides is not None, "checked before"
    batch, channels, *spatial = x.shape
    channels_last = strides[1] == 1
    if overwrite:
        y = x
    elif channels_last:
        y = torch.empty(batch, *spatial, channels, dtype=x.dtype, device=x.device).movedim(-1, 1)
    else:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y_strides = pixel_strides(y)
    assert y_strides is not None, "fresh, or x"
    tile = pixel_tile(channels, channels_last=channels_last)
    pixels = x.numel() // (batch * channels)
    with on_device_of(x):
        _rms_norm_silu_kernel[(-(-pixels // tile["PIXELS"]), batch)](
            x, weight, y, pixels, *strides, *y_strides, C=channels, **tile
        )
    return y


def pixel_strides(x: Tensor) -> tuple[int, int, int] | None:
    """Strides of x [B, C, ...] over samples, channels and pixels; None where pixels are not evenly spaced."""
    spatial = [(size, stride) for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True) if size > 1]
    for (_, outer), (size, stride) in pairwise(spatial):
        if outer != size * stride:
            return None
    return x.stride(0), x.stride(1), spatial[-1][1] if spatial else 0


def rms_norm_silu(x: Tensor, weight: Tensor, *, overwrite: bool = False) -> Tensor:
    """Divide each pixel's channels by their length, multiply by the weight and apply SiLU.

    Args:
        x: [B, C, ...], none of them 0, C <= 1024; float32, bfloat16 or float16. Channels last or contiguous; a run of
            frames of either is fine.
        weight: C numbers, contiguous, any of those dtypes, on x's device: gamma times sqrt(C).
        overwrite: return the result in x's memory.

    Returns:
        x's shape and dtype, channels last or contiguous as x is. x is not written to unless `overwrite`.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.
    """
    require(x.dtype in COMPUTE_DTYPES, "x: must be float32, bfloat16 or float16", x.dtype)
    require(x.dim() >= 3 and x.numel() > 0, "x: must be [B, C, ...], none of them 0", tuple(x.shape))
    channels = x.shape[1]
    require(channels <= MAX_CHANNELS, f"x: must have at most {MAX_CHANNELS} channels", channels)
    evenly = pixel_strides(x) is not None
    require(evenly, "x: pixels must be evenly spaced", f"strides {x.stride()} for shape {tuple(x.shape)}")
    require(weight.numel() == channels, f"weight: must be {channels} numbers, x's channels", tuple(weight.shape))
    require(weight.dtype in COMPUTE_DTYPES, "weight: must be float32, bfloat16 or float16", weight.dtype)
    require(weight.is_contiguous(), "weight: must be contiguous", f"strides {weight.stride()}")
    require(weight.device == x.device, f"weight: must be on {x.device}, like x", weight.device)
    run = rms_norm_silu_triton if runs_triton(x) else rms_norm_silu_reference
    return run(x, weight, overwrite=overwrite)
