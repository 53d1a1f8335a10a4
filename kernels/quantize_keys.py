"""Keys for 8-bit attention: less a vector per head, int8 with a scale per 16 tokens and head.

    centred[b, t, n, :] = k[b, t, n, :] - mean[b, n, :]
    absmax[b, n, j, g] = max |centred[b, t, n, d]| over d and the tokens t of block j with t % 8 // 2 = g
    values = round(centred * 127 / absmax),  scale = absmax / 127

Subtracting any vector from all keys of a head adds the same number to all scores of a query, which softmax does not
see: the result is exact whatever the vector. Wan's keys share large channels, and what they share takes up most of an
int8 that is not rid of it. The vector here is the mean of 251 tokens, those at floor(i T / 251): near enough to the
mean of all to leave much the same absmax (a sixteenth of a deviation away). 251 is prime, so that the sample meets all
frames, rows and columns of a picture equally often. A caller who has a mean at hand gives it.

Groups     a block of 64 tokens has four scales. Those that share one are the 16 whose scores a thread holds after
           q . k on tensor cores, so that attention has one scale of keys per thread and block, and no more to multiply.
Grid       (ceil(T / 64), N, B), one program per block of keys of a head.
Tile       64 x D in registers.
Numerics   fp32, rounded half to even, never -128; a block of zeros stays zero. See _quantized.py.
Layout     by head and block, so that attention reads a block of keys as one run of 64 * D bytes, and addresses in its
           loop are constants. Places past the last token hold zeros.
Traffic    B*T*N*D elements of k read, as many bytes written; and 251 tokens for the mean. Bandwidth-bound.
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

KEY_BLOCK = 64  # tokens that are stored together
KEY_GROUPS = 4  # of a block, each with a scale
SAMPLED = 251  # tokens that the mean reads, a prime; shorter sequences are read whole
_PAIRS = tl.constexpr(KEY_BLOCK // KEY_GROUPS // 2)  # of adjacent tokens in a group
_GROUPS = tl.constexpr(KEY_GROUPS)


@dataclass(frozen=True, slots=True)
class QuantizedKeys:
    """Keys in 8 bits: k less a vector per head ~ values * scale."""

    values: Tensor  # [B, N, ceil(T / 64), 64, D], int8, contiguous; 0 past the last token
    scale: Tensor  # [B, N, ceil(T / 64), 4], fp32, contiguous: of the tokens t with t % 8 // 2 = 0 to 3
    tokens: int  # T

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Values [B, T, N, D], as they lie in memory, and a scale for each of their rows [B, T, N], contiguous."""
        values = self.values.flatten(2, 3)[:, :, : self.tokens].transpose(1, 2)
        scale = self.scale[:, :, :, None, :, None].expand(-1, -1, -1, KEY_BLOCK // (2 * KEY_GROUPS), -1, 2)
        return values, scale.flatten(2)[:, :, : self.tokens].transpose(1, 2).contiguous()


def sampled_tokens(tokens: int, device: torch.device) -> Tensor:
    """Choose the tokens whose mean is subtracted: at most 251, in ascending order, int64."""
    count = min(tokens, SAMPLED)
    return torch.arange(count, device=device) * tokens // count


def sampled_mean(k: Tensor) -> Tensor:
    """Mean of the sampled tokens of k [B, T, N, D]: [B, N, D] fp32."""
    if k.shape[1] > SAMPLED:
        k = k[:, sampled_tokens(k.shape[1], k.device)]
    return k.mean(1, dtype=torch.float32)


def empty_keys(shape: tuple[int, int, int, int], device: torch.device) -> QuantizedKeys:
    """Make memory for the rounded keys of k of this shape [B, T, N, D]."""
    batch, tokens, heads, dim = shape
    blocks = -(-tokens // KEY_BLOCK)
    values = torch.empty((batch, heads, blocks, KEY_BLOCK, dim), dtype=torch.int8, device=device)
    scale = torch.empty((batch, heads, blocks, KEY_GROUPS), dtype=torch.float32, device=device)
    return QuantizedKeys(values, scale, tokens)


def quantize_centred_reference(centred: Tensor) -> QuantizedKeys:
    """Round keys [B, T, N, D] fp32 that are centred already, in plain torch."""
    tokens = centred.shape[1]
    blocks = F.pad(centred, (0, 0, 0, 0, 0, -tokens % KEY_BLOCK)).unflatten(1, (-1, KEY_BLOCK // 8, KEY_GROUPS, 2))
    groups = blocks.permute(0, 5, 1, 3, 2, 4, 6)  # [B, N, blocks, 4, 8, 2, D]
    quantized = quantize_reference(groups.flatten(-3), torch.int8)
    values = quantized.values.view(groups.shape).transpose(3, 4).flatten(3, 5)
    return QuantizedKeys(values, quantized.scale[..., 0], tokens)


def quantize_keys_reference(k: Tensor, mean: Tensor) -> QuantizedKeys:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    return quantize_centred_reference(k.float() - mean[:, None])


@triton.jit
def _group_scales(
    centred,  # [64, D] fp32, a block of keys
):  # -> (scales of its groups to store [4], what to multiply each key by before rounding [64])
    of_tokens = tl.reshape(tl.max(tl.abs(centred), 1), (_PAIRS, _GROUPS, 2))
    scale, inverse = scale_of(tl.max(tl.max(of_tokens, 2), 0), tl.int8)
    each = tl.broadcast_to(inverse[None, :, None], (_PAIRS, _GROUPS, 2))
    return scale, tl.reshape(each, (2 * _PAIRS * _GROUPS,))


@triton.jit(do_not_specialize=["T"])
def _quantize_keys_kernel(
    k_ptr,  # [B, T, N, D], channels adjacent
    mean_ptr,  # [B, N, D], contiguous
    values_ptr,  # [B, N, ceil(T / 64), 64, D], contiguous
    scale_ptr,  # [B, N, ceil(T / 64), 4], contiguous
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
    scale, inverse = _group_scales(centred)
    values = round_8bit(centred * inverse[:, None], tl.int8)
    at = (b * N + n) * tl.num_programs(0) + block
    place = at * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
    tl.store(values_ptr + place[:, None] * D + d[None, :], values)  # in bounds: one whole block per program
    tl.store(scale_ptr + at * _GROUPS + tl.arange(0, _GROUPS), scale)  # in bounds: four scales per program


def quantize_keys_triton(k: Tensor, mean: Tensor) -> QuantizedKeys:
    """Launch the kernel on checked arguments."""
    batch, tokens, heads, dim = k.shape
    out = empty_keys((batch, tokens, heads, dim), k.device)
    with on_device_of(k):
        _quantize_keys_kernel[(triton.cdiv(tokens, KEY_BLOCK), heads, batch)](
            k, mean, out.values, out.scale, tokens, heads, *k.stride()[:3], D=dim, KEY_BLOCK=KEY_BLOCK, num_warps=4
        )
    return out


def check_mean(mean: Tensor, keys: Tensor, name: str, shape: tuple[int, ...]) -> None:
    """Refuse what cannot be subtracted from keys, the argument `name`.

    Raises:
        ValueError: mean is not of this shape [B, N, D], fp32, contiguous and on the device of the keys.
    """
    require(mean.shape == shape, f"mean: must be {shape} for this {name}", tuple(mean.shape))
    require(mean.dtype == torch.float32, "mean: must be float32", mean.dtype)
    require(mean.is_contiguous(), "mean: must be contiguous", f"strides {mean.stride()}")
    require(mean.device == keys.device, f"mean: must be on {keys.device}, like {name}", mean.device)


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
    check_mean(mean, k, "k", (k.shape[0], *k.shape[2:]))
    run = quantize_keys_triton if runs_triton(k) else quantize_keys_reference
    return run(k, mean)
