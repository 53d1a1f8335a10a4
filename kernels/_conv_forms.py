"""The convolutions of Wan's VAEs as one sum with parameters: which inputs each output sees, and where it is put.

    same             stride 1, kt - 1 earlier frames, rows and columns of zeros all around
    half_picture     3 x 3, stride 2, zeros on the right and at the bottom only
    half_frames      3 frames, stride 2, one of them earlier than the chunk
    double_picture   2 x 2, four sets of weights, one per parity of row and column: a picture doubled by repetition
                     under a 3 x 3 convolution, with the taps summed that fall on one pixel
    double_frames    stride 1, twice the outputs: the first half of them are even frames, the rest odd ones

Source: Wan-Video/Wan2.2, wan/modules/vae2_1.py.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import COMPUTE_DTYPES, require
from ._conv_tiles import arch_of, conv_tile, padded

FormName = Literal["same", "half_picture", "half_frames", "double_picture", "double_frames"]


@dataclass(frozen=True, slots=True)
class Form:
    """How outputs lie to inputs."""

    stride_frames: int = 1
    stride_picture: int = 1
    groups: int = 1  # of output channels, which become as many frames
    doubles_picture: bool = False  # four phases

    @property
    def phases(self) -> int:
        """Sets of weights."""
        return 4 if self.doubles_picture else 1


FORMS: dict[FormName, Form] = {
    "same": Form(),
    "half_picture": Form(stride_picture=2),
    "half_frames": Form(stride_frames=2),
    "double_picture": Form(doubles_picture=True),
    "double_frames": Form(groups=2),
}
_SIDES = {"half_picture": (3,), "half_frames": (1,), "double_picture": (2,), "double_frames": (1,), "same": (1, 3)}
_FRAMES = {"half_picture": (1,), "half_frames": (3,), "double_picture": (1,), "double_frames": (3,), "same": (1, 3)}


@dataclass(frozen=True, slots=True)
class PackedConv:
    """A convolution's weight as the kernel reads it; made by `pack_conv`."""

    data: Tensor  # [phases, kt * side * side, C padded, O padded], zeros where padded
    form: FormName
    channels: int  # C
    out_channels: int  # O, of all groups together
    kt: int
    side: int  # kh and kw

    @property
    def lead_frames(self) -> int:
        """Frames before the chunk that its first output sees."""
        return 1 if self.form == "half_frames" else self.kt - 1

    @property
    def lead(self) -> int:
        """Rows and columns that the first output, or that of the first phase, sees before the picture's first."""
        return 0 if self.form == "half_picture" else self.side // 2

    def out_shape(self, x: Tensor) -> tuple[int, int, int, int, int]:
        """Shape of the result for x [B, C, T, H, W]."""
        form = FORMS[self.form]
        batch, _, frames, height, width = x.shape
        frames = (self.lead_frames + frames - self.kt) // form.stride_frames + 1
        height, width = height // form.stride_picture, width // form.stride_picture
        grown = 2 if form.doubles_picture else 1
        return batch, self.out_channels // form.groups, form.groups * frames, grown * height, grown * width


def pack_conv(weight: Tensor, form: FormName = "same") -> PackedConv:
    """Lay a weight out for `causal_conv3d`, on the device that it will compute on.

    Args:
        weight: [O, C, kt, k, k]; of "double_picture" [4, O, C, 1, 2, 2], a set per parity of row and column, column
            fastest. float32, bfloat16 or float16.
        form: which inputs an output sees, see above.

    Raises:
        ValueError: an unknown form, or a weight of another shape or dtype than it has.
    """
    require(form in FORMS, f"form: must be one of {', '.join(FORMS)}", form)
    phases = FORMS[form].phases
    sets = weight.unsqueeze(0) if phases == 1 else weight
    want = f"weight: must be {'[4, ' if phases == 4 else '['}O, C, {_either(_FRAMES[form])}, k, k], k"
    want += f" {_either(_SIDES[form])}, not empty, for {form}"
    fits = sets.dim() == 6 and sets.numel() > 0 and len(sets) == phases and sets.shape[4] == sets.shape[5]
    fits = fits and sets.shape[3] in _FRAMES[form] and sets.shape[4] in _SIDES[form]
    require(fits, want, tuple(weight.shape))
    require(weight.dtype in COMPUTE_DTYPES, "weight: must be float32, bfloat16 or float16", weight.dtype)
    _, out_channels, channels, kt, side, _ = sets.shape
    even = out_channels % FORMS[form].groups == 0
    require(even, "weight: must have an even number of outputs for double_frames", out_channels)
    columns = conv_tile(channels, out_channels, arch_of(weight.device)).columns
    rows = sets.permute(0, 3, 4, 5, 2, 1).reshape(phases, kt * side * side, channels, out_channels)
    data = F.pad(rows, (0, -out_channels % columns, 0, padded(channels) - channels)).contiguous()
    return PackedConv(data, form, channels, out_channels, kt, side)


def _either(values: tuple[int, ...]) -> str:
    return " or ".join(map(str, values))


def causal_conv3d_reference(
    x: Tensor,
    history: Tensor | None,
    weight: PackedConv,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    overwrite_residual: bool = False,
) -> Tensor:
    """The formula of causal_conv3d.py in plain torch: the truth the kernel is held to, and the path without a GPU."""
    form = FORMS[weight.form]
    frames = x if history is None else torch.cat((history, x), dim=2)
    frames = F.pad(frames.float(), (0, 0, 0, 0, weight.lead_frames + x.shape[2] - frames.shape[2], 0))
    shape = weight.out_shape(x)
    y = torch.empty((shape[0], *shape[2:], shape[1]), device=x.device).movedim(-1, 1)
    sets = weight.data[:, :, : weight.channels, : weight.out_channels].float()
    for phase, rows in enumerate(sets):
        kernel = rows.unflatten(0, (weight.kt, weight.side, weight.side)).permute(4, 3, 0, 1, 2)
        part = _convolve(frames, kernel, weight, phase // 2, phase % 2)
        step = 2 if form.doubles_picture else 1
        for group, channels in enumerate(part.chunk(form.groups, dim=1)):
            y[:, :, group :: form.groups, phase // 2 :: step, phase % 2 :: step] = channels
    if bias is not None:
        for group, values in enumerate(bias.float().chunk(form.groups)):
            y[:, :, group :: form.groups] += values.view(-1, 1, 1, 1)
    if residual is not None:
        y += residual
    if norm is not None:
        length = torch.linalg.vector_norm(y, dim=1, keepdim=True).clamp_min_(1e-12)
        y = F.silu(y / length * norm.float().view(-1, 1, 1, 1))
    if residual is not None and overwrite_residual:
        return residual.copy_(y)
    return y.to(x.dtype)


def _convolve(frames: Tensor, kernel: Tensor, weight: PackedConv, row: int, column: int) -> Tensor:
    """Convolve frames whose zeros in front are there; `row` and `column` are the phase's."""
    form, side = FORMS[weight.form], weight.side
    height, width = (size // form.stride_picture for size in frames.shape[3:])
    top, left = weight.lead - row, weight.lead - column
    bottom = (height - 1) * form.stride_picture + side - frames.shape[3] - top
    right = (width - 1) * form.stride_picture + side - frames.shape[4] - left
    frames = F.pad(frames, (left, right, top, bottom))
    return F.conv3d(frames, kernel, stride=(form.stride_frames, form.stride_picture, form.stride_picture))
