"""Causal 3D convolution in 16 bits, channels last, with bias, residual, and the norm and SiLU that follow.

    y[b, t, h, w, o] = bias[o] + residual[b, t, h, w, o]
                       + sum_{i, j, l, c} weight[i, j, l, c, o] * frames[b, s_t t + i, s h + j - p, s w + l - p, c]
    and where there is a norm     n = y / max(|y|, 1e-12) * norm,   y = n * sigmoid(n)        |y| over the channels

where `frames` is the history, zeros where that is short, followed by the chunk x, and rows and columns outside the
picture are zero. Strides and doublings: _conv_forms.py.

It is a matrix product of pixels by taps and channels that never forms its left matrix: a step loads the channels of
one tap from where chunk or history lie, and masks make the zeros. Nothing is joined, padded or cloned.

The norm and SiLU before a convolution are a pass of their own, or the end of the convolution before. In the loads of
this one, each of 27 taps would take 2 special functions a channel: a third of the products' time, and loads could not
go to shared memory without passing registers. As a pass it is 4 bytes of DRAM for each number, a tenth of that time at
96 channels and less at more, and nothing at the end of the convolution before, where a program has all channels of a
pixel (up to 256).

Grid       (tiles of a frame's pixels and outputs, the frames of a tile side by side; B; phases).
Tile       64 to 128 pixels of one frame x up to 256 outputs in one to three accumulators, 16 to 64 channels per step.
Numerics   products of 16 bits summed in fp32, or 32 to 64 at a time in fp16, twice as fast on Ada; rounded once.
Traffic    x about once, as the frames of a tile run together, weights from L2; compute-bound.
Reference  causal_conv3d_reference, in _conv_forms.py.
Source     Wan-Video/Wan2.2, wan/modules/vae2_1.py, CausalConv3d.
"""

from typing import Any

import torch
from torch import Tensor

from ._checks import require
from ._conv_checks import check_ends, check_frames
from ._conv_forms import FORMS, PackedConv, causal_conv3d_reference
from ._conv_tiles import arch_of, conv_tile
from ._launch import on_device_of, runs_triton, tl, triton
from .rms_norm_silu import SMALLEST_ON_DEVICE, rms_norm_silu_triton, silu

SIXTEEN_BIT = (torch.float16, torch.bfloat16)


@triton.jit
def _is_inside(row, column, height, width, SIDE: tl.constexpr):  # -> bit i * SIDE + j: of row + i and column + j
    inside = tl.zeros_like(row)
    for i in tl.static_range(SIDE):
        for j in tl.static_range(SIDE):
            there = (row + i >= 0) & (row + i < height) & (column + j >= 0) & (column + j < width)
            inside |= there.to(tl.int32) << (i * SIDE + j)
    return inside


@triton.jit
def _step(a, w, total, FP16_SUMS: tl.constexpr):
    if FP16_SUMS:
        return total + tl.dot(a, w, out_dtype=tl.float16).to(tl.float32)
    else:
        return tl.dot(a, w, total)


@triton.jit
def _finish(
    y,  # [BLOCK_M, WIDTH] fp32: the sums
    bias_ptr,  # [N], or None
    residual_at,  # [BLOCK_M, WIDTH] pointers, or None
    n,  # [WIDTH]: outputs
    live,  # [BLOCK_M, WIDTH]
    N: tl.constexpr,
):  # -> with bias and residual; zeros where the outputs end
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if residual_at is not None:
        y += tl.load(residual_at, mask=live, other=0.0).to(tl.float32)
    return y


@triton.jit
def _norm_silu(
    y,  # [BLOCK_M, WIDTH] fp32
    square,  # [BLOCK_M]: sums over all outputs
    norm_ptr,  # [N]
    n,  # [WIDTH]
    N: tl.constexpr,
):
    scale = 1.0 / tl.maximum(tl.sqrt(square), SMALLEST_ON_DEVICE)
    return silu(y * scale[:, None] * tl.load(norm_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :])


