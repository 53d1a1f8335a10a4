"""Weights to 8 bits, as 8-bit arithmetic takes them: symmetric, one scale per output channel.

    scale = max |row| / largest,  values = round(row / scale)        largest: 127 for int8, 28 for e4m3

int8 weights are multiplied by the 128-wide Hadamard matrix along their input first, where they have whole runs of 128:
their inputs are, which spreads an outlier over 128 channels. Why 28: `kernels/_quantized.py`, Bounds.
Source: ModelTC/LightX2V, tools/convert/quant/quant.py, for a scale per output channel; QuaRot, arXiv 2404.00456.
"""

import torch
from torch import Tensor

from wanfast.kernels import GROUP, QuantizedWeight, quantize_weight
from wanfast.stored import ScaledWeight


def quantize_rows(weight: Tensor, dtype: torch.dtype, *, is_rotated: bool | None = None) -> ScaledWeight:
    """Quantise a weight.

    Args:
        weight: [out, in], finite, any float dtype; computed in fp32.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.
        is_rotated: whether inputs are rotated; None is the best there is for the dtype and the width.

    Returns:
        Values of that dtype, rounded half to even, and scales [out, 1] fp32; a row of zeros has the scale 1. It expands
        to the weight's own dtype.
    """
    if is_rotated is None:
        is_rotated = rotates(dtype, weight.shape[1])
    return as_stored(quantize_weight(weight, dtype, rotated=is_rotated), weight.dtype)


def rotates(dtype: torch.dtype, in_features: int) -> bool:
    """Whether weights of this dtype and width are rotated where nothing else is asked for."""
    return dtype == torch.int8 and in_features % GROUP == 0


def as_stored(weight: QuantizedWeight, dtype: torch.dtype) -> ScaledWeight:
    """Give what a kernel multiplies by the form of a stored weight, expanding to `dtype`."""
    is_narrow = weight.values.dtype != torch.int8
    return ScaledWeight(weight.values, weight.scale[:, None], dtype, is_rotated=weight.rotated, is_narrow=is_narrow)
