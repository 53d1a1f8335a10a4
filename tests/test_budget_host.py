"""Host memory in the plan: what a run really takes beside a GPU, what is refused, and a CPU's one memory for all."""

import re
from dataclasses import replace

import pytest
import torch
from blocks import make_block
from hypothesis import given, settings
from hypothesis import strategies as st

from wanfast.budget import Budget, make_budget
from wanfast.config import T2V_A14B, TI2V_5B
from wanfast.errors import MemoryBudgetError
from wanfast.fitting import refuse_what_cannot_fit
from wanfast.host_memory import HOST_RESERVE_BYTES, kept_blocks
from wanfast.plan import Plan, make_plan
from wanfast.request import Request
from wanfast.residency import gigabytes
from wanfast.residency.moves import plan_moves
from wanfast.residency.store import HostStore
from wanfast.weight_sizes import WeightSizes, weight_sizes

GB = 10**9
KEPT = "blocks, kept to be copied"


def _plan(device: str = "cuda", **asked: object) -> Plan:
    return make_plan(T2V_A14B, Request("a cat", **asked), precision="exact", device=device)  # type: ignore[arg-type]


def _budget(vram: int | None, ram: int | None, stored: str = "bf16", device: str = "cuda", **asked: object) -> Budget:
    plan, sizes = _plan(device, **asked), weight_sizes(T2V_A14B, "exact", stored)
    return make_budget(T2V_A14B, plan, sizes, vram=vram, ram=ram)


RUNS = st.lists(st.tuples(st.sampled_from(["high_noise", "low_noise"]), st.integers(1, 4)), min_size=1, max_size=3)


@settings(max_examples=30, deadline=None)
@given(RUNS, st.integers(2, 12), st.booleans())
def test_the_blocks_that_are_counted_are_those_that_the_store_keeps(
    runs: list[tuple[str, int]], num_slots: int, is_pinned: bool
) -> None:
    """Of converted blocks all, of those in files what is copied again and pinned: the moves are made with a store."""
    moves = [
        move.key
        for move in plan_moves(
            [(expert, index) for expert, count in runs for _ in range(count) for index in range(6)], num_slots
        ).moves
    ]
    pin = (lambda size: torch.empty(size, dtype=torch.uint8)) if is_pinned else None
    store = HostStore(make_block, pin, None)
    store.expect(moves)
    pinned = 0
    for at, key in enumerate(moves):
        store.block(key, is_copied_again=key in moves[at + 1 :])
        store.copied(key, lambda: None)
    pinned = sum(block.is_pinned for block in store._kept.values())
    kept = kept_blocks(tuple(runs), 6, num_slots, is_as_stored=is_pinned)
    assert kept.most == (pinned if is_pinned else len(store._kept))
    assert kept.at_once == max(len(set(moves[: at + 1]) & set(moves[at + 1 :])) for at in range(len(moves)))


def test_the_host_column_is_all_of_it_and_within_its_bound() -> None:
    for ram in (4, 8, 16, 32, 64, 128):
        for vram in (8, 12, 24, 80):
            for stored in ("fp32", "bf16", "fp8"):
                budget = _budget(vram * GB, ram * GB, stored)
                if not budget.fits_host:
                    assert ram == 4 and KEPT not in budget.host
                    continue
                assert sum(budget.host.values()) <= ram * GB
                assert budget.host["left to the system"] == HOST_RESERVE_BYTES
                assert budget.host_room == ram * GB - sum(budget.host.values()) + budget.host.get(KEPT, 0)
                if ram == 128:
                    assert not budget.host_missing


def test_moves_shift_so_that_every_block_of_a_stream_is_copied_again() -> None:
    """The block that is used last is evicted, another one each pass: 17 of 40 do not have a place of their own."""
    budget = _budget(24 * GB, None)
    assert budget.num_slots < 40
    assert budget.host[KEPT] == 80 * budget.slot_bytes


def test_one_expert_s_room_does_for_both() -> None:
    one = 40 * _budget(24 * GB, None).slot_bytes
    others = sum(_budget(24 * GB, None).host.values()) - 2 * one
    enough, less = (_budget(24 * GB, others + room) for room in (one, one - 1))
    assert enough.host[KEPT] == one and not enough.host_missing
    assert less.host_missing == 1


