"""Causal 3D convolution of one chunk of frames, with what follows it in a VAE: history in, history out.

    y[b, o, t, h, w] = bias[o] + residual[b, o, t, h, w] + sum over c, i, j, k of
                       weight[o, c, i, j, k] * frames[b, c, t + i, h + j - kh // 2, w + k - kw // 2]
    and with a norm    y = silu(y / max(length of y over o, 1e-12) * norm[o])

where `frames` is kt - 1 earlier frames (`history`, zeros where there were none) followed by the chunk `x`,
and rows and columns outside the picture are zero. That is the form "same"; the others are:

    half_picture     3 x 3 with stride 2, zeros on the right and at the bottom only
    half_frames      3 frames with stride 2; the first output sees one frame of history
    double_picture   a picture doubled by repetition, and a 3 x 3 convolution: each output reads only 2 x 2 different
                     pixels, so four sets of 2 x 2 summed taps, one per parity of row and column, give the same with 4/9
                     of the products and no doubled picture
    double_frames    as "same" with O = 2 N outputs: the first N of them are even frames, the rest odd ones

Weights    call `prepare` once where a weight is loaded, on the device and in the dtype it will compute in, and keep
           what it returns; a plain tensor is accepted too, and laid out at every call.
Layout     tensors are logically [B, C, T, H, W]; both paths want their memory as `torch.channels_last_3d` and return
           it so. Other strides are converted at the cost of a copy: convert once where frames enter the VAE.
Paths      CPU, fp32 and bf16   csrc/: chunk and history are read where they lie, bf16 in pairs where the CPU has that
           GPU, fp16 and bf16   kernels/causal_conv3d.py: likewise
           everything else      torch; also bf16 on a CPU with matrix units (AMX), where it is several times faster
           csrc/ computes 3 x 3 taps of 16 and more channels in fp32 by Winograd's algorithm, which takes 2.25 times
           fewer products, and of a doubled picture 1.78 times fewer (docs/adr/0015)
Numerics   sums in fp32, in an order that depends neither on the threads nor on how frames are cut into chunks; y is
           rounded once, in the extension and in the kernel together with the residual.
Source     Wan-Video/Wan2.2, wan/modules/vae2_1.py, CausalConv3d.
"""

from dataclasses import dataclass
from functools import cache
from logging import getLogger
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from wanfast import kernels
from wanfast.kernels import PackedConv
from wanfast.vae import extension
from wanfast.vae.extension import _C
from wanfast.vae.norms import norm_silu

FormName = Literal["same", "half_picture", "half_frames", "double_picture", "double_frames"]
MethodName = Literal["fastest", "direct", "winograd"]

# Kernel sizes of each form that the extension serves; None is any, but it serves 1 and 3.
_KERNELS: dict[FormName, tuple[int, int, int] | None] = {
    "same": None,
    "half_picture": (1, 3, 3),
    "half_frames": (3, 1, 1),
    "double_picture": (1, 2, 2),
    "double_frames": None,
}


@dataclass(frozen=True, slots=True)
class ConvWeight:
    """A convolution's weight in the layout it computes in; made by `prepare`."""

    # Packed: [sets, slots], as csrc/causal_conv3d.h says; for_kernel's own; else what `prepare` got, channels last.
    data: Tensor
    shape: tuple[int, int, int, int, int]  # O, C, kt, kh, kw
    dtype: torch.dtype  # of the frames it is for
    form: FormName
    is_packed: bool  # for the extension
    for_kernel: PackedConv | None = None  # on a GPU in 16 bits

    @property
    def lead_frames(self) -> int:
        """Frames before the chunk that its first output sees."""
        return 1 if self.form == "half_frames" else self.shape[2] - 1

    def out_shape(self, x: Tensor) -> tuple[int, int, int, int, int]:
        """Shape of the result for x [B, C, T, H, W]."""
        batch, _, frames, height, width = x.shape
        out_channels = self.shape[0]
        if self.form == "half_picture":
            return batch, out_channels, frames, height // 2, width // 2
        if self.form == "half_frames":
            return batch, out_channels, frames // 2, height, width
        if self.form == "double_picture":
            return batch, out_channels, frames, 2 * height, 2 * width
        if self.form == "double_frames":
            return batch, out_channels // 2, 2 * frames, height, width
        return batch, out_channels, frames, height, width


