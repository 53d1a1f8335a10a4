"""What the causal convolution refuses."""

import torch
from torch import Tensor

from ._checks import COMPUTE_DTYPES, require
from ._conv_forms import FORMS, PackedConv

_LARGEST = 2**31  # numbers of a frame, which 32 bits count


def check_frames(x: Tensor, history: Tensor | None, weight: PackedConv) -> None:
    """Refuse frames, a history or a weight that do not fit each other.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or 32 bits do not count a frame's numbers.
    """
    channels, stride = weight.channels, FORMS[weight.form].stride_picture
    require(x.dtype in COMPUTE_DTYPES, "x: must be float32, bfloat16 or float16", x.dtype)
    fits = x.dim() == 5 and x.shape[1] == channels and x.numel() > 0
    require(fits, f"x: must be [B, {channels}, T, H, W], none of them 0", tuple(x.shape))
    even = x.shape[3] % stride == 0 and x.shape[4] % stride == 0
    require(even, f"x: rows and columns must be multiples of {stride} for {weight.form}", tuple(x.shape))
    for name, tensor in (("weight", weight.data), ("history", history)):
        if tensor is not None:
            require(tensor.dtype == x.dtype, f"{name}: must be {x.dtype}, like x", tensor.dtype)
            require(tensor.device == x.device, f"{name}: must be on {x.device}, like x", tensor.device)
    _check_layout("x", x)
    shape = weight.out_shape(x)
    least = FORMS[weight.form].stride_frames
    require(shape[2] > 0, f"x: must have at least {least} frames for {weight.form}", x.shape[2])
    few = max(channels * x.shape[3] * x.shape[4], weight.out_channels * shape[3] * shape[4]) < _LARGEST
    require(few, f"x: frames must have fewer than {_LARGEST} numbers", tuple(x.shape))
    if history is not None:
        batch, _, _, height, width = x.shape
        most = weight.lead_frames
        seen = history.shape[2] if history.dim() == 5 else most + 1
        fits = seen <= most and history.shape == (batch, channels, seen, height, width)
        require(
            fits,
            f"history: must be [{batch}, {channels}, at most {most}, {height}, {width}]",
            tuple(history.shape),
        )
        if seen:
            _check_layout("history", history)


def check_ends(
    x: Tensor, weight: PackedConv, bias: Tensor | None, residual: Tensor | None, norm: Tensor | None
) -> None:
    """Refuse what comes behind the sum, where it does not fit the result.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or outputs that become two frames have a norm.
    """
    groups = FORMS[weight.form].groups
    for name, vector in (("bias", bias), ("norm", norm)):
        if vector is not None:
            outputs = weight.out_channels
            require(vector.numel() == outputs, f"{name}: must be {outputs} numbers", tuple(vector.shape))
            require(vector.is_contiguous(), f"{name}: must be contiguous", f"strides {vector.stride()}")
            require(vector.dtype == x.dtype, f"{name}: must be {x.dtype}, like x", vector.dtype)
            require(vector.device == x.device, f"{name}: must be on {x.device}, like x", vector.device)
    alone = norm is None or groups == 1
    require(alone, f"norm: must be None for {weight.form}", "a weight")
    if residual is not None:
        shape = weight.out_shape(x)
        require(tuple(residual.shape) == shape, f"residual: must be {shape}", tuple(residual.shape))
        require(residual.dtype == x.dtype, f"residual: must be {x.dtype}, like x", residual.dtype)
        require(residual.device == x.device, f"residual: must be on {x.device}, like x", residual.device)
        whole = residual.is_contiguous(memory_format=torch.channels_last_3d)
        require(whole, "residual: must be channels last, contiguous", f"strides {residual.stride()}")


def _check_layout(name: str, frames: Tensor) -> None:
    """Refuse frames whose channels, pixels or frames are not side by side."""
    _, channels, _, height, width = frames.shape
    want = (1, height * width * channels, width * channels, channels)
    sizes_and_strides = zip(frames.shape[1:], frames.stride()[1:], want, strict=True)
    fits = all(size == 1 or stride == wanted for size, stride, wanted in sizes_and_strides)
    require(fits, f"{name}: must be channels last, frame after frame", f"strides {frames.stride()}")
