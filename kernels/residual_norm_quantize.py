"""Residual, layer norm and 8 bits in one pass: the kernels of layer_norm_quantize.py, for a stream that takes more."""

import torch
from torch import Tensor

from ._quantized import Quantized
from ._row_norm import RowNorm
from .layer_norm_quantize import normalise_to_8bit


def residual_layer_norm_quantize(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    *,
    eps: float,
    gate: Tensor | None = None,
    first_tokens: int = 0,
    rotated: bool = False,
) -> Quantized:
    """Add y, or `gate * y`, to the residual stream in its memory; return it normalised and weighted, in 8 bits.

    Args:
        x: [B, T, C], the residual stream, finite, contiguous; float32, bfloat16 or float16; C <= 8192. Written to.
        y: [B, T, C], what the block computed, contiguous, any of those dtypes, on x's device.
        weight: [C], contiguous, any of those dtypes, on x's device.
        bias: like weight.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.
        eps: added to the variance, in units of x squared.
        gate: [B, R, C], channels adjacent, any of those dtypes, on x's device. R is 1 (one timestep per sample) or 2
            (the first tokens have a timestep of their own). Slices and expanded batches are fine.
        first_tokens: tokens [0, first_tokens) take row 0, the others the last row; of no effect where R is 1.
        rotated: multiply each 128 channels by the orthonormal Hadamard matrix before rounding.

    Returns:
        [B, T, C] in 8 bits, one scale per token.

    Raises:
        ValueError: a shape, dtype, stride, device or first_tokens is not as above.
    """
    norm = RowNorm(x=x, scale=weight, shift=bias, eps=eps, y=y, gate=gate, first_tokens=first_tokens)
    return normalise_to_8bit(norm, dtype, rotated=rotated)


def residual_layer_norm_modulate_quantize(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype,
    *,
    eps: float,
    gate: Tensor | None = None,
    first_tokens: int = 0,
    rotated: bool = False,
) -> Quantized:
    """Add y, or `gate * y`, to the residual stream in its memory; return it normalised and modulated, in 8 bits.

    Args:
        x: [B, T, C], the residual stream, finite, contiguous; float32, bfloat16 or float16; C <= 8192. Written to.
        y: [B, T, C], what the block computed, contiguous, any of those dtypes, on x's device.
        scale: [B, R, C], channels adjacent, any of those dtypes, on x's device. R is 1 (one timestep per sample) or 2
            (the first tokens have a timestep of their own). Slices and expanded batches are fine.
        shift: like scale.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.
        eps: added to the variance, in units of x squared.
        gate: [B, R, C], like scale; its R may be another.
        first_tokens: tokens [0, first_tokens) take row 0, the others the last row; of no effect where R is 1.
        rotated: multiply each 128 channels by the orthonormal Hadamard matrix before rounding.

    Returns:
        [B, T, C] in 8 bits, one scale per token.

    Raises:
        ValueError: a shape, dtype, stride, device or first_tokens is not as above.
    """
    norm = RowNorm(x=x, scale=scale, shift=shift, eps=eps, y=y, gate=gate, first_tokens=first_tokens)
    return normalise_to_8bit(norm, dtype, rotated=rotated)
