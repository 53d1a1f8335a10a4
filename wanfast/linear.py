"""A linear layer: its weights as data, and the one function that applies it.

Every projection of the DiT and of the text encoder goes through `linear`: other storage formats enter here.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """Weights of one linear layer, both in the dtype it computes in."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


def linear(x: Tensor, layer: Linear) -> Tensor:
    """Multiply by the weight's transpose and add the bias.

    Args:
        x: [..., in]; any float dtype, cast to the weight's first.
        layer: weight [out, in] and bias [out] or None, of one dtype.

    Returns:
        [..., out] in the weight's dtype; sums in fp32, rounded once.
    """
    return F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)