def prepare(weight: Tensor, form: FormName = "same") -> ConvWeight:
    """Lay a weight out once for `causal_conv3d`, and settle which path its convolutions take.

    Args:
        weight: [O, C, kt, kh, kw]; kh and kw odd; any float dtype and device. Of double_picture [4, O, C, 1, 2, 2], a
            set per parity of row and column, column fastest: sums of 3 x 3 taps, of which either parity has the same.
        form: which inputs an output sees, see above.

    Raises:
        ValueError: weight has no such shape.
    """
    sets = weight if form == "double_picture" else weight.unsqueeze(0)
    kernel = _KERNELS[form]
    if sets.ndim != 6 or 0 in sets.shape or (kernel is None and 0 in (sets.shape[4] % 2, sets.shape[5] % 2)):
        raise ValueError(f"weight: must be [O, C, kt, kh, kw] with odd kh and kw, got {tuple(weight.shape)}")
    if kernel is not None and (sets.shape[3:] != kernel or len(sets) != (4 if form == "double_picture" else 1)):
        raise ValueError(f"weight: must have a kernel of {kernel} for {form}, got {tuple(weight.shape)}")
    if form == "double_frames" and sets.shape[1] % 2:
        raise ValueError(f"weight: must have an even number of outputs for {form}, got {sets.shape[1]}")
    _, out_channels, channels, kt, kh, kw = sets.shape
    shape, dtype = (out_channels, channels, kt, kh, kw), weight.dtype
    if kernels.runs_causal_conv3d(weight) and kt in (1, 3) and kh == kw and kh <= 3:
        packed = kernels.pack_conv(weight, form)
        return ConvWeight(packed.data, shape, dtype, form, is_packed=False, for_kernel=packed)
    is_packed = weight.device.type == "cpu" and (kernel is not None or {kt, kh, kw} <= {1, 3})
    if is_packed and dtype == torch.float32 and _C is None:
        _say_extension_is_missing()
    if is_packed and _C is not None and extension.serves(dtype):
        if form == "double_picture":
            _check_parities(sets)
        return ConvWeight(extension.pack(sets), shape, dtype, form, is_packed=True)
    if form == "double_picture":
        weight = torch.stack([one.contiguous(memory_format=torch.channels_last_3d) for one in sets])
    else:
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
    return ConvWeight(weight, shape, dtype, form, is_packed=False)


def _check_parities(sets: Tensor) -> None:
    """Refuse sets that no 3 x 3 taps sum to: the extension computes a product that both parities have only once."""
    taps = sets.float().reshape(2, 2, *sets.shape[1:])  # [row, column, O, C, 1, row tap, column tap]
    most = 4 * torch.finfo(sets.dtype).eps * float(taps.abs().max())
    for parity, tap in ((0, 5), (1, 6)):
        even, odd = taps.sum(tap).unbind(parity)
        if not float((even - odd).abs().max()) <= most:
            name = "rows" if parity == 0 else "columns"
            raise ValueError(
                "weight: must be sums of 3 x 3 taps for double_picture, with one total for both parities of "
                f"{name}, got totals {float((even - odd).abs().max()):.3g} apart; (g0, g1 + g2), (g0 + g1, g2) work"
            )


