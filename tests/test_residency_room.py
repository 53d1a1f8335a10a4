"""Host memory that blocks take: what is needed last makes room, nothing goes before that, and no copy is disturbed."""

import time
from collections.abc import Iterator
from functools import cache
from itertools import combinations

import pytest
import torch
from blocks import BLOCK_BYTES, SLOT_BYTES, Loads, is_block, make_block, make_residency, movers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_residency_cuda import PASSES, play, run
from torch import Tensor

from wanfast.residency import cuda
from wanfast.residency.moves import Key, plan_moves
from wanfast.residency.store import HostStore

PINNED = SLOT_BYTES - 256 + 15  # of a block: the last tensor is not padded
HIGH, LOW = ("high_noise", "low_noise")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert movers() == []


def copy_all(store: HostStore, keys: list[Key]) -> None:
    """What a mover asks for, each copy over before the next."""
    store.expect(keys)
    for at, key in enumerate(keys):
        block = store.block(key, is_copied_again=key in keys[at + 1 :])
        run = torch.empty(block.layout.num_bytes, dtype=torch.uint8)
        block.read(0, run)
        store.copied(key, lambda: None)


def fewest_loads(keys: list[Key], room: int) -> int:
    """By trying everything: after each copy any of what is there, the block itself included, may stay."""

    @cache
    def rest(at: int, kept: frozenset[Key]) -> int:
        if at == len(keys):
            return 0
        have = kept | {keys[at]}
        choices = [frozenset(some) for size in range(room + 1) for some in combinations(sorted(have), size)]
        return (keys[at] not in kept) + min(rest(at + 1, choice) for choice in choices)

    return rest(0, frozenset())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([HIGH, LOW]), st.integers(0, 2)), min_size=1, max_size=9), st.integers(0, 3))
def test_no_way_to_keep_blocks_loads_fewer(keys: list[Key], room: int) -> None:
    loads = Loads()
    store = HostStore(loads, None, room * BLOCK_BYTES)
    copy_all(store, keys)
    assert len(loads.keys) == fewest_loads(keys, room)
    assert store.taken <= room * BLOCK_BYTES


def needed_together(moves: list[Key]) -> int:
    """Blocks at once that have had a copy and will have another."""
    return max(len(set(moves[: at + 1]) & set(moves[at + 1 :])) for at in range(len(moves)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 4), st.integers(2, 9))
def test_with_room_for_what_is_needed_at_once_nothing_is_loaded_twice(high: int, low: int, num_slots: int) -> None:
    """Not for both experts: the second takes the first one's room."""
    accesses = [(expert, index) for expert in [HIGH] * high + [LOW] * low for index in range(6)]
    moves = [move.key for move in plan_moves(accesses, num_slots).moves]
    loads = Loads()
    store = HostStore(loads, None, needed_together(moves) * BLOCK_BYTES)
    copy_all(store, moves)
    assert sorted(loads.keys) == sorted(set(moves))


def test_with_room_for_everything_nothing_goes() -> None:
    """The next generation, another one than was announced, finds all of it."""
    loads = Loads()
    store = HostStore(loads, None, None)
    first, second = ([(expert, index) for index in range(5)] for expert in (HIGH, LOW))
    copy_all(store, first + second)
    copy_all(store, second)
    copy_all(store, first)
    assert len(loads.keys) == 10
    assert store.taken == 10 * BLOCK_BYTES


def test_pinned_memory_passes_on_once_its_copy_is_over() -> None:
    given_out: list[Tensor] = []
    waited: list[Key] = []

    def pin(num_bytes: int) -> Tensor:
        given_out.append(torch.empty(num_bytes, dtype=torch.uint8))
        return given_out[-1]

    store = HostStore(make_block, pin, 2 * PINNED)
    keys = [(HIGH, 0), (HIGH, 1)] * 2 + [(LOW, 0), (LOW, 1)] * 2
    store.expect(keys)
    for at, key in enumerate(keys):
        block = store.block(key, is_copied_again=key in keys[at + 1 :])
        assert block.is_pinned, f"copy {at}"
        assert is_block(unpacked(block), *key)
        store.copied(key, lambda key=key: waited.append(key))
        assert store.taken == 2 * PINNED or at == 0
    assert len(given_out) == 2, "pinned anew, where memory of the right size was there"
    assert waited == [(HIGH, 0), (HIGH, 1)]


