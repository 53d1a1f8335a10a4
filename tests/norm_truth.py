"""Layer norm with weights in float64, and what 8-bit results of it must satisfy."""

import torch
from torch import Tensor

EPS = 1e-6
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 16.0}


def rows_of(modulation: Tensor, tokens: int, first_tokens: int) -> Tensor:
    """Give each token its row of modulation [B, R, C], in float64: [B, T, C]."""
    late = (torch.arange(tokens, device=modulation.device) >= first_tokens).long()
    return modulation.double()[:, late.clamp_max(modulation.shape[1] - 1)]


def added(x: Tensor, y: Tensor, gate: Tensor | None, first_tokens: int) -> Tensor:
    """x + gate * y, or x + y, in float64."""
    return x.double() + (y.double() if gate is None else rows_of(gate, x.shape[1], first_tokens) * y.double())


def weighted_norm(x: Tensor, scale: Tensor, shift: Tensor, first_tokens: int = 0) -> Tensor:
    """Layer norm of x with a learned weight and bias [C], or with modulation [B, R, C]."""
    centred = x.double() - x.double().mean(-1, keepdim=True)
    normalised = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
    if scale.dim() == 1:
        return normalised * scale.double() + shift.double()
    rows = [rows_of(modulation, x.shape[1], first_tokens) for modulation in (scale, shift)]
    return normalised * (1 + rows[0]) + rows[1]


def hadamard() -> Tensor:
    """128 x 128, by Sylvester's construction: the sign is the parity of the bits that two indices share."""
    shared = torch.arange(128)[:, None] & torch.arange(128)
    parity = sum(shared >> bit & 1 for bit in range(7)) % 2
    return (1 - 2 * parity).double() / 128**0.5


def assert_is_quantized(got, want: Tensor, dtype: torch.dtype, *, rotated: bool, rounded: bool) -> None:
    """Hold 8-bit tokens to float64 ones: every value is the nearest one, by a scale that is the row's largest.

    Args:
        got: a `Quantized`.
        want: [..., C] float64, before rotation.
        dtype: of its values.
        rotated: as it must say.
        rounded: whether the rotation may round its input to bf16.
    """
    assert (got.values.dtype, got.scale.dtype, got.rotated) == (dtype, torch.float32, rotated)
    assert got.values.shape == want.shape
    assert got.values.is_contiguous()
    assert got.scale.shape == (*want.shape[:-1], 1)
    want = want.cpu()
    noise = 2e-6 * want.abs().amax(-1, keepdim=True)  # of the norm in fp32: 20 roundings of the row's largest
    if rotated:
        runs = want.unflatten(-1, (-1, 128))
        if (
            rounded
        ):  # bf16 errs by 2^-9 of each channel, and a sum of 128 of either sign by their length's share at most
            noise = noise + (2.0**-9 * runs.norm(dim=-1, keepdim=True)).expand_as(runs).flatten(-2)
        want = (runs @ hadamard()).flatten(-2)
    values, scale = got.values.double().cpu(), got.scale.double().cpu()
    assert (values.abs().amax(-1) == LARGEST[dtype]).all(), "the largest of a row is the largest there is"
    worst = noise.amax(-1, keepdim=True) / want.abs().amax(-1, keepdim=True)
    assert ((scale * LARGEST[dtype] / want.abs().amax(-1, keepdim=True) - 1).abs() <= worst + 1e-6).all()
    step = torch.ones_like(values)  # between neighbours of a value
    if dtype == torch.float8_e4m3fn:
        step = torch.exp2(torch.floor(torch.log2((want / scale).abs().clamp_min(2.0**-6))) - 3)
    off = (values * scale - want).abs() - noise
    assert (off <= 0.501 * step * scale).all(), f"{(off / step / scale).max().item():.3f} steps off"
