"""Queries made ready for 8-bit attention: RMS norm over all heads, rotary embedding, int8 with a scale per head.

    q                  = as in rms_norm_rope.py, in fp32
    absmax[b, t, n]    = max_d |q[b, t, n, d]|
    values[b, t, n, d] = round(q[b, t, n, d] * 127 / absmax)
    scale[b, t, n]     = absmax / 127 * softmax_scale * log2(e)          see quantize_queries.py

Grid       (B * T,), one program per token.
Tile       a token in registers, in two parts of a power of two heads each (see _tiles.py); 4 <= C <= 8192. Pairs lie in
           one thread, a head in 8 or 16 lanes of one warp.
Numerics   as in rms_norm_rope.py, but for the last: q is not rounded to 16 bits before it is rounded to int8, half to
           even and never -128. A head of zeros stays zero. See _quantized.py.
Traffic    B*T*C elements of x and 8 bytes per token and pair of one head read, B*T*C bytes and a scale for every D
           written; bandwidth-bound.
Reference  rms_norm_rope_quantize_reference, below.
Source     Wan-Video/Wan2.2, wan/modules/model.py, WanSelfAttention.forward; SageAttention (Zhang et al., 2024).
"""

from math import e, log2

import torch
from torch import Tensor

from ._checks import require
from ._heads import HEAD_DIMS
from ._launch import on_device_of, runs_triton, tl, triton
from ._quantized import quantize_reference, round_8bit, scale_of
from ._rope import check_turned, head_dim_of, normed, row_strides, turned, turned_reference
from ._tiles import row_tile
from .quantize_queries import QuantizedQueries


def rms_norm_rope_quantize_reference(
    x: Tensor, weight: Tensor, rotations: Tensor, out: QuantizedQueries, *, eps: float, softmax_scale: float
) -> QuantizedQueries:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    quantized = quantize_reference(turned_reference(x, weight, rotations, eps=eps), torch.int8)
    out.values.copy_(quantized.values)
    torch.mul(quantized.scale[..., 0], softmax_scale * log2(e), out=out.scale)
    return out


@triton.jit
def _store_heads(
    y,  # [N * D] fp32: N heads of a token
    values_ptr,  # where the first goes
    scale_ptr,  # where its scale goes
    factor,
    heads,  # of the N, those that the token has
    D: tl.constexpr,
):
    N: tl.constexpr = y.shape[0] // D
    n = tl.arange(0, N)
    y = tl.reshape(y, (N, D))
    scale, inverse = scale_of(tl.max(tl.abs(y), 1), tl.int8)
    values = round_8bit(y * inverse[:, None], tl.int8)
    at = n[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(values_ptr + at, values, mask=(n < heads)[:, None])
    tl.store(scale_ptr + n, scale * factor, mask=n < heads)


@triton.jit(do_not_specialize=["T"])
def _rms_norm_rope_quantize_kernel(
    x_ptr,  # [B, T, C], channels adjacent
    weight_ptr,  # [C], contiguous
    rotations_ptr,  # [T, D] fp32, contiguous: cos and sin of a head's pairs in turn
    values_ptr,  # [B, T, C] int8, channels adjacent
    scale_ptr,  # [B, T, C / D] fp32, heads adjacent
    T,
    x_stride_b,
    x_stride_t,
    values_stride_b,
    values_stride_t,
    scale_stride_b,
    scale_stride_t,
    eps,
    factor,  # softmax_scale * log2(e)
    C: tl.constexpr,
    D: tl.constexpr,  # channels of one head, a power of two
    HEAD: tl.constexpr,  # power of two, whole heads, at most C
    TAIL: tl.constexpr,  # power of two, whole heads, HEAD + TAIL at least C
):
    token = tl.program_id(0).to(tl.int64)  # b * T + t
    b, t = token // T, token % T
    x_row = x_ptr + b * x_stride_b + t * x_stride_t
    values_row = values_ptr + b * values_stride_b + t * values_stride_t
    scale_row = scale_ptr + b * scale_stride_b + t * scale_stride_t
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
    _store_heads(y_head, values_row, scale_row, factor, HEAD // D, D)
    _store_heads(y_tail, values_row + HEAD, scale_row + HEAD // D, factor, (C - HEAD) // D, D)


def rms_norm_rope_quantize_triton(
    x: Tensor, weight: Tensor, rotations: Tensor, out: QuantizedQueries, *, eps: float, softmax_scale: float
) -> QuantizedQueries:
    """Launch the kernel on checked arguments."""
    batch, tokens, channels = x.shape
    head_dim = head_dim_of(rotations)
    heads = row_tile(channels // head_dim)
    with on_device_of(x):
        _rms_norm_rope_quantize_kernel[(batch * tokens,)](
            x,
            weight,
            torch.view_as_real(rotations),
            out.values,
            out.scale,
            tokens,
            *row_strides(x),
            *row_strides(out.values),
            *row_strides(out.scale),
            eps,
            softmax_scale * log2(e),
            C=channels,
            D=head_dim,
            HEAD=heads.head * head_dim,
            TAIL=heads.tail * head_dim,
            num_warps=row_tile(channels).num_warps,
        )
    return out


def rms_norm_rope_quantize(
    x: Tensor,
    weight: Tensor,
    rotations: Tensor,
    *,
    eps: float,
    softmax_scale: float | None = None,
    out: QuantizedQueries | None = None,
) -> QuantizedQueries:
    """Normalise queries over all heads together, turn their channel pairs, and round each head to int8.

    Args:
        x: [B, T, C], channels adjacent; float32, bfloat16 or float16; C <= 8192. A slice of a projection to queries,
            keys and values together is fine. Not written to.
        weight: [C], contiguous, any of those dtypes, on x's device.
        rotations: [T, D / 2] complex64, contiguous, from `wanfast.rope.rope_rotations`, on x's device; C = N * D, D is
            64 or 128.
        eps: added to the mean square, in units of x squared.
        softmax_scale: factor of q . k under the softmax, which the scales take up; 1 / sqrt(D) where None.
        out: takes the result: values [B, T, N, D] with the heads of a token adjacent, scale [B, T, N] with heads
            adjacent; tokens and samples may lie apart.

    Returns:
        `out`, or fresh contiguous queries in 8 bits.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.
    """
    check_turned(x, weight, rotations)
    head_dim = head_dim_of(rotations)
    require(head_dim in HEAD_DIMS, "rotations: head dimension D must be 64 or 128", head_dim)
    shape = (*x.shape[:2], x.shape[-1] // head_dim, head_dim)
    if out is None:
        values = torch.empty(shape, dtype=torch.int8, device=x.device)
        out = QuantizedQueries(values, torch.empty(shape[:-1], dtype=torch.float32, device=x.device))
    for name, tensor, want, dtype in (
        ("out.values", out.values, shape, torch.int8),
        ("out.scale", out.scale, shape[:-1], torch.float32),
    ):
        require(tuple(tensor.shape) == want, f"{name}: must be {want}", tuple(tensor.shape))
        require(tensor.dtype == dtype, f"{name}: must be {dtype}", tensor.dtype)
        require(tensor[:1, :1].is_contiguous(), f"{name}: a token must be contiguous", f"strides {tensor.stride()}")
        require(tensor.device == x.device, f"{name}: must be on {x.device}, like x", tensor.device)
    softmax_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    run = rms_norm_rope_quantize_triton if runs_triton(x) else rms_norm_rope_quantize_reference
    return run(x, weight, rotations, out, eps=eps, softmax_scale=softmax_scale)
