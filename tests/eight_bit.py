"""Operands in 8 bits for tests: random ones, what they stand for in float64, and memory that shows what was written."""

import pytest
import torch
from torch import Tensor

from wanfast.kernels import Quantized, QuantizedWeight, _matmul_8bit
from wanfast.kernels._tiles_8bit import GENERATIONS

FENCE = 1024  # elements on either side of a fresh tensor
POISON = -128  # no kernel writes it
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 16.0}
LARGEST_WEIGHT = {torch.int8: 127.0, torch.float8_e4m3fn: 28.0}
EIGHT_BIT = pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "e4m3"])


ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the tiles of its own generation")
OTHER_GENERATIONS = pytest.mark.parametrize("arch", [90, 120])  # Ampere's tiles are those of Ada


def run_as(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch the tiles of another generation than an RTX 4090's."""
    monkeypatch.setattr(_matmul_8bit, "generation_of", lambda _device: GENERATIONS[arch])


def random_values(shape: tuple[int, ...], dtype: torch.dtype, largest: float, device: torch.device) -> Tensor:
    """Numbers of all sizes up to the largest, of which there are some."""
    values = torch.randn(shape, device=device) * (largest / 3)
    values = values.clamp(-largest, largest)
    return (values.round() if dtype == torch.int8 else values).to(dtype)


def random_tokens(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, groups: int = 1, rotated: bool = False
) -> Quantized:
    """Tokens of random numbers and scales."""
    scale = torch.rand(*shape[:-1], groups, device=device) + 0.01
    return Quantized(random_values(shape, dtype, LARGEST[dtype], device), scale, rotated)


def random_weight(
    outputs: int, inputs: int, dtype: torch.dtype, device: torch.device, *, rotated: bool = False
) -> QuantizedWeight:
    """A weight of random numbers and scales."""
    scale = torch.rand(outputs, device=device) * 0.01 + 0.0001
    return QuantizedWeight(random_values((outputs, inputs), dtype, LARGEST_WEIGHT[dtype], device), scale, rotated)


def wide(x: Quantized) -> Tensor:
    """What tokens stand for in float64, not rotated back."""
    groups = x.scale.shape[-1]
    return (x.values.double().unflatten(-1, (groups, -1)) * x.scale.double()[..., None]).flatten(-2)


def product(
    x: Quantized, weight: QuantizedWeight, bias: Tensor | None = None, low_rank: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """What a linear makes of them in float64, [..., N]."""
    y = wide(x) @ (weight.values.double() * weight.scale.double()[:, None]).T
    if bias is not None:
        y += bias.double()
    if low_rank is not None:
        t, up = low_rank
        y += t.double() @ up.double().T
    return y


def decibels(want: Tensor, got: Tensor) -> float:
    """Signal over noise."""
    noise = (got.double() - want.double()).square().mean()
    return 10 * torch.log10(want.double().square().mean() / noise).item()


class Poisoned:
    """While it is entered, fresh int8 tensors hold POISON and lie inside a fence; on leaving, the fences are whole."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._fences: list[Tensor] = []
        allocate = torch.empty

        def empty(*args, **kwargs) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.dtype != torch.int8:
                return tensor
            size = tensor.numel()
            memory = torch.full((size + 2 * FENCE,), POISON, dtype=torch.int8, device=tensor.device)
            self._fences += [memory[:FENCE], memory[FENCE + size :]]
            return memory[FENCE : FENCE + size].view(tensor.shape)

        monkeypatch.setattr(torch, "empty", empty)

    def assert_whole(self) -> None:
        """No kernel wrote outside its output."""
        assert all(bool((fence == POISON).all()) for fence in self._fences)