def causal_conv3d(
    x: Tensor,
    history: Tensor | None,
    weight: Tensor | ConvWeight,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    overwrite_residual: bool = False,
    reuse_history: bool = False,
) -> tuple[Tensor, Tensor]:
    """Convolve one chunk of frames, seeing the frames before it and none after.

    Args:
        x: [B, C, T, H, W]; the weight's dtype and device.
        history: [B, C, h, H, W], 0 <= h <= `lead_frames` of the weight: the frames just before x, as the call for them
            returned it; missing ones are zeros. None is h = 0.
        weight: [O, C, kt, kh, kw], or better `prepare` of it.
        bias: [O] or None.
        residual: of the result's shape and dtype, or None: added to the sum.
        norm: [O, 1, 1, 1], times sqrt(O), or None: the result goes through the RMS norm with this weight, and SiLU.
        overwrite_residual: return the result in the residual's memory.
        reuse_history: return the next history in history's memory, which is written to; to that end it always has
            `lead_frames`, zeros for those that are missing.

    Returns:
        y [B, O, T, H, W] (`out_shape` of other forms) and the history for the next call: the last `lead_frames` frames
        of (history, x), fewer if fewer were seen, none for a kernel of one frame. It has its own memory and does not
        keep the chunk alive. Neither has a gradient where the extension computes.

    Raises:
        ValueError: a shape, a dtype or a device is not as above.
    """
    prepared = prepare(weight) if isinstance(weight, Tensor) else weight
    _check(x, history, prepared, bias, residual, norm)
    if prepared.is_packed:
        y = causal_conv3d_extension(
            x, history, prepared, bias, residual=residual, norm=norm, overwrite_residual=overwrite_residual
        )
    elif prepared.for_kernel is not None:
        y = _causal_conv3d_kernel(x, history, prepared.for_kernel, bias, residual, norm, overwrite_residual)
    else:
        y = causal_conv3d_reference(x, history, prepared.data, bias, prepared.form)
        if residual is not None:
            y = residual.add_(y) if overwrite_residual else y.add_(residual)
        if norm is not None:
            y = norm_silu(y, norm, overwrite=True)
    shift = _shifted_history if reuse_history else _next_history
    return y, shift(x, history, keep=prepared.lead_frames)


