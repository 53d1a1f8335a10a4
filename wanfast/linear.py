"""A linear layer: its weights as data, and the one function that applies it.

Every projection of the DiT and the text encoder goes through `linear`: storage formats and low-rank terms enter here.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wanfast import kernels
from wanfast.stored import GGUFWeight, ScaledWeight, Weight


@dataclass(frozen=True, slots=True)
class LowRank:
    """A term beside a base product: scale * up @ down, in the dtype the layer computes in."""

    down: Tensor  # [rank, in]
    up: Tensor  # [out, rank]
    scale: float


@dataclass(frozen=True, slots=True)
class Linear:
    """Weights of one linear layer; the weight's dtype is the one it computes in, whatever it is stored as."""

    weight: Weight  # [out, in]
    bias: Tensor | None  # [out], in the weight's dtype
    low_rank: tuple[LowRank, ...] = ()


def expand(weight: Weight) -> Tensor:
    """Return a weight as a plain tensor in its dtype; a plain tensor is returned as it is."""
    if isinstance(weight, ScaledWeight):
        if weight.is_rotated:
            wide = kernels.dequantize_scaled(weight.values, weight.scale, dtype=torch.float32)
            return kernels.rotate(wide).to(weight.dtype)
        return kernels.dequantize_scaled(weight.values, weight.scale, dtype=weight.dtype)
    if isinstance(weight, GGUFWeight):
        return kernels.dequantize_gguf(weight.blocks, weight.kind, in_features=weight.in_features, dtype=weight.dtype)
    return weight


def linear(x: Tensor, layer: Linear) -> Tensor:
    """Multiply by the weight's transpose, add the bias, and add the low-rank terms.

    Args:
        x: [..., in]; any float dtype, cast to the weight's first.
        layer: weight [out, in] and bias [out] or None, of one dtype.

    Returns:
        [..., out] in the weight's dtype; sums in fp32, rounded once per product.
    """
    x = x.to(layer.weight.dtype)
    y = F.linear(x, expand(layer.weight), layer.bias)
    for term in layer.low_rank:
        y = y + term.scale * F.linear(F.linear(x, term.down), term.up)
    return y