def unpacked(block: object) -> object:
    from wanfast.residency.packing import unpack

    run = torch.empty(block.layout.num_bytes, dtype=torch.uint8)  # type: ignore[attr-defined]
    block.read(0, run)  # type: ignore[attr-defined]
    return unpack(block.layout, run)  # type: ignore[attr-defined]


def test_a_limit_of_pinned_memory_is_shared_by_the_experts_one_after_the_other() -> None:
    pinned = []

    def pin(num_bytes: int) -> Tensor | None:
        pinned.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8) if len(pinned) <= 2 else None

    store = HostStore(make_block, pin, None)
    keys = [(HIGH, index) for index in range(3)] * 2 + [(LOW, index) for index in range(3)] * 2
    store.expect(keys)
    got = []
    for at, key in enumerate(keys):
        got.append(store.block(key, is_copied_again=key in keys[at + 1 :]).is_pinned)
        store.copied(key, lambda: None)
    assert got == [True, True, False] * 4
    assert len(pinned) == 3, "asked again after a refusal"


@pytest.mark.parametrize("eagerness", [0.0, 0.7])
@pytest.mark.parametrize("room", [1, 2, 4, 6])
@pytest.mark.parametrize("num_slots", [2, 3, 7, 10])
def test_no_copy_reads_memory_that_passed_on(
    num_slots: int, room: int, eagerness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The streams run late: a block's memory may be wanted for another while its copy has not begun."""
    monkeypatch.setattr(cuda, "BOUNCE_BYTES", 256)
    gpu = play(monkeypatch, room, eagerness)
    run(gpu, num_slots, room * PINNED, PASSES)


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.001)


@pytest.mark.parametrize("room", [6, 9])
def test_the_second_expert_is_loaded_ahead_into_the_room_of_the_first(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for one expert and a little: once the first is on the device, the second takes its place."""
    gpu, loads = play(monkeypatch, 0, 0.5), Loads()
    residency = make_residency(loads, num_slots=5, device="cuda", ram=room * BLOCK_BYTES)
    residency.begin([HIGH, HIGH, LOW])
    everything = sorted((expert, index) for expert in (HIGH, LOW) for index in range(5))
    wait_until(lambda: len(loads.keys) >= 10)
    assert sorted(loads.keys) == everything
    assert residency._store.taken <= room * BLOCK_BYTES
    for expert in [HIGH, HIGH, LOW]:
        for index, block in enumerate(residency.blocks(expert)):
            gpu.finish()
            assert is_block(block, expert, index)
    assert sorted(loads.keys) == everything, "loaded twice"
    residency.release()


def test_loading_ahead_waits_for_room_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots, and room for the blocks of one expert: all of it is needed until the last pass over the first one."""
    gpu, loads = play(monkeypatch, 0, 0.5), Loads()
    residency = make_residency(loads, num_slots=2, device="cuda", ram=5 * PINNED)
    passes = [HIGH, HIGH, HIGH, LOW, LOW]
    residency.begin(passes)
    for at, expert in enumerate(passes):
        for index, block in enumerate(residency.blocks(expert)):
            gpu.finish()
            assert is_block(block, expert, index)
            if at == 0:
                assert all(name == HIGH for name, _ in loads.keys), "room was taken from what is needed sooner"
    assert sorted(loads.keys) == sorted((expert, index) for expert in (HIGH, LOW) for index in range(5))
    residency.release()
