"""8-bit activations: what they are, the rule that makes them, and the device functions that kernels share.

    x[..., c] ~ values[..., c] * scale[..., c // (C // G)]          G = 1, or C / 128
    scale = absmax / largest,  values = round(x * (largest / absmax))       absmax over the channels that share a scale
    largest: 127 for int8; 16 for e4m3 activations and 28 for e4m3 weights

Rotated: each run of 128 channels is multiplied by the orthonormal Hadamard matrix before it is rounded, which spreads
an outlier over 128 channels. The matrix is its own inverse, so a weight stored multiplied by it along its input axis
gives the same product.

Numerics   fp32; int8 is rounded half to even and never -128, e4m3 half to even. A rotation on a GPU rounds its input to
           bf16, whose range needs no scaling: 59 dB below the signal, where int8's own noise is at 38 dB. Channels
           whose absmax is below 2^-100 become zeros with the scale 1. x is finite: a NaN is not looked for.
Bounds     FP16 sums of 128 e4m3 products cannot overflow: 16 * 28 * 128 = 57,344, and 128 roundings to a multiple of 32
           add at most 128 * 16 = 2,048, together below 65,504. Weights of files, scaled to 448, are 16 * 28: a shift of
           the exponent. e4m3 keeps full precision over ten powers of two below 16.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ._checks import require
from ._launch import tl, triton

GROUP = 128  # channels that are rotated together, and that share a scale where a token has more than one
EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 16.0}
LARGEST_WEIGHT = {torch.int8: 127.0, torch.float8_e4m3fn: 28.0}

_E4M3_CAPABILITY = (8, 9)  # of the first GPUs whose instructions convert and multiply it
_SMALLEST = 2.0**-100  # absmax below it counts as zero: its reciprocal would leave fp32's normal range
_SMALLEST_ON_DEVICE = tl.constexpr(_SMALLEST)
_INT8_LARGEST = tl.constexpr(LARGEST[torch.int8])
_E4M3_LARGEST = tl.constexpr(LARGEST[torch.float8_e4m3fn])
_NORM = tl.constexpr(GROUP**-0.5)
_ROUNDER = tl.constexpr(1.5 * 2.0**23)  # fp32 numbers near it are the integers, so adding it rounds half to even


@dataclass(frozen=True, slots=True)
class Quantized:
    """Tokens in 8 bits: x[..., c] ~ values[..., c] * scale[..., c // (C // G)]."""

    values: Tensor  # [..., C], int8 or float8_e4m3fn, contiguous
    scale: Tensor  # [..., G], fp32, contiguous; G is 1 or C / 128
    rotated: bool  # whether each 128 channels were multiplied by the Hadamard matrix before rounding

    @property
    def shape(self) -> torch.Size:
        """Of the tokens."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.values.device


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A linear layer's weight in 8 bits: w[n, k] ~ values[n, k] * scale[n]."""

    values: Tensor  # [N, K], int8 or float8_e4m3fn within LARGEST_WEIGHT, contiguous
    scale: Tensor  # [N], fp32, contiguous
    rotated: bool  # whether each 128 input channels were multiplied by the Hadamard matrix before rounding

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.values.device


def hadamard128() -> Tensor:
    """The orthonormal 128-wide Hadamard matrix, [128, 128] fp32: entry (i, j) is +-1 / sqrt(128), symmetric."""
    matrix = torch.ones(1, 1)
    while len(matrix) < GROUP:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(GROUP)


@lru_cache
def _hadamard128_on(device: torch.device) -> Tensor:
    """Keep the matrix on a device: a copy from the host would wait for it."""
    with torch.inference_mode(False):
        return hadamard128().to(device)


def rotate_reference(x: Tensor) -> Tensor:
    """Multiply each run of 128 channels of x [..., C] by `hadamard128`, in fp32; C is a multiple of 128."""
    runs = x.float().reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    return (runs @ _hadamard128_on(x.device)).flatten(-2)


def quantize_reference(
    x: Tensor,
    dtype: torch.dtype,
    *,
    groups: int = 1,
    rotated: bool = False,
    largest: float | None = None,
) -> Quantized:
    """The formula above in plain torch: the truth that kernels are held to, and the path without a GPU.

    Args:
        x: [..., C], finite, any float dtype.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.
        groups: scales of a token: 1, or C / 128.
        rotated: multiply each 128 channels by the Hadamard matrix first; C is a multiple of 128 then.
        largest: of the values; that of activations where None, `LARGEST_WEIGHT[dtype]` for weights.

    Returns:
        x in 8 bits.
    """
    largest = LARGEST[dtype] if largest is None else largest
    wide = rotate_reference(x) if rotated else x.float()
    wide = wide.unflatten(-1, (groups, -1))
    absmax = wide.abs().amax(-1)
    is_zero = absmax < _SMALLEST
    scale = torch.where(is_zero, 1.0, absmax / largest)
    inverse = torch.where(is_zero, 0.0, largest / absmax)
    values = (wide * inverse[..., None]).flatten(-2)
    return Quantized((values.round_() if dtype == torch.int8 else values).to(dtype), scale, rotated)


def dequantize_reference(x: Quantized) -> Tensor:
    """Return tokens as fp32, [..., C], rotated back where they were rotated."""
    groups = x.scale.shape[-1]
    wide = (x.values.float().unflatten(-1, (groups, -1)) * x.scale[..., None]).flatten(-2)
    return rotate_reference(wide) if x.rotated else wide


def check_quantized(x: Quantized, name: str) -> None:
    """Refuse tokens that no kernel can read.

    Raises:
        ValueError: a dtype, shape, stride or device of x is not as in `Quantized`.
    """
    values, scale = x.values, x.scale
    check_8bit_dtype(values.dtype, f"{name}.values", values.device)
    require(values.dim() >= 1 and values.shape[-1] > 0, f"{name}.values: must be [..., C]", tuple(values.shape))
    require(values.is_contiguous(), f"{name}.values: must be contiguous", f"strides {values.stride()}")
    channels = values.shape[-1]
    shapes = [(*values.shape[:-1], groups) for groups in (1, channels // GROUP) if groups == 1 or channels % GROUP == 0]
    require(tuple(scale.shape) in shapes, f"{name}.scale: must be {' or '.join(map(str, shapes))}", tuple(scale.shape))
    require(scale.dtype == torch.float32, f"{name}.scale: must be float32", scale.dtype)
    require(scale.is_contiguous(), f"{name}.scale: must be contiguous", f"strides {scale.stride()}")
    require(scale.device == values.device, f"{name}.scale: must be on {values.device}, like values", scale.device)
    require(not x.rotated or channels % GROUP == 0, f"{name}: rotated channels must be a multiple of {GROUP}", channels)


def check_8bit_dtype(dtype: torch.dtype, name: str, device: torch.device) -> None:
    """Refuse a dtype that is not one of 8 bits, or that this GPU has no instructions for.

    Raises:
        ValueError: dtype is neither int8 nor float8_e4m3fn, or is e4m3 on a GPU before compute capability 8.9.
    """
    require(dtype in EIGHT_BIT, f"{name}: must be int8 or float8_e4m3fn", dtype)
    if device.type == "cuda" and dtype == torch.float8_e4m3fn:
        capability = torch.cuda.get_device_capability(device)
        require(capability >= _E4M3_CAPABILITY, f"{name}: must be int8 before compute capability 8.9", capability)


@triton.jit
def hadamard(WIDTH: tl.constexpr):  # -> [WIDTH, WIDTH] bf16 of +-1, not normalised; WIDTH a power of two up to 128
    i = tl.arange(0, WIDTH)
    odd = i[:, None] & i[None, :]
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    return (0x3F80 | (odd & 1) << 15).to(tl.int16).to(tl.bfloat16, bitcast=True)  # bf16's 1, with its sign bit


@triton.jit
def rotate_tile(
    x,  # [R, 128] fp32: runs of 128 channels, of any tokens; R at least 16
    matrix,  # hadamard(128)
):  # -> [R, 128] fp32, rotated
    return tl.dot(x.to(tl.bfloat16), matrix) * _NORM


@triton.jit
def rotate_halves(
    low,  # [R, 64] fp32: the first 64 of each run of 128 channels; R at least 16
    high,  # [R, 64] fp32: the other 64, in the same layout
    matrix,  # hadamard(64)
):  # -> ([R, 64], [R, 64]) fp32, rotated: half the products of rotate_tile, since H128 = [[H64, H64], [H64, -H64]]
    total = tl.dot((low + high).to(tl.bfloat16), matrix)
    difference = tl.dot((low - high).to(tl.bfloat16), matrix)
    return total * _NORM, difference * _NORM


@triton.jit
def scale_of(
    absmax,  # fp32, any shape: the largest magnitude among the channels that share a scale
    DTYPE: tl.constexpr,  # tl.int8 or tl.float8e4nv
):  # -> (scale to store, what to multiply x by before rounding)
    largest: tl.constexpr = _INT8_LARGEST if tl.int8 == DTYPE else _E4M3_LARGEST
    is_zero = absmax < _SMALLEST_ON_DEVICE
    divisor = tl.where(is_zero, 1.0, absmax)
    return tl.where(is_zero, 1.0, absmax / largest), tl.where(is_zero, 0.0, largest / divisor)


@triton.jit
def round_8bit(
    x,  # fp32, already multiplied by scale_of's second result
    DTYPE: tl.constexpr,  # tl.int8 or tl.float8e4nv
):  # -> x rounded to DTYPE
    if tl.int8 == DTYPE:  # the integer stands in the low bits of the sum, so no conversion instruction is needed
        return (x + _ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return x.to(tl.float8e4nv)


# In a kernel, for a tile x [R, C] fp32 whose rows share a scale each:
#     scale, inverse = scale_of(tl.max(tl.abs(x), 1), values_ptr.dtype.element_ty)
#     tl.store(values_ptr + at, round_8bit(x * inverse[:, None], values_ptr.dtype.element_ty), mask=live)
# and for a rotated row held as halves [C / 128, 64], rotate_halves first.
