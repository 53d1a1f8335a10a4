"""Fresh memory is NaN, inside a fence: no kernel passes by luck that skips an element or writes past its end."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

FENCE = 1024  # elements on either side of a fresh tensor


def _fenced(allocate: Callable[..., Tensor], fences: list[Tensor]) -> Callable[..., Tensor]:
    def empty(*args, **kwargs) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if not (tensor.is_floating_point() and tensor.is_contiguous()):
            return tensor
        size = tensor.numel()
        memory = torch.full((size + 2 * FENCE,), float("nan"), dtype=tensor.dtype, device=tensor.device)
        fences.extend((memory[:FENCE], memory[FENCE + size :]))
        return memory[FENCE : FENCE + size].view(tensor.shape)

    return empty


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fences: list[Tensor] = []
    monkeypatch.setattr(torch, "empty", _fenced(torch.empty, fences))
    monkeypatch.setattr(torch, "empty_like", _fenced(torch.empty_like, fences))
    yield
    assert all(fence.isnan().all() for fence in fences), "a kernel wrote outside its output"


@pytest.fixture(autouse=True)
def same_numbers_every_run() -> None:
    torch.manual_seed(0)