@triton.jit
def _place(
    pixel,  # [BLOCK_M]: of y's frame 0
    live_pixel,  # [BLOCK_M]
    frame_pixels,  # of one frame of y
    n,  # [WIDTH]
    N: tl.constexpr,
    GROUPS: tl.constexpr,
):  # -> where the numbers of y lie, counted from y's frame 0, and which are there
    live = live_pixel[:, None] & (n < N)[None, :]
    if GROUPS == 1:
        return (pixel * N)[:, None] + n[None, :], live
    else:
        group: tl.constexpr = N // GROUPS
        return ((pixel * group)[:, None] + (n % group)[None, :]) + (n // group)[None, :] * (frame_pixels * group), live


@triton.jit(do_not_specialize=["seen", "height", "width", "frames"])
def _causal_conv3d_kernel(
    x_ptr,  # [B, T, H, W, C]; samples x_stride_b apart, all else contiguous
    history_ptr,  # [B, seen, H, W, C] likewise; anything where seen is 0
    weight_ptr,  # [phases, KT * SIDE * SIDE, C_PACKED, N_PACKED]
    bias_ptr,  # [N], or None
    residual_ptr,  # like y, or None
    norm_ptr,  # [N], or None
    y_ptr,  # [B, GROUPS * frames, GROWN * H / STRIDE, GROWN * W / STRIDE, N / GROUPS]; may be the residual
    x_stride_b,
    history_stride_b,
    seen,
    height,
    width,
    frames,  # of a group of y's
    C: tl.constexpr,
    N: tl.constexpr,
    C_PACKED: tl.constexpr,
    N_PACKED: tl.constexpr,
    KT: tl.constexpr,
    SIDE: tl.constexpr,
    STRIDE_T: tl.constexpr,
    STRIDE: tl.constexpr,
    LEAD_T: tl.constexpr,
    LEAD: tl.constexpr,
    GROUPS: tl.constexpr,
    GROWN: tl.constexpr,  # 2 with a phase for each parity of row and column, otherwise 1
    FP16_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,  # 1 to 3
    BLOCK_K: tl.constexpr,  # divides C_PACKED
):
    columns: tl.constexpr = WIDTH * PARTS  # divides N_PACKED
    tiles_n: tl.constexpr = N_PACKED // columns
    steps: tl.constexpr = C_PACKED // BLOCK_K  # of one tap
    tile = tl.program_id(0)
    t = tile // tiles_n % frames
    b = tl.program_id(1).to(tl.int64)
    phase = tl.program_id(2)
    phase_row = phase // 2
    phase_column = phase % 2

    y_height = height // STRIDE
    y_width = width // STRIDE
    m = tile // (tiles_n * frames) * BLOCK_M + tl.arange(0, BLOCK_M)
    live_pixel = m < y_height * y_width
    y_row = m // y_width
    y_column = m % y_width
    row = tl.where(live_pixel, y_row * STRIDE - LEAD + phase_row, height)  # dead ones lie below the picture
    column = y_column * STRIDE - LEAD + phase_column
    inside = _is_inside(row, column, height, width, SIDE)  # a number for a pixel: registers are scarce in the loop
    k = tl.arange(0, BLOCK_K)
    x_number = ((row * width + column) * C)[:, None] + k[None, :]
    n = tile % tiles_n * columns + tl.arange(0, WIDTH)

    frame_size = height.to(tl.int64) * width * C
    x_at = x_ptr + b * x_stride_b
    history_at = history_ptr + b * history_stride_b + seen * frame_size  # behind its last frame
    first = tl.maximum(LEAD_T - seen - t * STRIDE_T, 0) * (SIDE * SIDE * steps)  # taps on what was before are zero
    w_at = weight_ptr + phase * (KT * SIDE * SIDE * C_PACKED * N_PACKED)
    w_at += (first * BLOCK_K + k)[:, None] * N_PACKED + n[None, :]

    y0 = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    y1 = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    y2 = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for step in range(first, KT * SIDE * SIDE * steps):
        tap = step // steps
        c = step % steps * BLOCK_K
        frame = t * STRIDE_T + tap // (SIDE * SIDE) - LEAD_T
        shift = tap // SIDE % SIDE * width + tap % SIDE
        tap_at = tl.where(frame < 0, history_at, x_at) + (frame * frame_size + shift * C + c)
        live = (inside & (1 << tap % (SIDE * SIDE)) != 0)[:, None]
        live = live & (c + k < C)[None, :] if C < C_PACKED else live
        a = tl.load(tap_at + x_number, mask=live, other=0.0)
        y0 = _step(a, tl.load(w_at), y0, FP16_SUMS)  # in bounds: weights are padded to whole steps and tiles
        if PARTS > 1:
            y1 = _step(a, tl.load(w_at + WIDTH), y1, FP16_SUMS)  # in bounds: as before
        if PARTS > 2:
            y2 = _step(a, tl.load(w_at + 2 * WIDTH), y2, FP16_SUMS)  # in bounds: as before
        w_at += BLOCK_K * N_PACKED

    pixel = m
    if GROWN > 1:
        pixel = (y_row * GROWN + phase_row) * (y_width * GROWN) + y_column * GROWN + phase_column
    frame_pixels = y_height * y_width * (GROWN * GROWN)
    first_number = (b * frames + t) * frame_pixels * N  # N: of all groups
    y_at = y_ptr + first_number
    at0, live0 = _place(pixel, live_pixel, frame_pixels, n, N, GROUPS)
    at1, live1 = _place(pixel, live_pixel, frame_pixels, n + WIDTH, N, GROUPS)
    at2, live2 = _place(pixel, live_pixel, frame_pixels, n + 2 * WIDTH, N, GROUPS)
    before = None if residual_ptr is None else residual_ptr + first_number
    y0 = _finish(y0, bias_ptr, None if before is None else before + at0, n, live0, N)
    if norm_ptr is None:  # one part after the other: a store keeps the next residual out of the registers
        tl.store(y_at + at0, y0, mask=live0)
    if PARTS > 1:
        y1 = _finish(y1, bias_ptr, None if before is None else before + at1, n + WIDTH, live1, N)
        if norm_ptr is None:
            tl.store(y_at + at1, y1, mask=live1)
    if PARTS > 2:
        y2 = _finish(y2, bias_ptr, None if before is None else before + at2, n + 2 * WIDTH, live2, N)
        if norm_ptr is None:
            tl.store(y_at + at2, y2, mask=live2)
    if norm_ptr is not None:
        square = tl.sum(y0 * y0, 1) + tl.sum(y1 * y1, 1) + tl.sum(y2 * y2, 1)
        tl.store(y_at + at0, _norm_silu(y0, square, norm_ptr, n, N), mask=live0)
        if PARTS > 1:
            tl.store(y_at + at1, _norm_silu(y1, square, norm_ptr, n + WIDTH, N), mask=live1)
        if PARTS > 2:
            tl.store(y_at + at2, _norm_silu(y2, square, norm_ptr, n + 2 * WIDTH, N), mask=live2)


def fuses_norm(weight: PackedConv) -> bool:
    """Whether a program has all outputs of a pixel, and so can normalise them before it stores them."""
    tile = conv_tile(weight.channels, weight.out_channels, arch_of(weight.data.device))
    return weight.data.shape[-1] == tile.columns and FORMS[weight.form].groups == 1


def causal_conv3d_triton(
    x: Tensor,
    history: Tensor | None,
    weight: PackedConv,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    overwrite_residual: bool = False,
    fp16_sums: bool = False,
) -> Tensor:
    """Launch the kernel on checked arguments, and that of the norm where this one cannot end with it."""
    form = FORMS[weight.form]
    shape = weight.out_shape(x)
    if residual is not None and overwrite_residual:
        y = residual
    else:
        y = torch.empty((shape[0], *shape[2:], shape[1]), dtype=x.dtype, device=x.device).movedim(-1, 1)
    tile = conv_tile(weight.channels, weight.out_channels, arch_of(x.device), fp16_sums=fp16_sums)
    seen = 0 if history is None else history.shape[2]
    frames, pixels = shape[2] // form.groups, shape[3] * shape[4] // form.phases
    tiles = -(-pixels // tile.rows) * frames * (weight.data.shape[-1] // tile.columns)
    is_fused = norm is not None and fuses_norm(weight)
    with on_device_of(x):
        _causal_conv3d_kernel[(tiles, shape[0], form.phases)](
            x,
            history if seen else x,
            weight.data,
            bias,
            residual,
            norm if is_fused else None,
            y,
            x.stride(0),
            history.stride(0) if history is not None and seen else 0,
            seen,
            *x.shape[3:],
            frames,
            **launch_constants(weight),
            FP16_SUMS=fp16_sums,
            **tile.constants(),
        )
    if norm is not None and not is_fused:
        y = rms_norm_silu_triton(y, norm, overwrite=True)
    return y


def launch_constants(weight: PackedConv) -> dict[str, Any]:
    """What a launch takes of a convolution, by the kernel's names."""
    form = FORMS[weight.form]
    return {
        "C": weight.channels,
        "N": weight.out_channels,
        "C_PACKED": weight.data.shape[-2],
        "N_PACKED": weight.data.shape[-1],
        "KT": weight.kt,
        "SIDE": weight.side,
        "STRIDE_T": form.stride_frames,
        "STRIDE": form.stride_picture,
        "LEAD_T": weight.lead_frames,
        "LEAD": weight.lead,
        "GROUPS": form.groups,
        "GROWN": 2 if form.doubles_picture else 1,
    }


def runs_causal_conv3d(x: Tensor) -> bool:
    """Whether `causal_conv3d` launches its kernel for frames or weights like this tensor."""
    return runs_triton(x) and x.dtype in SIXTEEN_BIT


def causal_conv3d(
    x: Tensor,
    history: Tensor | None,
    weight: PackedConv,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    overwrite_residual: bool = False,
    fp16_sums: bool = False,
) -> Tensor:
    """Convolve one chunk of frames, seeing the frames before it and none after.

    Args:
        x: [B, C, T, H, W], channels last in memory, a run of frames of such a tensor too; float16 or bfloat16 on a GPU.
        history: [B, C, h, H, W] likewise, the frames just before x, h at most `weight.lead_frames`; those that are
            missing are zeros. None is h = 0.
        weight: of `pack_conv`, in x's dtype, on x's device.
        bias: [O], contiguous, in x's dtype, or None.
        residual: added to the sum: of the result's shape and dtype, channels last, or None.
        norm: [O] times sqrt(O), contiguous, in x's dtype: the result goes through the RMS norm over channels with this
            weight, and SiLU. None: it does not.
        overwrite_residual: return the result in the residual's memory.
        fp16_sums: sum the products of each step in fp16, and the steps in fp32; faster on Ada. Sums of 32 or 64
            products must stay below 65,504.

    Returns:
        [B, O, T', H', W'], `weight.out_shape(x)`, channels last. x and history are not written to.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.
    """
    check_frames(x, history, weight)
    check_ends(x, weight, bias, residual, norm)
    if not runs_triton(x):
        return causal_conv3d_reference(
            x, history, weight, bias, residual=residual, norm=norm, overwrite_residual=overwrite_residual
        )
    require(x.dtype in SIXTEEN_BIT, "x: must be float16 or bfloat16 on a GPU", x.dtype)
    return causal_conv3d_triton(
        x,
        history,
        weight,
        bias,
        residual=residual,
        norm=norm,
        overwrite_residual=overwrite_residual,
        fp16_sums=fp16_sums,
    )
