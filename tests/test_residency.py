"""Blocks on the device: the right ones at any speed, in any order; no thread, and no wrong block, after trouble."""

import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from blocks import (
    BLOCK_BYTES,
    SLOT_BYTES,
    Block,
    CopyingResidency,
    Loads,
    is_block,
    make_block,
    make_residency,
    make_residency_in_place,
    movers,
    slow,
)

from wanfast.errors import CheckpointError
from wanfast.residency import Residency
from wanfast.residency.slots import HostSlots
from wanfast.residency.store import HostBlock

PASSES = ["high_noise", "high_noise", "high_noise", "low_noise", "low_noise"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert movers() == []


def check_pass(residency: Residency[Block], expert: str, num_blocks: int = 5) -> None:
    count = 0
    for index, block in enumerate(residency.blocks(expert)):
        assert is_block(block, expert, index), f"{expert} block {index}"
        count += 1
    assert count == num_blocks


def check_all(residency: Residency[Block], passes: list[str], num_blocks: int = 5) -> None:
    residency.begin(passes)
    for expert in passes:
        check_pass(residency, expert, num_blocks)
    residency.end()


@pytest.mark.parametrize("num_slots", range(12))
@pytest.mark.parametrize("ram", [0, None])
def test_every_block_is_right_for_every_number_of_slots(num_slots: int, ram: int | None) -> None:
    residency = make_residency(num_slots=num_slots, ram=ram)
    check_all(residency, PASSES)
    check_all(residency, PASSES)
    residency.clear_device()
    check_all(residency, PASSES)
    residency.release()


@pytest.mark.parametrize("seed", range(4))
def test_every_block_is_right_at_every_speed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads, copies and uses take random times; a copy shows its bytes one half after the other."""
    rng = random.Random(seed)
    fill = HostSlots.fill

    def in_two_halves(self: HostSlots, slot: int, block: HostBlock) -> None:
        self.memory[slot].fill_(0xFF)
        time.sleep(rng.uniform(0, 0.003))
        fill(self, slot, block)

    monkeypatch.setattr(HostSlots, "fill", in_two_halves)
    residency = make_residency(Loads(lambda *_: time.sleep(rng.uniform(0, 0.003))), num_slots=rng.randint(2, 4))
    residency.begin(PASSES)
    for expert in PASSES:
        for index, block in enumerate(residency.blocks(expert)):
            assert is_block(block, expert, index)
            time.sleep(rng.uniform(0, 0.004))
            assert is_block(block, expert, index), "overwritten while in use"
    residency.end()


@pytest.mark.parametrize("num_slots", [2, 3, 5])
def test_copies_run_under_compute(num_slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a block is in use, the one after it arrives."""
    fill, arrived = HostSlots.fill, threading.Semaphore(0)

    def tell(self: HostSlots, slot: int, block: HostBlock) -> None:
        fill(self, slot, block)
        arrived.release()

    monkeypatch.setattr(HostSlots, "fill", tell)
    residency = make_residency(num_slots=num_slots)
    passes = ["high_noise", "low_noise"]
    residency.begin(passes)
    assert arrived.acquire(timeout=10)
    for expert in passes:
        for index, _ in enumerate(residency.blocks(expert)):
            if (expert, index) != ("low_noise", 4):
                assert arrived.acquire(timeout=10), f"nothing arrives while {expert} block {index} is in use"
    residency.end()


def test_a_resident_block_is_moved_once_per_run() -> None:
    loads = Loads()
    residency = make_residency(loads, num_slots=9, num_blocks=10)
    check_all(residency, ["high_noise"] * 6, num_blocks=10)
    assert len(loads.keys) < 2 * 6 + 10  # 9 of 10 stay: a copy or two per pass beside the first
    loads.keys.clear()
    residency = make_residency(loads, num_slots=20, num_blocks=10)
    check_all(residency, PASSES, num_blocks=10)
    check_all(residency, PASSES, num_blocks=10)
    assert sorted(loads.keys) == sorted((expert, i) for expert in ("high_noise", "low_noise") for i in range(10))
    residency.release()


def test_blocks_move_before_they_are_asked_for() -> None:
    loads = Loads()
    residency = make_residency(loads, num_slots=5)
    residency.begin(["high_noise", "low_noise"])
    deadline = time.monotonic() + 10
    while len(loads.keys) < 6 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert loads.keys == [*(("high_noise", i) for i in range(5)), ("low_noise", 0)]
    residency.end()


@pytest.mark.parametrize("num_slots", [2, 3, 5, 8, 10])
@pytest.mark.parametrize("announced", [[], ["low_noise"], ["high_noise"], PASSES])
def test_another_order_than_announced_is_right_too(announced: list[str], num_slots: int) -> None:
    residency = make_residency(num_slots=num_slots)
    residency.begin(announced)
    for expert in ["high_noise", "low_noise", "low_noise", "high_noise"]:
        check_pass(residency, expert)
    check_all(residency, PASSES)


@pytest.mark.parametrize("stop_at", range(5))
@pytest.mark.parametrize("num_slots", [2, 3, 9])
def test_a_pass_cut_short_leaves_nothing_waiting_and_nothing_wrong(stop_at: int, num_slots: int) -> None:
    residency = make_residency(Loads(slow(0.001)), num_slots=num_slots)
    residency.begin(PASSES)
    check_pass(residency, "high_noise")
    blocks = residency.blocks("high_noise")
    for _ in range(stop_at + 1):
        next(blocks)
    blocks.close()
    assert movers() == []
    check_all(residency, PASSES)


def test_an_exception_of_the_consumer_stops_the_movers() -> None:
    residency = make_residency(num_slots=2)
    residency.begin(PASSES)
    with pytest.raises(ZeroDivisionError):
        for index, _ in enumerate(residency.blocks("high_noise")):
            1 / (index - 2)
    gc.collect()
    assert movers() == []


def test_a_pass_left_for_another_cannot_go_on() -> None:
    residency = make_residency(num_slots=2)
    first = residency.blocks("high_noise")
    next(first)
    check_pass(residency, "low_noise")
    with pytest.raises(RuntimeError, match="high_noise: this pass"):
        next(first)
    check_pass(residency, "high_noise")


@pytest.mark.parametrize("verb", ["clear_device", "release", "end", "begin"])
def test_a_pass_over_released_blocks_cannot_go_on(verb: str) -> None:
    residency = make_residency(num_slots=2)
    blocks = residency.blocks("high_noise")
    next(blocks)
    getattr(residency, verb)(*([PASSES] if verb == "begin" else []))
    with pytest.raises(RuntimeError, match="high_noise: this pass"):
        next(blocks)
    check_all(residency, PASSES)


def test_a_release_from_another_thread_ends_the_wait_for_a_block() -> None:
    entered, gate = threading.Event(), threading.Event()

    def hang(expert: str, index: int) -> None:
        entered.set()
        gate.wait(10)

    def release() -> None:
        entered.wait(10)
        while residency._mover is None:
            time.sleep(0.001)
        residency.end()

    residency = make_residency(Loads(hang), num_slots=2)
    releasing = threading.Thread(target=release)
    releasing.start()
    with pytest.raises(RuntimeError, match="released"):
        next(residency.blocks("high_noise"))
    gate.set()
    releasing.join()


@pytest.mark.parametrize("num_slots", [2, 3, 9, 10])
@pytest.mark.parametrize("bad", [("high_noise", 0), ("high_noise", 3), ("low_noise", 0), ("low_noise", 4)])
def test_a_block_that_cannot_be_read_ends_the_run_by_name(bad: tuple[str, int], num_slots: int) -> None:
    def fail(expert: str, index: int) -> None:
        if (expert, index) == bad and is_broken:
            raise CheckpointError(f"/weights/x.safetensors: tensor of {expert} {index} is not finite")

    is_broken = True
    residency = make_residency(Loads(fail), num_slots=num_slots)
    residency.begin(PASSES)
    with pytest.raises(CheckpointError, match=f"tensor of {bad[0]} {bad[1]} is not finite"):
        for expert in PASSES:
            check_pass(residency, expert)
    residency.end()
    assert movers() == []
    is_broken = False
    check_all(residency, PASSES)


@pytest.mark.parametrize("fault_at", [0, 1, 7])
def test_a_copy_that_fails_ends_the_run_and_leaves_no_half_block(
    fault_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill, count = HostSlots.fill, 0

    def fail(self: HostSlots, slot: int, block: HostBlock) -> None:
        nonlocal count
        count += 1
        if count == fault_at + 1:
            self.memory[slot].fill_(0xAB)
            raise RuntimeError("the copy failed")
        fill(self, slot, block)

    monkeypatch.setattr(HostSlots, "fill", fail)
    residency = make_residency(num_slots=4)
    residency.begin(PASSES)
    with pytest.raises(RuntimeError, match="the copy failed"):
        for expert in PASSES:
            check_pass(residency, expert)
    check_all(residency, PASSES)


def test_with_room_for_an_expert_on_a_cpu_nothing_is_copied() -> None:
    blocks = {(expert, i): make_block(expert, i) for expert in ("high_noise", "low_noise") for i in range(5)}
    for num_slots in (None, 5, 100):
        residency = make_residency_in_place(lambda expert, i: blocks[expert, i], num_slots=num_slots)
        residency.begin(PASSES)
        for expert in PASSES:
            for index, block in enumerate(residency.blocks(expert)):
                assert block is blocks[expert, index]
                assert movers() == []


@pytest.mark.parametrize(("free", "kept"), [(0, 0), (100, 0), (150, 1), (300, 2), (10 * SLOT_BYTES, 5)])
def test_on_a_cpu_blocks_stay_as_far_as_memory_is_free(free: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has 113 bytes of its own; they may take four fifths of what is free."""
    assert BLOCK_BYTES == 113
    monkeypatch.setattr("wanfast.residency.residency.free_memory", lambda device: free)
    loads = Loads()
    residency = make_residency_in_place(loads, num_slots=None)
    for _ in range(2):
        loads.keys.clear()
        check_pass(residency, "high_noise")
    assert loads.keys == [("high_noise", index) for index in range(kept, 5)]


def test_one_expert_is_let_go_before_the_next_is_loaded() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def load(expert: str, index: int) -> Block:
        if expert == "low_noise":
            gc.collect()
            assert not any(reference() is not None for reference in alive), "the first expert is still in memory"
        return make_block(expert, index)

    residency = make_residency_in_place(load, num_slots=None)
    for block in residency.blocks("high_noise"):
        alive.append(weakref.ref(block.weight))
    del block
    assert all(reference() is not None for reference in alive)
    check_pass(residency, "low_noise")


def test_a_model_that_is_dropped_takes_its_thread_along() -> None:
    residency = make_residency(num_slots=2)
    residency.begin(PASSES)
    assert len(movers()) == 1
    del residency
    gc.collect()
    assert movers() == []


def test_the_process_ends_though_a_run_was_left() -> None:
    code = """
import sys; sys.path.insert(0, "tests")
from blocks import make_residency
residency = make_residency(num_slots=2)
residency.begin(["high_noise"] * 100)
blocks = residency.blocks("high_noise")
next(blocks)
print("left")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


def test_views_can_be_used_in_inference_mode() -> None:
    residency = make_residency(num_slots=2)
    with torch.inference_mode():
        check_all(residency, PASSES)
    check_all(residency, PASSES)


@pytest.mark.parametrize("num_slots", [0, 2, 3, 8, 20])
def test_slots_are_measured_where_their_size_is_not_given(num_slots: int) -> None:
    """Blocks of different sizes, those of the second expert larger."""

    def load(expert: str, index: int) -> Block:
        block = make_block(expert, index)
        size = 50 * index if expert == "high_noise" else 1000
        return replace(block, extra=(*block.extra, torch.full((size,), index, dtype=torch.int16)))

    residency = CopyingResidency(load, 5, torch.device("cpu"), num_slots * SLOT_BYTES)
    for expert in ["high_noise", "low_noise", "low_noise", "high_noise"]:
        for index, block in enumerate(residency.blocks(expert)):
            assert is_block(block, expert, index)
            assert block.extra[1].tolist() == [index] * (50 * index if expert == "high_noise" else 1000)
    residency.release()


def test_released_blocks_are_loaded_anew() -> None:
    """Their owner may have changed them."""
    loads = Loads()
    for residency in (make_residency(loads, num_slots=2, ram=None), make_residency_in_place(loads, num_slots=None)):
        check_pass(residency, "high_noise")
        residency.release()
        loads.keys.clear()
        check_pass(residency, "high_noise")
        assert len(loads.keys) == 5


def test_released_slots_are_freed_although_a_broken_pass_is_remembered() -> None:
    """An exception's traceback keeps the generator, and with it the mover."""
    residency = make_residency(num_slots=5)
    kept: list[object] = []
    for blocks in (residency.blocks("high_noise"), residency.blocks("low_noise")):
        kept += [blocks]
        memory = weakref.ref(next(blocks).weight)
    assert memory() is not None
    residency.release()
    gc.collect()
    assert memory() is None
