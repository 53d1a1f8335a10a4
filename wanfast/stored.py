"""Weights in the form a file stores them: plain tensors, scaled 8-bit numbers, or GGUF blocks.

A stored weight stays small in host memory and on the device; `linear` expands it where it is multiplied. Each form has
the attributes of a tensor that the rest of the code asks for: `shape`, `dtype` (what it expands to) and `device`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # what a file holds is told without importing torch
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """8-bit numbers and what they are multiplied by."""

    values: Tensor  # [out, in], int8 or float8_e4m3fn
    scale: (
        Tensor  # fp32: [] for all, [out, 1] per output channel, or [out / 128, in / 128] (rounded up) per square block
    )
    dtype: torch.dtype  # it expands to
    # What 8-bit arithmetic asks for. int8: each 128 input channels were multiplied by the Hadamard matrix before
    # rounding. e4m3: no number is beyond 28, so that FP16 sums of products hold.
    is_rotated: bool = False
    is_narrow: bool = False

    @property
    def shape(self) -> torch.Size:
        """Of the expanded tensor."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.values.device


@dataclass(frozen=True, slots=True)
class GGUFWeight:
    """Rows of GGUF blocks, byte for byte as in the file."""

    blocks: Tensor  # [out, bytes of a row], uint8
    kind: str  # GGUF's own name: "Q4_K", "Q8_0", ...
    in_features: int
    dtype: torch.dtype  # it expands to

    @property
    def shape(self) -> torch.Size:
        """Of the expanded tensor."""
        import torch

        return torch.Size((self.blocks.shape[0], self.in_features))

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.blocks.device


Weight: TypeAlias = "Tensor | ScaledWeight | GGUFWeight"
