"""A linear layer's weight to 8 bits, once, when it is loaded: one scale per output channel.

    values[n, k] = round(w[n, k] * largest / absmax[n]),  scale[n] = absmax[n] / largest
    rotated: w's input channels are multiplied, 128 at a time, by the orthonormal Hadamard matrix first

Plain torch on any device: a weight is read once for the thousands of times it is multiplied.

Source: ModelTC/LightX2V, tools/convert/quant/quant.py (scales); Ashkboos et al., QuaRot, arXiv 2404.00456 (rotation).
"""

import torch
from torch import Tensor

from ._checks import COMPUTE_DTYPES, require
from ._quantized import EIGHT_BIT, GROUP, LARGEST_WEIGHT, QuantizedWeight, quantize_reference


def quantize_weight(weight: Tensor, dtype: torch.dtype, *, rotated: bool) -> QuantizedWeight:
    """Round a weight to 8 bits.

    Args:
        weight: [N, K], finite; float32, bfloat16 or float16; K a multiple of 128 where rotated.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.
        rotated: for inputs that are rotated too.

    Returns:
        The weight in 8 bits, on its device; int8 within +-127, e4m3 within +-28, see _quantized.py.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    require(dtype in EIGHT_BIT, "dtype: must be int8 or float8_e4m3fn", dtype)
    require(weight.dtype in COMPUTE_DTYPES, "weight: must be float32, bfloat16 or float16", weight.dtype)
    require(weight.dim() == 2 and weight.numel() > 0, "weight: must be [N, K], not empty", tuple(weight.shape))
    whole = weight.shape[1] % GROUP == 0
    require(whole or not rotated, f"weight: rotated channels must be a multiple of {GROUP}", weight.shape[1])
    rows = quantize_reference(weight, dtype, rotated=rotated, largest=LARGEST_WEIGHT[dtype])
    return QuantizedWeight(rows.values, rows.scale.flatten(), rotated)


def fit_weight(values: Tensor, scale: Tensor) -> QuantizedWeight:
    """Take over 8-bit numbers of a file as they are, rows of e4m3 but for a power of two each.

    It brings a row's largest number between 14 and 28, so that FP16 sums hold them and small numbers are kept.

    Args:
        values: [N, K], contiguous; int8, or float8_e4m3fn within +-448.
        scale: fp32, [] for all numbers or [N, 1] for each output channel.

    Returns:
        The same weight, not rotated. int8 is not copied. Of e4m3 rows scaled to 448 numbers of magnitude 1/4 and more
        are exact, and smaller ones become multiples of 2^-5 (in the file's numbers); rows of small numbers are exact.

    Raises:
        ValueError: a shape, dtype or stride is not as above.
    """
    require(values.dtype in EIGHT_BIT, "values: must be int8 or float8_e4m3fn", values.dtype)
    require(values.dim() == 2 and values.numel() > 0, "values: must be [N, K], not empty", tuple(values.shape))
    require(values.is_contiguous(), "values: must be contiguous", f"strides {values.stride()}")
    outputs = values.shape[0]
    shape = tuple(scale.shape)
    require(shape in ((), (outputs, 1)), f"scale: must be [] or [{outputs}, 1] for values {list(values.shape)}", shape)
    require(scale.dtype == torch.float32, "scale: must be float32", scale.dtype)
    each = scale.expand(outputs, 1).flatten().contiguous()
    if values.dtype == torch.int8:
        return QuantizedWeight(values, each, rotated=False)
    wide = values.float()
    largest = wide.abs().amax(1)
    shift = torch.exp2(torch.floor(torch.log2(LARGEST_WEIGHT[values.dtype] / largest)))
    shift = torch.where(largest > 0, shift, torch.ones_like(shift))
    return QuantizedWeight((wide * shift[:, None]).to(values.dtype), each / shift, rotated=False)