def test_a_resident_expert_in_16_bit_files_costs_no_host_memory_but_one_that_is_rounded_does() -> None:
    plan = make_plan(T2V_A14B, Request("a cat"), precision="int8", device="cuda")
    ready, rounded = (weight_sizes(T2V_A14B, "int8", stored) for stored in ("int8", "bf16"))
    assert ready.is_as_stored and not rounded.is_as_stored
    budgets = [make_budget(T2V_A14B, plan, sizes, vram=24 * GB, ram=64 * GB) for sizes in (ready, rounded)]
    assert all(budget.is_resident for budget in budgets)
    assert KEPT not in budgets[0].host
    assert budgets[1].host[KEPT] == 80 * rounded.slot
    assert budgets[1].host["blocks being loaded"] > 2 * rounded.slot
    small = make_budget(T2V_A14B, plan, rounded, vram=24 * GB, ram=32 * GB)
    assert small.fits and not small.host_missing, "a machine with 32 GB runs 8-bit A14B"


def test_strips_wait_on_the_host() -> None:
    pixels = 81 * 720 * 1280 * 3
    assert _budget(4 * GB, 64 * GB).host["pixels of strips"] == pixels
    assert "pixels of strips" not in _budget(24 * GB, 64 * GB).host
    decode = _budget(None, 5 * GB, device="cpu").stages[-1]
    assert decode.items["pixels of strips"] == pixels


def test_what_the_host_cannot_hold_is_refused_with_what_would() -> None:
    plan, sizes = _plan(), weight_sizes(T2V_A14B, "exact", "bf16")
    needed = sum(_budget(8 * GB, None).host.values()) - _budget(8 * GB, None).host[KEPT]
    assert refuse_what_cannot_fit(T2V_A14B, plan, sizes, vram=8 * GB, ram=needed).fits
    with pytest.raises(MemoryBudgetError) as refusal:
        refuse_what_cannot_fit(T2V_A14B, plan, sizes, vram=8 * GB, ram=needed - 1)
    message = str(refusal.value)
    told = (
        rf"ram: 1280x720 with 81 frames needs {gigabytes(needed)} of host memory beside the GPU \(left to the system "
    )
    assert re.match(told, message)
    offers = re.findall(r"(\d+)x(\d+) with (\d+) frames?", message)[1:]
    assert offers
    for width, height, frames in offers:
        smaller = _plan(width=int(width), height=int(height), num_frames=int(frames))
        assert make_budget(T2V_A14B, smaller, sizes, vram=8 * GB, ram=needed - 1).fits
    with pytest.raises(MemoryBudgetError, match=r"got 2\.20 GB; no size of this model fits$"):
        refuse_what_cannot_fit(T2V_A14B, plan, sizes, vram=8 * GB, ram=2_200_000_000)


CPU = st.tuples(
    st.sampled_from(["fp32", "bf16", "fp8"]),
    st.one_of(st.none(), st.integers(1, 80).map(lambda n: n * GB)),
    st.one_of(st.none(), st.integers(4, 100).map(lambda n: n * GB)),
    st.sampled_from([1, 33, 81]),
)


