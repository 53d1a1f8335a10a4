"""Keys made ready for 8-bit attention in one pass: RMS norm over all heads, rotary embedding, less a vector, int8.

    k       = as in rms_norm_rope.py, in fp32
    values, scale = k - mean, rounded as in quantize_keys.py

Grid       (4 * ceil(T / 64), B), one program per group of 16 tokens that share their scales.
Tile       16 tokens x HEADS heads, in turn: once over all heads for the mean squares, and once more to write them. What
           the second turn reads, 160 KB at 40 heads, the first has just brought into the L2 cache; two programs of
           8 warps on a multiprocessor keep less there than it holds.
Numerics   as in rms_norm_rope.py, but for the last: k is not rounded to 16 bits before it is rounded to int8, half to
           even and never -128. A group of zeros stays zero, and so do places past the last token. See _quantized.py.
Traffic    B*T*C elements of x and 8 bytes per token and pair of one head read, B*T*C bytes and four scales per 64
           tokens and head written; bandwidth-bound.
Reference  rms_norm_rope_quantize_keys_reference, below.
Source     Wan-Video/Wan2.2, wan/modules/model.py, WanSelfAttention.forward; SageAttention (Zhang et al., 2024).
"""

import torch
from torch import Tensor

from ._checks import require
from ._heads import HEAD_DIMS
from ._launch import on_device_of, runs_triton, tl, triton
from ._quantized import round_8bit, scale_of
from ._rope import check_turned, head_dim_of, normed, row_strides, turned, turned_reference
from .quantize_keys import (
    KEY_BLOCK,
    KEY_GROUPS,
    QuantizedKeys,
    check_mean,
    empty_keys,
    quantize_centred_reference,
)

GROUP_TOKENS = KEY_BLOCK // KEY_GROUPS
_GROUPS = tl.constexpr(KEY_GROUPS)
_BLOCK = tl.constexpr(KEY_BLOCK)
_MOST_HEADS = 4  # of one turn: 32 channels a thread, which leaves two programs the registers they need


def rms_norm_rope_quantize_keys_reference(
    x: Tensor, weight: Tensor, rotations: Tensor, mean: Tensor, out: QuantizedKeys, *, eps: float, first_block: int
) -> QuantizedKeys:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    centred = turned_reference(x, weight, rotations, eps=eps).sub_(mean[:, None])
    some = quantize_centred_reference(centred)
    blocks = slice(first_block, first_block + some.scale.shape[2])
    out.values[:, :, blocks] = some.values
    out.scale[:, :, blocks] = some.scale
    return out


