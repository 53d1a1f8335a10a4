"""What rounded keys have to be."""

import torch
from torch import Tensor

from wanfast.kernels import QuantizedKeys

HALF = 0.50001  # a step, with fp32's roundings of the product


def group_of(token: Tensor) -> Tensor:
    """Which of the four scales of its block a token has."""
    return token % 8 // 2


def assert_rounded(centred: Tensor, quantized: QuantizedKeys, *, off: float = 0.0) -> None:
    """Hold every group of 16 tokens of a head to float64, and places where there is no token to 0.

    Args:
        centred: [B, T, N, D] float64, less the mean.
        quantized: the rounded keys.
        off: share of the numbers that may be rounded the other way, by a step, where the last bits of `centred` decide.
    """
    batch, tokens, heads, dim = centred.shape
    blocks = -(-tokens // 64)
    assert quantized.values.dtype == torch.int8 and quantized.values.is_contiguous()
    assert quantized.values.shape == (batch, heads, blocks, 64, dim)
    assert quantized.scale.shape == (batch, heads, blocks, 4) and quantized.scale.is_contiguous()
    assert quantized.tokens == tokens
    assert (quantized.values >= -127).all()
    outside = 0
    for j in range(blocks):
        block = centred[:, j * 64 : (j + 1) * 64].transpose(1, 2)  # [B, N, at most 64, D]
        values = quantized.values[:, :, j].double()
        assert not values[:, :, block.shape[2] :].any()
        groups = group_of(torch.arange(block.shape[2]))
        for group in range(4):
            some, got = block[:, :, groups == group], values[:, :, : block.shape[2]][:, :, groups == group]
            step = some.abs().amax((2, 3)) / 127 if some.shape[2] else torch.ones(batch, heads)
            # With `off`, a number may have been rounded to 16 bits the other way before the scale was taken of it.
            close = {"rtol": 1e-5 if off == 0 else 2.0**-7, "atol": 0}
            torch.testing.assert_close(quantized.scale[:, :, j, group].double(), step.double().to(got), **close)
            error = (got - some / quantized.scale[:, :, j, group, None, None].double()).abs()
            assert (error <= (HALF if off == 0 else 1.5)).all()
            outside += int((error > HALF).sum())
    assert outside <= off * centred.numel()
