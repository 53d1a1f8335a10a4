"""Blocks on the device: which are kept, which are loaded again, and that one expert goes before the next comes."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from wanfast.errors import RequestError
from wanfast.residency import Residency, parse_bytes, weight_bytes


@dataclass(frozen=True)
class Block:
    weight: Tensor
    extra: tuple[Tensor, ...] = ()


BLOCK_BYTES = 40


def make(budget: int | None, loads: list[tuple[str, int]], num_blocks: int = 4) -> Residency[Block]:
    def load(expert: str, index: int) -> Block:
        loads.append((expert, index))
        value = index + (100 if expert == "low_noise" else 0)
        return Block(torch.full((5,), float(value)), (torch.zeros(5),))

    return Residency(load, num_blocks, torch.device("cpu"), budget)


def values(residency: Residency[Block], expert: str) -> list[float]:
    return [float(block.weight[0]) for block in residency.blocks(expert)]


@pytest.mark.parametrize(("budget", "kept"), [(0, 0), (39, 0), (40, 1), (119, 2), (160, 4), (10**9, 4), (None, 4)])
def test_as_many_blocks_stay_as_the_budget_holds(budget: int | None, kept: int) -> None:
    loads: list[tuple[str, int]] = []
    residency = make(budget, loads)
    assert weight_bytes(next(residency.blocks("high_noise"))) == BLOCK_BYTES
    residency.release()
    for _ in range(2):
        loads.clear()
        assert values(residency, "high_noise") == [0, 1, 2, 3]
    assert loads == [("high_noise", index) for index in range(kept, 4)]


def test_the_blocks_of_the_other_expert_are_its_own() -> None:
    loads: list[tuple[str, int]] = []
    residency = make(80, loads)
    assert values(residency, "high_noise") == [0, 1, 2, 3]
    assert values(residency, "low_noise") == [100, 101, 102, 103]
    assert values(residency, "high_noise") == [0, 1, 2, 3]


def test_one_expert_is_let_go_before_the_next_is_loaded() -> None:
    alive: list[weakref.ref[Block]] = []

    def load(expert: str, index: int) -> Block:
        if expert == "low_noise":
            gc.collect()
            assert not any(reference() for reference in alive), "the first expert is still in memory"
        return Block(torch.zeros(5))

    residency: Residency[Block] = Residency(load, 2, torch.device("cpu"), None)
    for block in residency.blocks("high_noise"):
        alive.append(weakref.ref(block))
    del block
    assert all(reference() for reference in alive)
    assert len(list(residency.blocks("low_noise"))) == 2


def test_a_pass_that_was_cut_short_leaves_no_gap() -> None:
    loads: list[tuple[str, int]] = []
    residency = make(10**6, loads)
    for index, _ in enumerate(residency.blocks("high_noise")):
        if index == 1:
            break
    assert values(residency, "high_noise") == [0, 1, 2, 3]
    assert loads == [("high_noise", index) for index in (0, 1, 2, 3)]


@pytest.mark.parametrize(
    ("text", "want"),
    [("24GB", 24 * 10**9), ("16 GiB", 16 * 2**30), ("1.5g", 1_500_000_000), ("512", 512), (7, 7), ("10kb", 10_000)],
)
def test_amounts_of_memory_are_read(text: str | int, want: int) -> None:
    assert parse_bytes("vram", text) == want


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "0", "12XB", "1e9", "GB", "nan", None])
def test_what_is_no_amount_is_refused_by_name(text: str) -> None:
    with pytest.raises(RequestError, match=r"^vram: "):
        parse_bytes("vram", text)
