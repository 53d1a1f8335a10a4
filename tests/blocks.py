"""Small blocks of numbers to move about, each with values of its own."""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from wanfast.residency import Residency, packed_bytes

EXPERTS = {"high_noise": 1000, "low_noise": 2000}


@dataclass(frozen=True, slots=True)
class Inner:
    values: Tensor  # [3, 5], int8
    scale: Tensor  # [], fp32
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Block:
    weight: Tensor  # [7, 3], fp32
    inner: Inner
    bias: Tensor | None = None
    extra: tuple[Tensor, ...] = ()


BLOCK_BYTES = 7 * 3 * 4 + 15 + 4 + 5 * 2
SLOT_BYTES = packed_bytes([84, 15, 4, 10])


def make_block(expert: str, index: int) -> Block:
    """Another block for every expert and index, the same each time."""
    value = EXPERTS[expert] + index
    generator = torch.Generator().manual_seed(value)
    numbers = torch.randn(7, 3, generator=generator)
    inner = Inner(torch.full((3, 5), index, dtype=torch.int8), torch.tensor(float(value)))
    return Block(numbers, inner, extra=(torch.full((5,), value % 256, dtype=torch.bfloat16),))


def is_block(block: Block, expert: str, index: int) -> bool:
    """Whether a block is bit for bit the one that `make_block` makes."""
    want = make_block(expert, index)
    pairs = [(block.weight, want.weight), (block.inner.values, want.inner.values)]
    pairs += [(block.inner.scale, want.inner.scale), (block.extra[0], want.extra[0])]
    return block.bias is None and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


class Loads:
    """Makes blocks, and counts; `before` may be slow or fail."""

    def __init__(self, before: Callable[[str, int], None] | None = None) -> None:
        self.keys: list[tuple[str, int]] = []
        self._before = before

    def __call__(self, expert: str, index: int) -> Block:
        self.keys.append((expert, index))
        if self._before is not None:
            self._before(expert, index)
        return make_block(expert, index)


def slow(seconds: float) -> Callable[[str, int], None]:
    """What takes time before each load."""
    return lambda expert, index: time.sleep(seconds)


class CopyingResidency(Residency[Block]):
    """Copies on a CPU too, where everything fits."""

    def _is_in_place(self, experts: Iterable[str]) -> bool:
        return False


def make_residency(
    load: Callable[[str, int], Block] = make_block,
    *,
    num_slots: int,
    num_blocks: int = 5,
    device: str = "cpu",
    ram: int | None = 0,
) -> Residency[Block]:
    """A residency with memory for so many slots; with no memory for blocks in the host every move loads anew."""
    place = torch.device(device)
    return CopyingResidency(load, num_blocks, place, num_slots * SLOT_BYTES, slot_bytes=SLOT_BYTES, ram=ram)


def make_residency_in_place(
    load: Callable[[str, int], Block] = make_block, *, num_slots: int | None
) -> Residency[Block]:
    """A residency of five blocks on a CPU, as it is by itself."""
    budget = None if num_slots is None else num_slots * SLOT_BYTES
    return Residency(load, 5, torch.device("cpu"), budget, slot_bytes=SLOT_BYTES)


def movers() -> list[threading.Thread]:
    """Threads that move blocks."""
    return [thread for thread in threading.enumerate() if thread.name == "wanfast-residency"]
