"""Keys for 8-bit attention: less a vector per head, int8 with a scale per 64 tokens and head.

    centred[b, t, n, :] = k[b, t, n, :] - mean[b, n, :]
    absmax[b, n, j] = max |centred[b, t, n, d]| over d and the tokens t of block j
    values = round(centred * 127 / absmax),  scale = absmax / 127

Subtracting any vector from all keys of a head adds the same number to all scores of a query, which softmax does not
see: the result is exact whatever the vector. Wan's keys share large channels, and what they share takes up most of an
int8 that is not rid of it. The vector here is the mean of every 17th token: near enough to the mean of all to leave
the same absmax, at a seventeenth of the traffic, and 17 divides no width of a video in tokens, so that the sample
meets all columns of the picture. A caller who has a mean at hand gives it.

Grid       (ceil(T / 64), N, B), one program per block of keys of a head.
Tile       64 x D in registers.
Numerics   fp32, rounded half to even, never -128; a block of zeros stays zero. See _quantized.py.
Layout     by head and block, so that attention reads a block of keys as one run of 64 * D bytes, and addresses in its
           loop are constants. Places past the last token hold zeros.
Traffic    B*T*N*D elements of k read, as many bytes written; and 1 / 17 more for the mean. Bandwidth-bound.
Reference  quantize_keys_reference, below.
Source     SageAttention (Zhang et al., 2024), K smoothing.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import require
from ._heads import check_heads
from ._launch import on_device_of, runs_triton, tl, triton
from ._quantized import quantize_reference, round_8bit, scale_of

KEY_BLOCK = 64  # tokens that share a scale
SAMPLE_STRIDE = 17  # every how many tokens the mean reads one
SAMPLED_FROM = 4096  # tokens; shorter sequences are read whole, which costs nothing there


@dataclass(frozen=True, slots=True)
class QuantizedKeys:
    """Keys in 8 bits: k less a vector per head ~ values * scale."""

    values: Tensor  # [B, N, ceil(T / 64), 64, D], int8, contiguous
    scale: Tensor  # [B, N, ceil(T / 64)], fp32, contiguous
    tokens: int  # T


def sampled_mean(k: Tensor) -> Tensor:
    """Mean of the tokens of k [B, T, N, D], of every 17th where they are many: [B, N, D] fp32."""
    stride = SAMPLE_STRIDE if k.shape[1] >= SAMPLED_FROM else 1
    return k[:, ::stride].mean(1, dtype=torch.float32)


def quantize_keys_reference(k: Tensor, mean: Tensor) -> QuantizedKeys:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    tokens = k.shape[1]
    centred = k.float() - mean[:, None]
    blocks = F.pad(centred, (0, 0, 0, 0, 0, -tokens % KEY_BLOCK)).unflatten(1, (-1, KEY_BLOCK))
    blocks = blocks.permute(0, 3, 1, 2, 4)  # [B, N, blocks, 64, D]
    quantized = quantize_reference(blocks.flatten(-2), torch.int8)
    return QuantizedKeys(quantized.values.view(blocks.shape), quantized.scale[..., 0], tokens)


@triton.jit(do_not_specialize=["T"])
def _quantize_keys_kernel(
    k_ptr,  # [B, T, N, D], channels adjacent
    mean_ptr,  # [B, N, D], contiguous
    values_ptr,  # [B, N, ceil(T / 64), 64, D], contiguous
    scale_ptr,  # [B, N, ceil(T / 64)], contiguous
    T,
    N,
    k_stride_b,
    k_stride_t,
    k_stride_n,
    D: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    n = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    t = block.to(tl.int64) * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
    d = tl.arange(0, D)
    live = (t < T)[:, None]

    k = tl.load(k_ptr + b * k_stride_b + n * k_stride_n + t[:, None] * k_stride_t + d[None, :], mask=live, other=0.0)
    mean = tl.load(mean_ptr + (b * N + n) * D + d)  # in bounds: one head's channels
    centred = tl.where(live, k.to(tl.float32) - mean[None, :], 0.0)  # dead lanes must not reach the scale
    scale, inverse = scale_of(tl.max(tl.max(tl.abs(centred), 1), 0), tl.int8)
    values = round_8bit(centred * inverse, tl.int8)
    at = (b * N + n) * tl.num_programs(0) + block
    place = at * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
    tl.store(values_ptr + place[:, None] * D + d[None, :], values)  # in bounds: one whole block per program
    tl.store(scale_ptr + at, scale)  # in bounds: one scale per program


def quantize_keys_triton(k: Tensor, mean: Tensor) -> QuantizedKeys:
    """Launch the kernel on checked arguments."""
    batch, tokens, heads, dim = k.shape
    blocks = triton.cdiv(tokens, KEY_BLOCK)
    values = torch.empty((batch, heads, blocks, KEY_BLOCK, dim), dtype=torch.int8, device=k.device)
    scale = torch.empty((batch, heads, blocks), dtype=torch.float32, device=k.device)
    with on_device_of(k):
        _quantize_keys_kernel[(blocks, heads, batch)](
            k, mean, values, scale, tokens, heads, *k.stride()[:3], D=dim, KEY_BLOCK=KEY_BLOCK, num_warps=4
        )
    return QuantizedKeys(values, scale, tokens)


def quantize_keys(k: Tensor, *, mean: Tensor | None = None) -> QuantizedKeys:
    """Round keys to int8 after subtracting what a head's keys share.

    Args:
        k: [B, T, N, D], channels adjacent; float32, bfloat16 or float16; D 64 or 128.
        mean: [B, N, D] fp32, contiguous, on k's device: what is subtracted. Any vector is exact; one near the mean over
            the tokens rounds best. `sampled_mean(k)` where None.

    Returns:
        The rounded keys. k is not written to.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.
    """
    check_heads(k, "k")
    mean = sampled_mean(k) if mean is None else mean
    batch, _, heads, dim = k.shape
    require(mean.shape == (batch, heads, dim), f"mean: must be {(batch, heads, dim)} for this k", tuple(mean.shape))
    require(mean.dtype == torch.float32, "mean: must be float32", mean.dtype)
    require(mean.is_contiguous(), "mean: must be contiguous", f"strides {mean.stride()}")
    require(mean.device == k.device, f"mean: must be on {k.device}, like k", mean.device)
    run = quantize_keys_triton if runs_triton(k) else quantize_keys_reference
    return run(k, mean)
