"""Queries and keys made ready for attention: RMS norm over all heads together, then 3D rotary position embedding.

    n[b, t, :]              = round(x[b, t, :] * rsqrt(mean(x[b, t, :]^2) + eps)) * weight      round: to x's dtype
    y[b, t, h, 2j] + i y[b, t, h, 2j+1] = (n[b, t, h D + 2j] + i n[b, t, h D + 2j+1]) * rotations[t, j]

Grid       (B * T,), one program per token.
Tile       a token in registers, in two power-of-two parts (see _tiles.py); 4 <= C <= 8192. Pairs lie in one thread.
Numerics   mean square, scaling and rotation in fp32. Rounded to x's dtype before the weight and, where weight has that
           dtype too, after it; then on the store. The product of two bf16 numbers is bf16, as in torch.
Traffic    B*T*C elements of x read and B*T*C of y written, and a token's rotations, 8 bytes per pair of one head: 2.5%
           of the whole at 40 heads and 16 bits. Bandwidth-bound.
Reference  rms_norm_rope_reference, below.
Source     Wan-Video/Wan2.2, wan/modules/model.py, WanSelfAttention.forward, WanRMSNorm and rope_apply.
"""

import torch
from torch import Tensor

from ._checks import check_out_dtype
from ._launch import on_device_of, runs_triton, tl, triton
from ._rope import check_heads_out, check_turned, head_dim_of, normed, row_strides, turned, turned_reference
from ._tiles import row_tile


def rms_norm_rope_reference(x: Tensor, weight: Tensor, rotations: Tensor, out: Tensor, *, eps: float) -> Tensor:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    return out.copy_(turned_reference(x, weight, rotations, eps=eps))


@triton.jit(do_not_specialize=["T"])
def _rms_norm_rope_kernel(
    x_ptr,  # [B, T, C], channels adjacent
    weight_ptr,  # [C], contiguous
    rotations_ptr,  # [T, D] fp32, contiguous: cos and sin of a head's pairs in turn
    y_ptr,  # [B, T, C], channels adjacent
    T,
    x_stride_b,
    x_stride_t,
    y_stride_b,
    y_stride_t,
    eps,
    C: tl.constexpr,
    D: tl.constexpr,  # channels of one head, even
    HEAD: tl.constexpr,  # power of two, at most C
    TAIL: tl.constexpr,  # power of two, HEAD + TAIL at least C
):
    token = tl.program_id(0).to(tl.int64)  # b * T + t
    b, t = token // T, token % T
    x_row = x_ptr + b * x_stride_b + t * x_stride_t
    y_row = y_ptr + b * y_stride_b + t * y_stride_t
    rotation_row = rotations_ptr + t * D
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    live = tail < C

    x_head = tl.load(x_row + head)  # in bounds: HEAD <= C
    x_tail = tl.load(x_row + tail, mask=live, other=0.0)
    weight_head = tl.load(weight_ptr + head)  # in bounds: HEAD <= C
    weight_tail = tl.load(weight_ptr + tail, mask=live, other=0.0)
    rotation_head = tl.load(rotation_row + head % D)  # in bounds: below D
    rotation_tail = tl.load(rotation_row + tail % D)  # in bounds: below D

    wide_head, wide_tail = x_head.to(tl.float32), x_tail.to(tl.float32)
    square = tl.sum(wide_head * wide_head, 0) + tl.sum(wide_tail * wide_tail, 0)
    rstd = tl.rsqrt(square / C + eps)
    y_head = turned(normed(x_head, rstd, weight_head), rotation_head)
    y_tail = turned(normed(x_tail, rstd, weight_tail), rotation_tail)
    tl.store(y_row + head, y_head)  # in bounds: HEAD <= C
    tl.store(y_row + tail, y_tail, mask=live)


def rms_norm_rope_triton(x: Tensor, weight: Tensor, rotations: Tensor, out: Tensor, *, eps: float) -> Tensor:
    """Launch the kernel on checked arguments."""
    batch, tokens, channels = x.shape
    tile = row_tile(channels)
    with on_device_of(x):
        _rms_norm_rope_kernel[(batch * tokens,)](
            x,
            weight,
            torch.view_as_real(rotations),
            out,
            tokens,
            *row_strides(x),
            *row_strides(out),
            eps,
            C=channels,
            D=head_dim_of(rotations),
            HEAD=tile.head,
            TAIL=tile.tail,
            num_warps=tile.num_warps,
        )
    return out


def rms_norm_rope(
    x: Tensor,
    weight: Tensor,
    rotations: Tensor,
    *,
    eps: float,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalise queries or keys over all heads together, and turn each channel pair by its token's rotation.

    Args:
        x: [B, T, C], channels adjacent; float32, bfloat16 or float16; 4 <= C <= 8192. A slice of a projection to
            queries, keys and values together is fine. Not written to.
        weight: [C], contiguous, any of those dtypes, on x's device.
        rotations: [T, D / 2] complex64, contiguous, from `wanfast.rope.rope_rotations`, on x's device; C = N * D.
        eps: added to the mean square, in units of x squared.
        out: [B, T, N, D] of any of those dtypes that takes the result; the heads of a token are adjacent, tokens and
            samples may lie apart. It shares no memory with x.
        out_dtype: of the result where out is None; x's dtype where None.

    Returns:
        `out`, or [B, T, N, D] in out_dtype.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.
    """
    check_turned(x, weight, rotations)
    check_out_dtype(out_dtype)
    if out is None:
        head_dim = head_dim_of(rotations)
        shape = (*x.shape[:2], x.shape[-1] // head_dim, head_dim)
        out = torch.empty(shape, dtype=out_dtype or x.dtype, device=x.device)
    check_heads_out(x, rotations, out)
    run = rms_norm_rope_triton if runs_triton(x) else rms_norm_rope_reference
    return run(x, weight, rotations, out, eps=eps)
