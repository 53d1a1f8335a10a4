"""Schedules of moves: never a wrong block, as few copies as there can be, and nothing waits where copies are fast."""

import math
import runpy
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from residency_rates import Case, cases, run

from wanfast.residency.moves import Key, Move, Schedule, plan_moves
from wanfast.residency.timeline import Timeline, simulate


def generation(num_blocks: int, steps: dict[str, int], clips: int = 1) -> list[Key]:
    """Accesses of some clips, one after the other."""
    one = [(expert, index) for expert, count in steps.items() for _ in range(count) for index in range(num_blocks)]
    return one * clips


@st.composite
def runs(draw: st.DrawFn, most_blocks: int = 12) -> tuple[list[Key], int, list[Key | None]]:
    """Accesses, slots, and what the slots hold from an earlier run."""
    num_blocks = draw(st.integers(1, most_blocks))
    experts = draw(st.lists(st.sampled_from(["high_noise", "low_noise"]), min_size=1, max_size=6))
    accesses = [(expert, index) for expert in experts for index in range(num_blocks)]
    if draw(st.booleans()):  # any order at all
        accesses = draw(st.lists(st.sampled_from(accesses), min_size=1, max_size=40))
    num_slots = draw(st.integers(1, 2 * num_blocks + 1))
    known = [("high_noise", index) for index in range(num_blocks)] + [("old", 0), ("old", 1)]
    held = draw(st.lists(st.sampled_from(known), unique=True, max_size=num_slots))
    gaps = draw(st.integers(0, num_slots - len(held)))
    return accesses, num_slots, draw(st.permutations([*held, *[None] * gaps]))


def follow(schedule: Schedule, resident: list[Key | None], num_slots: int) -> None:
    """Read every slot as an access would, with each copy made as early as it may be, and as late."""
    for is_early in (True, False):
        slots: list[Key | None] = [*resident, *[None] * (num_slots - len(resident))]
        waiting = list(schedule.moves)
        for access, key in enumerate(schedule.accesses):
            while waiting and (waiting[0].free_after < access if is_early else waiting[0].first_use == access):
                move = waiting.pop(0)
                slots[move.slot] = move.key
            assert slots[schedule.slots[access]] == key, f"access {access} finds another block"
        assert not waiting


@settings(max_examples=600, deadline=None)
@given(runs())
def test_every_access_finds_its_block(run: tuple[list[Key], int, list[Key | None]]) -> None:
    accesses, num_slots, resident = run
    schedule = plan_moves(accesses, num_slots, resident)
    assert schedule.accesses == tuple(accesses)
    follow(schedule, resident, num_slots)
    assert [move.first_use for move in schedule.moves] == sorted({move.first_use for move in schedule.moves})
    for move in schedule.moves:
        assert move.free_after < move.first_use
        if num_slots > 1:  # the copy has at least one access to hide under
            assert move.free_after < max(move.first_use - 1, 0)


def fewest_copies(accesses: list[Key], num_slots: int, resident: list[Key | None]) -> int:
    """Try every choice: from each set of blocks on the device, every set one copy makes of it."""
    states = {frozenset(key for key in resident if key is not None): 0}
    for access, key in enumerate(accesses):
        in_use = set(accesses[max(access - 1, 0) : access]) if num_slots > 1 else set()
        following: dict[frozenset[Key], int] = {}
        for state, copies in states.items():
            if key in state:
                choices, cost = [state], copies
            else:
                room = [state] if len(state) < num_slots else []
                choices, cost = [s | {key} for s in [*room, *(state - {out} for out in state - in_use)]], copies + 1
            for choice in choices:
                following[choice] = min(cost, following.get(choice, cost))
        states = following
    return min(states.values())


@settings(max_examples=300, deadline=None)
@given(runs(most_blocks=5))
@example((generation(5, {"high_noise": 2, "low_noise": 2}), 3, []))
@example((generation(5, {"high_noise": 2, "low_noise": 2}), 5, []))
def test_no_other_choice_copies_less(run: tuple[list[Key], int, list[Key | None]]) -> None:
    accesses, num_slots, resident = run
    assert len(plan_moves(accesses, num_slots, resident).moves) == fewest_copies(accesses, num_slots, resident)


def assert_no_hazard(schedule: Schedule, timeline: Timeline) -> None:
    """No slot is written while it is read, read before it is written, or written twice at once."""
    held: dict[int, Key] = {}
    free_at: dict[int, float] = {}
    reads = [
        (span, slot, key, False)
        for span, slot, key in zip(timeline.accesses, schedule.slots, schedule.accesses, strict=True)
    ]
    writes = [(span, move.slot, move.key, True) for span, move in zip(timeline.copies, schedule.moves, strict=True)]
    for span, slot, key, is_write in sorted([*reads, *writes], key=lambda event: event[0].start):
        assert span.start >= free_at.get(slot, 0.0)
        free_at[slot] = span.end
        if is_write:
            held[slot] = key
        else:
            assert held.get(slot, key) == key
    for engine in (timeline.accesses, timeline.copies):
        assert all(one.end <= two.start for one, two in pairwise(engine))