@triton.jit(do_not_specialize=["T", "first_block", "blocks"])
def _rms_norm_rope_quantize_keys_kernel(
    x_ptr,  # [B, T, N * D], channels adjacent
    weight_ptr,  # [N * D], contiguous
    rotations_ptr,  # [T, D] fp32, contiguous: cos and sin of a head's pairs in turn
    mean_ptr,  # [B, N, D], contiguous
    values_ptr,  # [B, N, blocks, 64, D] int8, contiguous
    scale_ptr,  # [B, N, blocks, 4], contiguous
    T,
    first_block,  # that the tokens of x are written to
    blocks,
    x_stride_b,
    x_stride_t,
    eps,
    N: tl.constexpr,
    D: tl.constexpr,  # channels of one head, a power of two
    HEADS: tl.constexpr,  # of one turn: a power of two, a divisor of N
    TOKENS: tl.constexpr,  # of a group
):
    WIDTH: tl.constexpr = HEADS * D
    b = tl.program_id(1).to(tl.int64)
    block = (tl.program_id(0) // _GROUPS).to(tl.int64)
    group = tl.program_id(0) % _GROUPS
    r = tl.arange(0, TOKENS)
    place = r // 2 * (2 * _GROUPS) + group * 2 + r % 2  # in the block
    t = block * _BLOCK + place
    live = (t < T)[:, None]
    c = tl.arange(0, WIDTH)
    x_row = x_ptr + b * x_stride_b + t[:, None] * x_stride_t + c[None, :]

    squares = tl.zeros([TOKENS, WIDTH], tl.float32)
    for first in range(0, N * D, WIDTH):
        x = tl.load(x_row + first, mask=live, other=0.0).to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, 1) / (N * D) + eps)[:, None]

    rotation = tl.load(rotations_ptr + t[:, None] * D + (c % D)[None, :], mask=live, other=0.0)
    rotation = tl.reshape(rotation, (TOKENS * WIDTH,))
    row = b * N * blocks + first_block + block  # of the block in head 0
    of_head = blocks * _BLOCK * D  # at most 2^31 / HEADS: a block of attention's keys is at a 32-bit place
    values_at = values_ptr + row * (_BLOCK * D) + ((c // D * of_head + c % D)[None, :] + place[:, None] * D)
    scale_at = scale_ptr + row * _GROUPS + group + tl.arange(0, HEADS) * (blocks * _GROUPS)
    for n in range(0, N, HEADS):
        x = tl.load(x_row + n * D, mask=live, other=0.0)
        weight = tl.load(weight_ptr + n * D + c)  # in bounds: HEADS divides N
        mean = tl.load(mean_ptr + (b * N + n) * D + c)  # in bounds: HEADS divides N
        y = tl.reshape(normed(x, rstd, weight[None, :]), (TOKENS * WIDTH,))
        y = tl.reshape(turned(y, rotation), (TOKENS, WIDTH))
        y = tl.where(live, y - mean[None, :], 0.0)  # dead lanes must not reach the scale
        absmax = tl.max(tl.max(tl.reshape(tl.abs(y), (TOKENS, HEADS, D)), 2), 0)
        scale, inverse = scale_of(absmax, tl.int8)
        each = tl.reshape(tl.broadcast_to(inverse[:, None], (HEADS, D)), (WIDTH,))
        values = round_8bit(y * each[None, :], tl.int8)
        to_head = blocks.to(tl.int64) * n
        tl.store(values_at + to_head * (_BLOCK * D), values)  # in bounds: blocks are whole
        tl.store(scale_at + to_head * _GROUPS, scale)  # in bounds: the group's scale in each head


def heads_at_once(heads: int) -> int:
    """How many heads a turn takes: a power of two that divides their number."""
    return min(_MOST_HEADS, heads & -heads)


def rms_norm_rope_quantize_keys_triton(
    x: Tensor, weight: Tensor, rotations: Tensor, mean: Tensor, out: QuantizedKeys, *, eps: float, first_block: int
) -> QuantizedKeys:
    """Launch the kernel on checked arguments."""
    batch, tokens, _ = x.shape
    heads, blocks, _, head_dim = out.values.shape[1:]
    together = heads_at_once(heads)
    with on_device_of(x):
        _rms_norm_rope_quantize_keys_kernel[(triton.cdiv(tokens, KEY_BLOCK) * KEY_GROUPS, batch)](
            x,
            weight,
            torch.view_as_real(rotations),
            mean,
            out.values,
            out.scale,
            tokens,
            first_block,
            blocks,
            *row_strides(x),
            eps,
            N=heads,
            D=head_dim,
            HEADS=together,
            TOKENS=GROUP_TOKENS,
            num_warps=num_warps(together * head_dim),
        )
    return out


def num_warps(width: int) -> int:
    """Launch parameter: a thread holds 32 channels of a turn, or 8 where it is narrow."""
    return 8 if width >= 256 else 4


def rms_norm_rope_quantize_keys(
    x: Tensor,
    weight: Tensor,
    rotations: Tensor,
    mean: Tensor,
    *,
    eps: float,
    out: QuantizedKeys | None = None,
    first_token: int = 0,
) -> QuantizedKeys:
    """Normalise keys over all heads together, turn their channel pairs, and round them to int8 less a vector.

    Args:
        x: [B, T, C], channels adjacent; float32, bfloat16 or float16; C <= 8192. A slice of a projection to queries and
            keys together is fine. Not written to.
        weight: [C], contiguous, any of those dtypes, on x's device.
        rotations: [T, D / 2] complex64, contiguous, from `wanfast.rope.rope_rotations`, on x's device; C = N * D, D is
            64 or 128.
        mean: [B, N, D] fp32, contiguous, on x's device: what is subtracted from all keys of a head. Any vector is
            exact; one near the mean of the turned keys rounds best. It has to be the same for all tokens of `out`.
        eps: added to the mean square, in units of x squared.
        out: takes the result: keys of at least first_token + T tokens, of which these become [first_token, ... + T).
        first_token: a multiple of 64. Where more tokens follow in `out`, T is one too: what shares a scale is
            rounded together.

    Returns:
        `out`, or fresh keys in 8 bits.

    Raises:
        ValueError: a shape, dtype, stride, device or number is not as above.
    """
    check_turned(x, weight, rotations)
    head_dim = head_dim_of(rotations)
    require(head_dim in HEAD_DIMS, "rotations: head dimension D must be 64 or 128", head_dim)
    batch, tokens, channels = x.shape
    heads = channels // head_dim
    check_mean(mean, x, "x", (batch, heads, head_dim))
    if out is None:
        out = empty_keys((batch, first_token + tokens, heads, head_dim), x.device)
    _check_out(out, x, heads, head_dim)
    is_right = first_token >= 0 and first_token % KEY_BLOCK == 0
    require(is_right, f"first_token: must be a multiple of {KEY_BLOCK}", first_token)
    end = first_token + tokens
    fits = end == out.tokens or (end < out.tokens and tokens % KEY_BLOCK == 0)
    require(fits, f"x: must end with out's tokens, {out.tokens}, or before at a multiple of {KEY_BLOCK}", end)
    run = rms_norm_rope_quantize_keys_triton if runs_triton(x) else rms_norm_rope_quantize_keys_reference
    return run(x, weight, rotations, mean, out, eps=eps, first_block=first_token // KEY_BLOCK)


def _check_out(out: QuantizedKeys, x: Tensor, heads: int, head_dim: int) -> None:
    blocks = -(-out.tokens // KEY_BLOCK)
    for name, tensor, shape, dtype in (
        ("out.values", out.values, (x.shape[0], heads, blocks, KEY_BLOCK, head_dim), torch.int8),
        ("out.scale", out.scale, (x.shape[0], heads, blocks, KEY_GROUPS), torch.float32),
    ):
        require(tuple(tensor.shape) == shape, f"{name}: must be {shape}", tuple(tensor.shape))
        require(tensor.dtype == dtype, f"{name}: must be {dtype}", tensor.dtype)
        require(tensor.is_contiguous(), f"{name}: must be contiguous", f"strides {tensor.stride()}")
        require(tensor.device == x.device, f"{name}: must be on {x.device}, like x", tensor.device)
