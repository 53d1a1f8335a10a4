"""Causal 3D convolution of one chunk of frames: history in, history out.

    y[b, o, t, h, w] = bias[o] + sum over c, i, j, k of
                       weight[o, c, i, j, k] * frames[b, c, t + i, h + j - kh // 2, w + k - kw // 2]

where `frames` is kt - 1 earlier frames (`history`, zeros where there were none) followed by the chunk `x`,
and rows and columns outside the picture are zero.

Weights    call `prepare` once where a weight is loaded, on the device and in the dtype it will compute in, and keep
           what it returns; a plain tensor is accepted too, and laid out at every call.
Layout     tensors are logically [B, C, T, H, W]; both paths want their memory as `torch.channels_last_3d` and return
           it so. Other strides are converted at the cost of a copy: convert once where frames enter the VAE.
Paths      CPU, fp32, kernel sizes 1 and 3   csrc/causal_conv3d.cpp: chunk and history are read where they lie
           everything else                   torch (on a CPU with bf16 instructions its bf16 is at 90% of the peak)
Numerics   sums in fp32, in an order that depends neither on the threads nor on how frames are cut into chunks.
Source     Wan-Video/Wan2.2, wan/modules/vae2_1.py, CausalConv3d.
"""

from dataclasses import dataclass
from functools import cache
from logging import getLogger

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from wanfast import _C
except ImportError:  # installed without a compiler
    _C = None  # type: ignore[assignment]


def instruction_sets() -> list[str]:
    """Name what the extension can use on this CPU, the best first; nothing where it was not built."""
    return [] if _C is None else _C.instruction_sets()


@dataclass(frozen=True, slots=True)
class ConvWeight:
    """A convolution's weight in the layout it computes in; made by `prepare`."""

    data: Tensor  # packed: one axis, as csrc/causal_conv3d.h says; else [O, C, kt, kh, kw] in channels_last_3d
    shape: tuple[int, int, int, int, int]  # O, C, kt, kh, kw
    is_packed: bool  # for the extension


def prepare(weight: Tensor) -> ConvWeight:
    """Lay a weight out once for `causal_conv3d`, and settle which path its convolutions take.

    Args:
        weight: [O, C, kt, kh, kw]; kh and kw odd; any float dtype and device.

    Raises:
        ValueError: weight has no such shape.
    """
    if weight.ndim != 5 or 0 in weight.shape or weight.shape[3] % 2 == 0 or weight.shape[4] % 2 == 0:
        raise ValueError(f"weight: must be [O, C, kt, kh, kw] with odd kh and kw, got {tuple(weight.shape)}")
    out_channels, channels, kt, kh, kw = shape = (*weight.shape,)
    is_packed = weight.device.type == "cpu" and weight.dtype == torch.float32 and {kt, kh, kw} <= {1, 3}
    if is_packed and _C is None:
        is_packed = False
        _say_extension_is_missing()
    if not is_packed:
        return ConvWeight(weight.contiguous(memory_format=torch.channels_last_3d), shape, is_packed)
    weight = weight.contiguous()
    packed = torch.empty(_C.packed_size(out_channels, channels, kt * kh * kw), dtype=torch.float32)
    _C.pack_weight(weight.data_ptr(), packed.data_ptr(), out_channels, channels, kt * kh * kw)
    return ConvWeight(packed, shape, is_packed)


def causal_conv3d(
    x: Tensor,
    history: Tensor | None,
    weight: Tensor | ConvWeight,
    bias: Tensor | None,
    *,
    reuse_history: bool = False,
) -> tuple[Tensor, Tensor]:
    """Convolve one chunk of frames, seeing the frames before it and none after.

    Args:
        x: [B, C, T, H, W]; the weight's dtype and device.
        history: [B, C, h, H, W], 0 <= h <= kt - 1: the frames just before x, as the call for them returned it;
            missing ones are zeros. None is h = 0.
        weight: [O, C, kt, kh, kw], or better `prepare` of it.
        bias: [O] or None.
        reuse_history: return the next history in history's memory, which is written to; to that end it always has
            kt - 1 frames, zeros for those that are missing.

    Returns:
        y [B, O, T, H, W] and the history for the next call: the last kt - 1 frames of (history, x), fewer if fewer
        were seen, none for kt = 1. It has its own memory and does not keep the chunk alive. Neither has a gradient
        where the extension computes.

    Raises:
        ValueError: a shape, a dtype or a device is not as above.
    """
    prepared = prepare(weight) if isinstance(weight, Tensor) else weight
    _check(x, history, prepared, bias)
    if prepared.is_packed:
        y = causal_conv3d_extension(x, history, prepared, bias)
    else:
        y = causal_conv3d_reference(x, history, prepared.data, bias)
    keep = prepared.shape[2] - 1
    return y, (_shifted_history if reuse_history else _next_history)(x, history, keep=keep)


