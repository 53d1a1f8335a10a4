"""Values for 8-bit attention: less each channel's mean, scaled per channel, transposed; e4m3 or fp16.

    mean[b, n, d] over tokens,  absmax = max(high - mean, mean - low)       of the channel
    stored[b, n, i / 64, d, i % 64] = round((v[b, t(i), n, d] - mean) * largest / absmax),  scale = absmax / largest

Softmax weights add up to 1, so the mean is added back to the output, exactly, and the rounding of weights no longer
acts on it. `largest` is what keeps FP16 sums finite: see Bounds.

Order      t(i) = i for fp16. e4m3 is stored in the order in which tensor cores leave the weights of keys in registers
           after q . k, so that weights go into the product with the values as they are: in each run of 16, place
           b + 2 j + 4 q holds token b + 2 q + 8 j (b, j: bits, q: 0 to 3).
           Blocks of 64 keys are whole runs of memory, so that addresses in attention's loop are constants.
Grid       (ceil(T / 64), N, B), one program per block of a head.
Tile       64 x D in registers, read in the order of storage and transposed through shared memory.
Numerics   fp32, rounded once, half to even. A channel that is constant becomes zeros with the scale 1. Places past the
           last token hold zeros.
Bounds     e4m3: weights up to 448, values up to 9/16: 128 keys add up to 448 * 9/16 * 128 = 32,256, and 128 roundings
           to a multiple of 16 add at most 1,024: half of FP16's 65,504. fp16: 16 * 16 * 128 = 32,768, and 2,048.
           9/16 because a bell-shaped channel whose largest value is just above a power of two is rounded best.
Traffic    B*T*N*D elements of v read and as many written, one or two bytes each; bandwidth-bound.
Reference  quantize_values_reference, below.
Source     SageAttention2++ (Zhang et al., 2025), with the mean removed and room for 128 keys between flushes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import require
from ._heads import check_has_e4m3, check_heads
from ._launch import on_device_of, runs_triton, tl, triton
from .channel_range import channel_range

BLOCK = 64  # tokens
LARGEST_VALUE = {torch.float8_e4m3fn: 9 / 16, torch.float16: 16.0}
_SMALLEST = 2.0**-100  # absmax below it counts as zero: its reciprocal would leave fp32's normal range


@dataclass(frozen=True, slots=True)
class QuantizedValues:
    """Values in 8 or 16 bits: v[b, t(i), n, d] ~ values[b, n, i / 64, d, i % 64] * scale[b, n, d] + mean[b, n, d]."""

    values: Tensor  # [B, N, ceil(T / 64), D, 64], float8_e4m3fn or float16, contiguous
    scale: Tensor  # [B, N, D], fp32, contiguous
    mean: Tensor  # [B, N, D], fp32, contiguous
    tokens: int  # T


def stored_tokens(places: int, dtype: torch.dtype) -> Tensor:
    """t(i) of the docstring: which token each place holds, [places] int64; places is a multiple of 16."""
    i: Tensor = torch.arange(places)
    if dtype == torch.float16:
        return i
    return (i & ~15) + (i & 1) + ((i >> 2 & 3) << 1) + ((i >> 1 & 1) << 3)


def _scales(low: Tensor, high: Tensor, mean: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Scale of each channel, and what to multiply the channel by before rounding."""
    absmax = torch.maximum(high - mean, mean - low)
    is_zero = absmax < _SMALLEST
    return torch.where(is_zero, 1.0, absmax / largest), torch.where(is_zero, 0.0, largest / absmax)


def quantize_values_reference(v: Tensor, mean: Tensor, inverse: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Stored values in plain torch: the truth the kernel is held to, and the path without a GPU."""
    places = -(-v.shape[1] // BLOCK) * BLOCK
    scaled = (v.float() - mean[:, None]) * inverse[:, None]
    scaled = F.pad(scaled, (0, 0, 0, 0, 0, places - v.shape[1]))
    stored: Tensor = scaled[:, stored_tokens(places, dtype).to(v.device)].unflatten(1, (-1, BLOCK))
    return stored.permute(0, 3, 1, 4, 2).to(dtype).contiguous()


@triton.jit(do_not_specialize=["T"])
def _quantize_values_kernel(
    v_ptr,  # [B, T, N, D], channels adjacent
    mean_ptr,  # [B, N, D], contiguous
    inverse_ptr,  # [B, N, D], contiguous
    values_ptr,  # [B, N, ceil(T / 64), D, 64], contiguous
    T,
    N,
    v_stride_b,
    v_stride_t,
    v_stride_n,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if values_ptr.dtype.element_ty == tl.float16:
        t = first + i
    else:
        t = first + (i & ~15) + (i & 1) + (((i >> 2) & 3) << 1) + (((i >> 1) & 1) << 3)
    live = (t < T)[:, None]

    v = tl.load(v_ptr + b * v_stride_b + n * v_stride_n + t[:, None] * v_stride_t + d[None, :], mask=live, other=0.0)
    mean = tl.load(mean_ptr + (b * N + n) * D + d)[None, :]  # in bounds: one head's channels
    inverse = tl.load(inverse_ptr + (b * N + n) * D + d)[None, :]  # in bounds: one head's channels
    values = tl.where(live, (v.to(tl.float32) - mean) * inverse, 0.0).to(values_ptr.dtype.element_ty)
    row = ((b * N + n) * tl.num_programs(0) + tl.program_id(0)) * D + d
    tl.store(values_ptr + row[:, None] * BLOCK + i[None, :], tl.trans(values))  # in bounds: one whole block per program


def quantize_values_triton(v: Tensor, mean: Tensor, inverse: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Launch the kernel on checked arguments."""
    batch, tokens, heads, dim = v.shape
    blocks = triton.cdiv(tokens, BLOCK)
    values = torch.empty((batch, heads, blocks, dim, BLOCK), dtype=dtype, device=v.device)
    with on_device_of(v):
        _quantize_values_kernel[(blocks, heads, batch)](
            v, mean, inverse, values, tokens, heads, *v.stride()[:3], D=dim, BLOCK=BLOCK, num_warps=4
        )
    return values


def quantize_values(v: Tensor, *, dtype: torch.dtype = torch.float8_e4m3fn) -> QuantizedValues:
    """Round values to e4m3, or to fp16 where the product with the softmax weights is to be 16 bit.

    Args:
        v: [B, T, N, D], channels adjacent; float32, bfloat16 or float16; D 64 or 128.
        dtype: `torch.float8_e4m3fn` or `torch.float16`.

    Returns:
        The rounded values. v is not written to.

    Raises:
        ValueError: a shape, dtype or stride is not as above, or the GPU has no e4m3.
    """
    check_heads(v, "v")
    require(dtype in LARGEST_VALUE, "dtype: must be float8_e4m3fn or float16", dtype)
    check_has_e4m3(dtype, v, "dtype")
    mean, low, high = channel_range(v)
    scale, inverse = _scales(low, high, mean, LARGEST_VALUE[dtype])
    run = quantize_values_triton if runs_triton(v) else quantize_values_reference
    return QuantizedValues(run(v, mean, inverse, dtype=dtype), scale, mean, v.shape[1])