def causal_conv3d_reference(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None, form: FormName = "same"
) -> Tensor:
    """The formula above in plain torch: the truth the extension is held to, and the path where it does not serve."""
    x = x.contiguous(memory_format=torch.channels_last_3d)
    if form == "half_picture":
        frames = F.pad(_fold_frames(x), (0, 1, 0, 1))
        y = _unfold_frames(F.conv2d(frames, weight[:, :, 0], bias, stride=2), len(x))
    elif form == "double_picture":
        y = _doubled_picture(x, weight, bias)
    else:
        _, _, kt, kh, kw = weight.shape
        lead = 1 if form == "half_frames" else kt - 1
        frames = x if history is None else torch.cat((history, x), dim=2)
        missing = lead - (frames.shape[2] - x.shape[2])
        frames = F.pad(frames, (0, 0, 0, 0, missing, 0)) if missing else frames
        stride = (2, 1, 1) if form == "half_frames" else 1
        y = F.conv3d(frames, weight, bias, stride=stride, padding=(0, kh // 2, kw // 2))
        if form == "double_frames":
            y = rearrange(y, "b (parity c) t h w -> b (t parity) h w c", parity=2).movedim(-1, 1)
    return y.contiguous(memory_format=torch.channels_last_3d)  # torch keeps that layout in most shapes, not in all


def _causal_conv3d_kernel(
    x: Tensor,
    history: Tensor | None,
    weight: PackedConv,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Tensor | None,
    overwrite_residual: bool,
) -> Tensor:
    laid_out = None if residual is None else residual.contiguous(memory_format=torch.channels_last_3d)
    has_own_norm = weight.form == "double_frames"  # where a result is two frames, no program has a pixel's channels
    y = kernels.causal_conv3d(
        x.contiguous(memory_format=torch.channels_last_3d),
        None if history is None else history.contiguous(memory_format=torch.channels_last_3d),
        weight,
        bias,
        residual=laid_out,
        norm=None if has_own_norm else norm,
        overwrite_residual=overwrite_residual or laid_out is not residual,
    )
    return norm_silu(y, norm, overwrite=True) if norm is not None and has_own_norm else y


def _doubled_picture(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    frames = _fold_frames(x)
    count, _, height, width = frames.shape
    y = frames.new_empty((count, 2 * height, 2 * width, weight.shape[1])).movedim(-1, 1)
    for phase, (row, column) in zip(weight, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        part = F.conv2d(frames, phase[:, :, 0], bias, padding=1)  # one row and column more than this phase has
        y[:, :, row::2, column::2] = part[:, :, row : row + height, column : column + width]
    return _unfold_frames(y, len(x))


def causal_conv3d_extension(
    x: Tensor,
    history: Tensor | None,
    weight: ConvWeight,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    overwrite_residual: bool = False,
    instruction_set: str = "auto",
    method: MethodName = "fastest",
) -> Tensor:
    """The same in C++, on as many threads as torch uses.

    Args:
        x: as in `causal_conv3d`; on the CPU, like the others.
        history: as in `causal_conv3d`.
        weight: packed, by `prepare`.
        bias: as in `causal_conv3d`.
        residual: as in `causal_conv3d`.
        norm: as in `causal_conv3d`.
        overwrite_residual: as in `causal_conv3d`.
        instruction_set: one of `instruction_sets()`; "auto" is the first of them, the best of this CPU.
        method: how sums are computed; "winograd" for 3 x 3 kernels of stride 1 with fp32 weights.

    Raises:
        ValueError: an argument is not as above.
    """
    if not weight.is_packed:
        raise ValueError("weight: must be packed for the extension, got torch's layout; prepare an fp32 CPU tensor")
    _check(x, history, weight, bias, residual, norm)
    if residual is not None:
        laid_out = residual.contiguous(memory_format=torch.channels_last_3d)
        overwrite_residual, residual = overwrite_residual and laid_out is residual, laid_out
    if residual is not None and overwrite_residual:
        y = residual
    else:
        y = torch.empty(weight.out_shape(x), dtype=x.dtype, memory_format=torch.channels_last_3d)
    extension.convolve(
        x.contiguous(memory_format=torch.channels_last_3d),
        None if history is None else history.contiguous(memory_format=torch.channels_last_3d),
        weight.data,
        weight.shape,
        weight.form,
        bias,
        y,
        residual=residual,
        # Where a result is two frames, no thread has all of a pixel's channels in one place.
        norm=None if weight.form == "double_frames" else norm,
        instruction_set=instruction_set,
        method=method,
    )
    if norm is not None and weight.form == "double_frames":
        extension.norm_silu(y, norm, y, instruction_set=instruction_set)
    return y


def _check(
    x: Tensor,
    history: Tensor | None,
    weight: ConvWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Tensor | None,
) -> None:
    """Refuse what the paths below would read wrongly; the extension sees only addresses and sizes."""
    out_channels, channels, *_ = weight.shape
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
        raise ValueError(f"x: must be [B, {channels}, T, H, W], none of them 0, got {tuple(x.shape)}")
    batch, _, frames, height, width = x.shape
    if weight.form == "half_picture" and (height % 2 or width % 2):
        raise ValueError(f"x: must have an even number of rows and columns for {weight.form}, got {tuple(x.shape)}")
    if weight.form == "half_frames" and frames % 2:
        raise ValueError(f"x: must have an even number of frames for {weight.form}, got {tuple(x.shape)}")
    if history is not None:
        lead = weight.lead_frames
        seen = history.shape[2] if history.ndim == 5 else lead + 1
        if seen > lead or history.shape != (batch, channels, seen, height, width):
            want = f"[{batch}, {channels}, at most {lead}, {height}, {width}]"
            raise ValueError(f"history: must be {want}, got {tuple(history.shape)}")
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"bias: must be [{out_channels}], got {tuple(bias.shape)}")
    shape = weight.out_shape(x)
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual: must be {list(shape)} like the result, got {tuple(residual.shape)}")
    if norm is not None and norm.shape != (shape[1], 1, 1, 1):
        raise ValueError(f"norm: must be [{shape[1]}, 1, 1, 1], got {tuple(norm.shape)}")
    named = (("x", x), ("history", history), ("bias", bias), ("residual", residual), ("norm", norm))
    for name, tensor in named:
        if tensor is not None and (tensor.dtype, tensor.device) != (weight.dtype, weight.data.device):
            want = f"{weight.dtype} on {weight.data.device} like the weight"
            raise ValueError(f"{name}: must be {want}, got {tensor.dtype} on {tensor.device}")


def _fold_frames(x: Tensor) -> Tensor:
    return rearrange(x, "b c t h w -> (b t) c h w")


def _unfold_frames(x: Tensor, batch: int) -> Tensor:
    return rearrange(x, "(b t) c h w -> b c t h w", b=batch)


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
