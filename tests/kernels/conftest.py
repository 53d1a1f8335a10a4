"""Fresh memory is NaN, or -128, inside a fence: no kernel passes by luck that skips an element or writes past it."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

FENCE = 1024  # elements on either side of a fresh tensor


def _fenced(allocate: Callable[..., Tensor], fences: list[Tensor]) -> Callable[..., Tensor]:
    def empty(*args, **kwargs) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if not ((tensor.is_floating_point() or tensor.dtype == torch.int8) and tensor.is_contiguous()):
            return tensor
        size, poison = tensor.numel(), -128 if tensor.dtype == torch.int8 else float("nan")
        memory = torch.full((size + 2 * FENCE,), poison, dtype=tensor.dtype, device=tensor.device)
        fences.extend((memory[:FENCE], memory[FENCE + size :]))
        return memory[FENCE : FENCE + size].view(tensor.shape)

    return empty


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fences: list[Tensor] = []
    monkeypatch.setattr(torch, "empty", _fenced(torch.empty, fences))
    monkeypatch.setattr(torch, "empty_like", _fenced(torch.empty_like, fences))
    yield
    assert all(map(_is_whole, fences)), "a kernel wrote outside its output"


def _is_whole(fence: Tensor) -> bool:
    return bool((fence == -128).all() if fence.dtype == torch.int8 else fence.isnan().all())


@pytest.fixture(autouse=True)
def same_numbers_every_run() -> None:
    torch.manual_seed(0)
