"""Tokens to 8 bits, one scale per token or per 128 channels: for inputs whose producer has no fused form.

    values[m, c] = round(x[m, c] * largest / absmax),  scale = absmax / largest; see _quantized.py for every rule
    rotated: each 128 channels of x are multiplied by the orthonormal Hadamard matrix first

Grid       (M,), one program per token of x [M, C].
Tile       a token in registers as halves [RUNS, 64] of its runs of 128 channels, RUNS a power of two; C <= 16384.
Numerics   fp32; the rotation rounds x to bf16 first.
Traffic    M*C elements read, M*C bytes and the scales written; bandwidth-bound.
Reference  quantize_reference, in _quantized.py.
Source     Ashkboos et al., QuaRot, arXiv 2404.00456 (the rotation); ModelTC/LightX2V (a scale per token).
"""

import torch
from torch import Tensor

from ._checks import check_channels, require
from ._launch import on_device_of, runs_triton, tl, triton
from ._quantized import (
    GROUP,
    Quantized,
    check_8bit_dtype,
    hadamard,
    quantize_reference,
    rotate_halves,
    round_8bit,
    scale_of,
)

MAX_CHANNELS = 16384

# (runs of 128 channels at most, warps): a thread holds at most 64 channels, and a rotation has 16 rows at least.
RUN_WARPS = ((16, 2), (64, 4), (MAX_CHANNELS // GROUP, 8))


def tile_of(channels: int) -> dict[str, int]:
    """Launch parameters for a token of so many channels."""
    runs = max(16, 1 << (channels // GROUP - 1).bit_length())
    return {"RUNS": runs, "num_warps": next(warps for most, warps in RUN_WARPS if runs <= most)}


@triton.jit
def _quantize_rows_kernel(
    x_ptr,  # [M, C], contiguous
    values_ptr,  # [M, C], contiguous; int8 or e4m3
    scale_ptr,  # [M, G] fp32, contiguous
    C: tl.constexpr,  # a multiple of 128
    GROUPED: tl.constexpr,  # G is C / 128; otherwise 1
    ROTATED: tl.constexpr,
    RUNS: tl.constexpr,  # power of two, at least C / 128
):
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    run = tl.arange(0, RUNS)
    live = run < C // 128
    low_at = token * C + run[:, None] * 128 + tl.arange(0, 64)[None, :]
    high_at = low_at + 64

    low = tl.load(x_ptr + low_at, mask=live[:, None], other=0.0).to(tl.float32)
    high = tl.load(x_ptr + high_at, mask=live[:, None], other=0.0).to(tl.float32)
    if ROTATED:
        low, high = rotate_halves(low, high, hadamard(64))
    absmax = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    if GROUPED:
        scale, inverse = scale_of(absmax, dtype)
        tl.store(scale_ptr + token * (C // 128) + run, scale, mask=live)
        inverse = inverse[:, None]
    else:
        scale, inverse = scale_of(tl.max(absmax, 0), dtype)
        tl.store(scale_ptr + token, scale)  # in bounds: one scale per token
    tl.store(values_ptr + low_at, round_8bit(low * inverse, dtype), mask=live[:, None])
    tl.store(values_ptr + high_at, round_8bit(high * inverse, dtype), mask=live[:, None])


def quantize_rows_triton(x: Tensor, dtype: torch.dtype, *, groups: int = 1, rotated: bool = False) -> Quantized:
    """Launch the kernel on checked arguments."""
    channels = x.shape[-1]
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(*x.shape[:-1], groups, dtype=torch.float32, device=x.device)
    tokens = x.numel() // channels
    if tokens > 0:
        with on_device_of(x):
            _quantize_rows_kernel[(tokens,)](
                x, values, scale, C=channels, GROUPED=groups > 1, ROTATED=rotated, **tile_of(channels)
            )
    return Quantized(values, scale, rotated)


def quantize_rows(x: Tensor, dtype: torch.dtype, *, groups: int = 1, rotated: bool = False) -> Quantized:
    """Round tokens to 8 bits.

    Args:
        x: [..., C], finite, contiguous; float32, bfloat16 or float16; C <= 16384, on a GPU a multiple of 128.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.
        groups: scales of a token: 1, or C / 128 for one per 128 channels.
        rotated: multiply each 128 channels by the orthonormal Hadamard matrix before rounding.

    Returns:
        x in 8 bits. x is not written to.

    Raises:
        ValueError: a shape, dtype, stride or count is not as above.
    """
    check_channels(x, "x", max_channels=MAX_CHANNELS)
    check_8bit_dtype(dtype, "dtype", x.device)
    channels = x.shape[-1]
    whole = channels % GROUP == 0
    counts = (1, channels // GROUP) if whole else (1,)
    require(groups in counts, f"groups: must be {' or '.join(map(str, counts))} for {channels} channels", groups)
    require(whole or not rotated, f"x: rotated channels must be a multiple of {GROUP}", channels)
    require(whole or not runs_triton(x), f"x: channels must be a multiple of {GROUP} on a GPU", channels)
    run = quantize_rows_triton if runs_triton(x) else quantize_reference
    return run(x, dtype, groups=groups, rotated=rotated)
