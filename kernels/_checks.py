"""How kernels refuse arguments: a ValueError that names the argument, the rule and what came instead."""

import torch
from torch import Tensor

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPE_RULE = "must be float32, bfloat16 or float16"


def require(holds: bool, rule: str, got: object) -> None:
    """Refuse an argument.

    Args:
        holds: whether the rule holds.
        rule: `<argument>: <what must hold>`.
        got: what was passed.

    Raises:
        ValueError: the rule does not hold.
    """
    if not holds:
        raise ValueError(f"{rule}, got {got}")


def check_channels(x: Tensor, name: str, *, max_channels: int) -> None:
    """Refuse a tensor whose rows a kernel cannot read as runs of adjacent channels.

    Args:
        x: to be [..., C], contiguous.
        name: of the argument.
        max_channels: that one program holds.

    Raises:
        ValueError: x has no axis, no or too many channels, another dtype, or is not contiguous.
    """
    require(x.dtype in COMPUTE_DTYPES, f"{name}: {_DTYPE_RULE}", x.dtype)
    require(x.dim() >= 1, f"{name}: must be [..., C]", tuple(x.shape))
    require(1 <= x.shape[-1] <= max_channels, f"{name}: must have 1 to {max_channels} channels", x.shape[-1])
    require(x.is_contiguous(), f"{name}: must be contiguous", f"strides {x.stride()} for shape {tuple(x.shape)}")


def check_weight(x: Tensor, weight: Tensor, name: str) -> None:
    """Refuse a per-channel weight or bias that does not fit x [..., C].

    Raises:
        ValueError: the weight is not [C], contiguous, of a supported dtype and on x's device.
    """
    require(weight.shape == x.shape[-1:], f"{name}: must be [{x.shape[-1]}], x's channels", tuple(weight.shape))
    require(weight.dtype in COMPUTE_DTYPES, f"{name}: {_DTYPE_RULE}", weight.dtype)
    require(weight.is_contiguous(), f"{name}: must be contiguous", f"strides {weight.stride()}")
    require(weight.device == x.device, f"{name}: must be on {x.device}, like x", weight.device)


def check_modulation(x: Tensor, modulation: Tensor, name: str, first_tokens: int) -> None:
    """Refuse modulation rows that do not fit the tokens of x [B, T, C].

    Args:
        x: to be [B, T, C].
        modulation: to be [B, 1, C] or [B, 2, C] on x's device, channels adjacent.
        name: of the argument.
        first_tokens: tokens that take row 0.

    Raises:
        ValueError: a shape, dtype, stride, device or count is not as above.
    """
    require(x.dim() == 3, "x: must be [B, T, C]", tuple(x.shape))
    batch, tokens, channels = x.shape
    shape = tuple(modulation.shape)
    fits = shape in ((batch, 1, channels), (batch, 2, channels))
    require(fits, f"{name}: must be [{batch}, 1 or 2, {channels}] for x of shape {tuple(x.shape)}", shape)
    require(modulation.dtype in COMPUTE_DTYPES, f"{name}: {_DTYPE_RULE}", modulation.dtype)
    adjacent = channels == 1 or modulation.stride(-1) == 1
    require(adjacent, f"{name}: channels must be adjacent in memory", f"strides {modulation.stride()}")
    require(modulation.device == x.device, f"{name}: must be on {x.device}, like x", modulation.device)
    require(0 <= first_tokens <= tokens, f"first_tokens: must be 0 to {tokens}, the tokens of x", first_tokens)


def check_out_dtype(out_dtype: torch.dtype | None) -> None:
    """Refuse a result dtype that kernels cannot store; None stands for x's own.

    Raises:
        ValueError: out_dtype is not supported.
    """
    require(out_dtype is None or out_dtype in COMPUTE_DTYPES, f"out_dtype: {_DTYPE_RULE}", out_dtype)