def causal_conv3d_reference(x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The formula above in plain torch: the truth the extension is held to, and the path where it does not serve."""
    _, _, kt, kh, kw = weight.shape
    x = x.contiguous(memory_format=torch.channels_last_3d)
    frames = x if history is None else torch.cat((history, x), dim=2)
    missing = kt - 1 - (frames.shape[2] - x.shape[2])
    frames = F.pad(frames, (0, 0, 0, 0, missing, 0)) if missing else frames
    y = F.conv3d(frames, weight, bias, padding=(0, kh // 2, kw // 2))
    return y.contiguous(memory_format=torch.channels_last_3d)  # torch keeps that layout in most shapes, not in all


def causal_conv3d_extension(
    x: Tensor, history: Tensor | None, weight: ConvWeight, bias: Tensor | None, *, instruction_set: str = "auto"
) -> Tensor:
    """The same in C++, on as many threads as torch uses.

    Args:
        x: as in `causal_conv3d`; fp32 on the CPU, like the others.
        history: as in `causal_conv3d`.
        weight: packed, by `prepare`.
        bias: as in `causal_conv3d`.
        instruction_set: one of `_C.instruction_sets()`; "auto" is the first of them, the best of this CPU.

    Raises:
        ValueError: an argument is not as above.
    """
    if not weight.is_packed:
        raise ValueError("weight: must be packed for the extension, got torch's layout; prepare an fp32 CPU tensor")
    _check(x, history, weight, bias)
    out_channels, channels, kt, kh, kw = weight.shape
    x = x.contiguous(memory_format=torch.channels_last_3d)
    history = None if history is None else history.contiguous(memory_format=torch.channels_last_3d)
    bias = torch.zeros(out_channels, dtype=torch.float32) if bias is None else bias.contiguous()
    batch, _, frames, height, width = x.shape
    shape = (batch, out_channels, frames, height, width)
    y = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last_3d)
    _C.causal_conv3d(
        x=x.data_ptr(),
        history=0 if history is None else history.data_ptr(),
        packed=weight.data.data_ptr(),
        bias=bias.data_ptr(),
        y=y.data_ptr(),
        batch=batch,
        channels=channels,
        out_channels=out_channels,
        frames=frames,
        history_frames=0 if history is None else history.shape[2],
        height=height,
        width=width,
        kt=kt,
        kh=kh,
        kw=kw,
        num_threads=torch.get_num_threads(),
        instruction_set=instruction_set,
    )
    return y


def _check(x: Tensor, history: Tensor | None, weight: ConvWeight, bias: Tensor | None) -> None:
    """Refuse what the paths below would read wrongly; the extension sees only addresses and sizes."""
    out_channels, channels, kt, _, _ = weight.shape
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
        raise ValueError(f"x: must be [B, {channels}, T, H, W], none of them 0, got {tuple(x.shape)}")
    if history is not None:
        batch, _, _, height, width = x.shape
        seen = history.shape[2] if history.ndim == 5 else kt
        if seen > kt - 1 or history.shape != (batch, channels, seen, height, width):
            want = f"[{batch}, {channels}, at most {kt - 1}, {height}, {width}]"
            raise ValueError(f"history: must be {want}, got {tuple(history.shape)}")
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"bias: must be [{out_channels}], got {tuple(bias.shape)}")
    for name, tensor in (("x", x), ("history", history), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (weight.data.dtype, weight.data.device):
            want = f"{weight.data.dtype} on {weight.data.device} like the weight"
            raise ValueError(f"{name}: must be {want}, got {tensor.dtype} on {tensor.device}")


def _next_history(x: Tensor, history: Tensor | None, *, keep: int) -> Tensor:
    if history is not None and x.shape[2] < keep:
        x = torch.cat((history, x), dim=2)
    return x[:, :, max(x.shape[2] - keep, 0) :].clone(memory_format=torch.channels_last_3d)


def _shifted_history(x: Tensor, history: Tensor | None, *, keep: int) -> Tensor:
    """Drop as many of `keep` frames as x has, and put the last of x behind the rest."""
    if history is None or history.shape[2] < keep:
        seen = 0 if history is None else history.shape[2]
        shape = (*x.shape[:2], keep, *x.shape[3:])
        whole = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        whole[:, :, : keep - seen] = 0
        if history is not None:
            whole[:, :, keep - seen :] = history
        history = whole
    fresh = min(keep, x.shape[2])
    for frame in range(keep - fresh):  # one by one, as the frames overlap
        history[:, :, frame] = history[:, :, frame + fresh]
    history[:, :, keep - fresh :] = x[:, :, x.shape[2] - fresh :]
    return history


@cache  # once in a process
def _say_extension_is_missing() -> None:
    getLogger("wanfast").warning(
        "installed without its C++ extension, VAE convolutions on the CPU run on torch; "
        "for the faster path reinstall where a C++17 compiler is found"
    )
