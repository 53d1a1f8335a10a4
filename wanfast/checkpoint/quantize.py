"""Weights to 8 bits, once, ahead of time: symmetric, one scale per output channel.

    scale = max |row| / largest,  values = round(row / scale)        largest: 127 for int8, 448 for e4m3

Source: ModelTC/LightX2V, tools/convert/quant/quant.py, the scheme of its published 8-bit Wan 2.2 files.
"""

import torch
from torch import Tensor

from wanfast.stored import ScaledWeight

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_rows(weight: Tensor, dtype: torch.dtype) -> ScaledWeight:
    """Quantise a weight.

    Args:
        weight: [out, in], finite, any float dtype; computed in fp32.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.

    Returns:
        Values of that dtype, rounded half to even, and scales [out, 1] fp32; a row of zeros has the scale 1. It expands
        to the weight's own dtype.
    """
    largest = LARGEST[dtype]
    wide = weight.float()
    scale = wide.abs().amax(dim=1, keepdim=True) / largest
    scale = torch.where(scale > 0, scale, torch.ones(()))  # also where a row's numbers are too small to be scaled
    values = (wide / scale).clamp_(-largest, largest)
    return ScaledWeight((values.round_() if dtype == torch.int8 else values).to(dtype), scale, weight.dtype)