@settings(max_examples=60, deadline=None)
@given(CPU)
def test_a_cpu_has_one_memory(case: tuple[str, int | None, int | None, int]) -> None:
    """Nothing is beside it, and nothing is counted twice: what adapts to the room is what makes every plan fit."""
    stored, vram, ram, frames = case
    budget = _budget(vram, ram, stored, "cpu", num_frames=frames)
    assert budget.host == {} and budget.limit == ram
    sizes = weight_sizes(T2V_A14B, "exact", stored)
    expert = 40 * sizes.slot
    assert budget.is_in_place == (vram is None or vram >= expert)
    for stage in budget.stages:
        assert stage.items["left to the system"] == HOST_RESERVE_BYTES
        assert sum(what == "left to the system" for what in stage.items) == 1
    steps = next(stage for stage in budget.stages if stage.name.startswith("steps"))
    if budget.is_in_place:
        kept = steps.items.get("blocks of an expert", 0)
        assert kept + budget.host_missing == expert or (ram is None and kept == expert)
        assert not any("slots" in what for what in steps.items)
    else:
        assert vram is not None
        assert steps.items[f"{budget.num_slots} slots for 40 blocks"] == max(2, vram // sizes.slot) * sizes.slot
    if ram == 100 * GB and vram is None:
        assert budget.fits and not budget.host_missing


def test_more_room_on_a_cpu_never_makes_a_plan_worse() -> None:
    missing = [_budget(None, ram * GB, "fp32", "cpu").host_missing for ram in range(8, 60, 4)]
    assert missing == sorted(missing, reverse=True)
    assert missing[0] > 0 == missing[-1]


def test_blocks_that_stay_on_a_cpu_are_there_while_frames_are_decoded() -> None:
    for stored in ("fp32", "bf16"):
        budget = _budget(None, 64 * GB, stored, "cpu")
        assert [stage.items["blocks of an expert"] for stage in budget.stages] == [40 * budget.slot_bytes] * 3


def test_a_cpu_with_little_memory_reads_or_makes_some_blocks_for_each_use() -> None:
    """An expert of 14B has 28 GB in 16 bits."""
    for stored in ("fp32", "bf16"):
        budget = _budget(None, 24 * GB, stored, "cpu")
        steps = next(stage for stage in budget.stages if stage.name.startswith("steps")).items
        assert budget.fits and 0 < steps["blocks of an expert"] < 24 * GB and budget.host_missing > 0
        assert steps["blocks that are being read or made"] == 2 * budget.slot_bytes
        assert steps["blocks of an expert"] % budget.slot_bytes == 0
    slots = _budget(8 * GB, 64 * GB, "bf16", "cpu")
    steps = next(stage for stage in slots.stages if stage.name.startswith("steps")).items
    assert steps["blocks that are being read or made"] == slots.slot_bytes and "blocks, kept to be copied" not in steps


@pytest.mark.parametrize(
    ("size", "want"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (4096, "4.10 kB"),
        (8_390_000, "8.39 MB"),
        (12_000_000, "0.01 GB"),
        (25_769_803_776, "25.77 GB"),
        (2_249_700_000_000, "2.25 TB"),
        (9 * 10**18, "9,000.00 PB"),
    ],
)
def test_amounts_are_read_at_a_glance(size: int, want: str) -> None:
    assert gigabytes(size) == want


def test_sizes_say_what_is_converted() -> None:
    want = {
        ("fp32", "fp32"): True,
        ("fp32", "bf16"): False,
        ("exact", "fp32"): False,
        ("exact", "bf16"): True,
        ("exact", "fp8"): True,
        ("exact", "q4_k"): True,
        ("int8", "int8"): True,
        ("int8", "fp8"): False,
        ("int8", "bf16"): False,
        ("int8", "q4_k"): True,
        ("fp8", "fp8"): True,
    }
    got: dict[tuple[str, str], WeightSizes] = {
        case: weight_sizes(TI2V_5B, case[0], case[1])  # type: ignore[arg-type]
        for case in want
    }
    assert {case: sizes.is_as_stored for case, sizes in got.items()} == want
    assert all((sizes.loading == 2 * sizes.slot) == sizes.is_as_stored for sizes in got.values())
    assert (
        got["fp32", "fp32"].slot == got["fp32", "bf16"].slot == pytest.approx(2 * got["exact", "bf16"].slot, rel=0.01)
    )
    bf16, fp32 = got["exact", "bf16"], got["exact", "fp32"]
    matrix = TI2V_5B.dit.dim * TI2V_5B.dit.ffn_dim * 4
    assert fp32 == replace(bf16, is_as_stored=False, loading=2 * bf16.slot + matrix, file_block=fp32.file_block)
    assert bf16.file_block == bf16.slot and fp32.file_block == pytest.approx(2 * bf16.file_block, rel=0.01)
    assert got["int8", "bf16"].file_block == pytest.approx(2 * got["int8", "int8"].file_block, rel=0.02)
