"""What the kernels share that end in a layer norm with weights: their arguments, formula, device code and tiles.

    new = x + gate[b, r, :] * y                     or x + y, or x alone; written over x where there is a y
    n   = (new - mean) * rsqrt(var + eps)           mean and biased variance over the channels
    out = n * (offset + scale[b, r, :]) + shift[b, r, :]
    r   = 0 for t < first_tokens, else the last row

The scale and shift are those of a timestep (the offset is 1), or a learned weight and bias, the same for every token
(the offset is 0).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_channels, check_modulation, check_weight, require
from ._launch import tl, triton
from ._rows import row_strides, split_tokens
from ._tiles import MAX_CHANNELS

# What a kernel adds to x before it normalises.
NOTHING, UNGATED, GATED = 0, 1, 2
_UNGATED, _GATED = tl.constexpr(UNGATED), tl.constexpr(GATED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowNorm:
    """Arguments of one layer norm, as the public functions name them."""

    x: Tensor  # [B, T, C], or [..., C] where scale is a learned weight and nothing is added
    scale: Tensor  # [B, R, C] of a timestep, or a learned weight [C]
    shift: Tensor  # like scale
    eps: float
    y: Tensor | None = None  # [B, T, C], what is added to x
    gate: Tensor | None = None  # [B, R, C]
    first_tokens: int = 0

    @property
    def is_learned(self) -> bool:
        """Whether scale and shift are a learned weight and bias."""
        return self.scale.dim() == 1

    @property
    def tokens(self) -> int:
        """How many rows are normalised."""
        return self.x.numel() // self.x.shape[-1]

    def check(self) -> None:
        """Refuse arguments that do not fit together.

        Raises:
            ValueError: a shape, dtype, stride, device or count is not as above.
        """
        x, y = self.x, self.y
        check_channels(x, "x", max_channels=MAX_CHANNELS)
        if self.is_learned:
            check_weight(x, self.scale, "weight")
            check_weight(x, self.shift, "bias")
        else:
            check_modulation(x, self.scale, "scale", self.first_tokens)
            check_modulation(x, self.shift, "shift", self.first_tokens)
            same = self.scale.shape == self.shift.shape
            require(same, f"shift: must have scale's shape {tuple(self.scale.shape)}", tuple(self.shift.shape))
        if y is not None:
            check_channels(y, "y", max_channels=MAX_CHANNELS)
            require(x.dim() == 3, "x: must be [B, T, C]", tuple(x.shape))
            require(y.shape == x.shape, f"y: must have x's shape {tuple(x.shape)}", tuple(y.shape))
            require(y.device == x.device, f"y: must be on {x.device}, like x", y.device)
        if self.gate is not None:
            check_modulation(x, self.gate, "gate", self.first_tokens)

    def tensors(self) -> tuple[Tensor, ...]:
        """First arguments of a kernel: x, y, gate, scale and shift; x stands for one that is not read."""
        y = self.x if self.y is None else self.y
        return self.x, y, y if self.gate is None else self.gate, self.scale, self.shift

    def counts(self) -> tuple[int | float, ...]:
        """Next arguments, behind the results: T, first_tokens, strides of gate, scale and shift, and eps."""
        tokens = self.x.shape[1] if self.x.dim() == 3 else self.tokens
        gate = (0, 0) if self.gate is None else row_strides(self.gate)
        rows = (0, 0, 0, 0) if self.is_learned else (*row_strides(self.scale), *row_strides(self.shift))
        return tokens, self.first_tokens, *gate, *rows, self.eps

    def constants(self) -> dict[str, Any]:
        """Constants of a kernel, but for its tile."""
        added = NOTHING if self.y is None else UNGATED if self.gate is None else GATED
        return {"ADDED": added, "OFFSET": 0.0 if self.is_learned else 1.0, "C": self.x.shape[-1]}


def row_norm_reference(norm: RowNorm) -> Tensor:
    """The formula above in plain torch, in fp32. Writes to x where there is a y."""
    scale, shift = norm.scale.float(), norm.shift.float()
    x = norm.x if norm.y is None else _add(norm.x, norm.y, norm.gate, norm.first_tokens)
    if norm.is_learned:
        return F.layer_norm(x.float(), x.shape[-1:], scale, shift, norm.eps)
    out = F.layer_norm(x.float(), x.shape[-1:], eps=norm.eps)
    for r, run in enumerate(split_tokens(out, scale.shape[1], norm.first_tokens)):
        torch.addcmul(shift[:, r : r + 1], run, 1 + scale[:, r : r + 1], out=run)  # spares a copy of all tokens
    return out


def _add(x: Tensor, y: Tensor, gate: Tensor | None, first_tokens: int) -> Tensor:
    if gate is None:
        return x.copy_(x.float() + y.float())
    runs = (split_tokens(tensor, gate.shape[1], first_tokens) for tensor in (x, y))
    for r, (x_run, y_run) in enumerate(zip(*runs, strict=True)):
        x_run.copy_(torch.addcmul(x_run.float(), y_run.float(), gate[:, r : r + 1].float()))
    return x


@triton.jit
def added(
    x_ptr,  # a token
    y_ptr,  # what is added to it
    gate_ptr,  # its row
    at,  # channels, of any shape
    live,  # which of them there are
    ADDED: tl.constexpr,  # NOTHING, UNGATED or GATED
):  # -> the new token in fp32, as it is stored; 0 where not live
    x = tl.load(x_ptr + at, mask=live, other=0.0)
    new = x.to(tl.float32)
    if ADDED >= _UNGATED:
        y = tl.load(y_ptr + at, mask=live, other=0.0).to(tl.float32)
        if ADDED == _GATED:
            y *= tl.load(gate_ptr + at, mask=live, other=0.0).to(tl.float32)
        stored = (new + y).to(x.dtype)
        tl.store(x_ptr + at, stored, mask=live)
        new = stored.to(tl.float32)
    return new


@triton.jit
def weighted(
    n,  # fp32: normalised channels
    scale_ptr,  # their token's row
    shift_ptr,  # their token's row
    at,  # which channels
    live,  # which of them there are
    OFFSET: tl.constexpr,  # what the scale is added to
):  # -> n * (OFFSET + scale) + shift, fp32; 0 where neither n nor the channel is
    scale = tl.load(scale_ptr + at, mask=live, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + at, mask=live, other=0.0).to(tl.float32)
    return n * (OFFSET + scale) + shift