seconds = st.floats(0.001, 1.0)


@settings(max_examples=1200, deadline=None)
@given(
    st.integers(2, 12) | st.sampled_from([30, 40]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(1, 2),
    st.integers(2, 90),
    seconds,
    st.floats(0.01, 1.0),
    st.integers(0, 2**32),
)
def test_nothing_waits_where_a_block_copies_no_longer_than_it_computes(
    num_blocks: int, high: int, low: int, clips: int, num_slots: int, compute: float, share: float, seed: int
) -> None:
    random = Random(seed)
    accesses = generation(num_blocks, {"high_noise": high, "low_noise": low + (high == 0)}, clips)
    schedule = plan_moves(accesses, num_slots)
    each = [compute * random.uniform(1, 2) for _ in accesses]
    copies = [compute * share * random.uniform(0.5, 1) for _ in schedule.moves]
    timeline = simulate(schedule, each, copies)
    assert_no_hazard(schedule, timeline)
    first, *others = timeline.stalls
    assert first == pytest.approx(copies[0])
    assert max(others, default=0) <= 1e-9
    assert timeline.seconds == pytest.approx(math.fsum(each) + copies[0])


@settings(max_examples=300, deadline=None)
@given(runs(), st.lists(seconds, min_size=80, max_size=80), st.lists(seconds, min_size=80, max_size=80))
def test_no_hazard_at_any_speed(
    run: tuple[list[Key], int, list[Key | None]], compute: list[float], copy: list[float]
) -> None:
    accesses, num_slots, resident = run
    schedule = plan_moves(accesses, num_slots, resident)
    timeline = simulate(schedule, compute[: len(accesses)], copy[: len(schedule.moves)])
    assert_no_hazard(schedule, timeline)
    work = sum(compute[: len(accesses)])
    assert timeline.seconds >= work - 1e-9
    assert sum(timeline.stalls) == pytest.approx(timeline.seconds - work)


def test_a_swap_puts_each_block_where_its_twin_was() -> None:
    steps, blocks = 3, 8
    schedule = plan_moves(generation(blocks, {"high_noise": steps, "low_noise": steps}), blocks)
    first, swap = schedule.moves[:blocks], schedule.moves[blocks:]
    assert [move.key for move in first] == [("high_noise", index) for index in range(blocks)]
    assert all(move.free_after == -1 for move in first)
    last_pass, next_pass = (steps - 1) * blocks, steps * blocks
    assert swap == tuple(
        Move(("low_noise", i), first[i].slot, first_use=next_pass + i, free_after=last_pass + i) for i in range(blocks)
    )


def test_with_room_for_everything_every_block_is_copied_once() -> None:
    accesses = generation(6, {"high_noise": 2, "low_noise": 2}, clips=3)
    assert len(plan_moves(accesses, 12).moves) == 12
    assert len(plan_moves(accesses, 12, [("low_noise", i) for i in range(6)]).moves) == 6


def test_two_slots_are_a_ring() -> None:
    schedule = plan_moves(generation(5, {"single": 2}), 2)
    assert schedule.slots == (0, 1) * 5
    assert [move.free_after for move in schedule.moves] == [-1, -1, *range(8)]


@pytest.mark.parametrize(("compute", "copy"), [(1.0, 3.0), (1.0, 1.0), (3.0, 1.0)])
def test_a_ring_takes_as_long_as_the_slower_of_the_two(compute: float, copy: float) -> None:
    """Closed form: with two slots each copy starts when the access two before it is over."""
    accesses = generation(10, {"single": 3})
    schedule = plan_moves(accesses, 2)
    timeline = simulate(schedule, [compute] * 30, [copy] * 30)
    assert timeline.seconds == pytest.approx(copy + 29 * max(compute, copy) + compute)


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("size", ["480p", "720p", "5B"])
def test_at_computed_speeds_streaming_and_the_swap_are_free(size: str, forwards: int) -> None:
    for case in cases(size, forwards):
        outcome = run(case)
        assert_no_hazard(outcome.schedule, outcome.timeline)
        assert outcome.step_ratio <= 1.02, case
        assert outcome.switch_ratio <= 1.02, case
        assert max(outcome.timeline.stalls[1:]) <= 1e-9, case


def test_what_cannot_be_hidden_is_told() -> None:
    """A short clip on half a link: each block copies for twice as long as it computes."""
    outcome = run(Case("RTX 4090", "480p, 17 frames", "8-bit", "PCIe 4.0 x8", num_slots=2, forwards=1))
    assert outcome.step_ratio == pytest.approx(351.3e6 / 12.5e9 / 0.013)


def test_the_picture_in_the_docs_is_of_these_schedules() -> None:
    root = Path(__file__).parents[1]
    script = runpy.run_path(str(root / "benchmarks/residency_timeline.py"))
    assert script["drawing"]() == (root / "docs/residency.svg").read_text(), "run benchmarks/residency_timeline.py"
