"""What a plan counts of reading files is what a run reads: blocks, again where host memory has no room, and seconds."""

import json
import math
from typing import Any

import pytest
import torch
from blocks import Loads, make_residency
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.tiny import random_folder

import wanfast
from wanfast.__main__ import main
from wanfast.forecast import budget_here, sizes_of
from wanfast.host_memory import Read, reads_in_place, reads_of_moves
from wanfast.loaded import LoadedModel
from wanfast.open_file import OpenFile
from wanfast.predict import count_reads
from wanfast.residency.moves import plan_moves
from wanfast.residency.timeline import Reading, simulate

SMALL: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 1, "num_inference_steps": 6, "seed": 1}
OWN = 113  # bytes of a block of tests/blocks.py
RUNS = st.lists(st.tuples(st.sampled_from(["high_noise", "low_noise"]), st.integers(1, 4)), min_size=1, max_size=3)


def load(precision: str, slots: float | None, ram: int = 10**11) -> wanfast.Pipeline:
    """A tiny model on the CPU; its files hold fp32."""
    options: dict[str, Any] = {"device": "cpu", "precision": precision, "ram": ram}
    size = wanfast.load(random_folder(), **options).loaded.block_bytes
    return wanfast.load(random_folder(), vram=None if slots is None else int(slots * size), **options)


def ram_for(precision: str, slots: float | None, blocks: float) -> int:
    """Host memory in which so many blocks can be kept."""
    pipeline = load(precision, slots)
    budget = budget_here(pipeline.loaded, pipeline.plan(wanfast.Request("a", **SMALL)))
    kept = {"blocks of an expert", "blocks, kept to be copied", "blocks that are being read or made"}
    others = max(sum(size for what, size in stage.items.items() if what not in kept) for stage in budget.stages)
    return int(others + blocks * budget.slot_bytes)


@pytest.mark.parametrize("slots", [None, 2, 3])
@pytest.mark.parametrize("kept", [0.5, 1.5, 3.5, 8.5])
def test_blocks_are_loaded_as_often_as_is_counted(
    kept: float, slots: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files in fp32, in a run of the exact precision, which makes every block anew that it has not kept."""
    seen: list[tuple[str, int]] = []
    own = LoadedModel._read_block

    def reading(self: LoadedModel, expert: Any, index: int) -> Any:
        seen.append((expert, index))
        return own(self, expert, index)

    monkeypatch.setattr(LoadedModel, "_read_block", reading)
    pipeline = load("exact", slots, ram_for("exact", slots, kept))
    plan = pipeline.plan(wanfast.Request("a", **SMALL))
    budget, sizes = budget_here(pipeline.loaded, plan), sizes_of(pipeline.loaded, "exact")
    pipeline.generate("a", output="latents", **SMALL)
    counted = count_reads(plan, sizes, budget)
    assert counted.loads == len(seen) >= counted.blocks == 8
    assert counted.num_bytes == counted.loads * sizes.file_block
    assert counted.loads == 8 if kept > 8 else counted.loads > 8 if kept < 2 else True


@pytest.mark.parametrize("slots", [2, 3])
def test_blocks_as_they_are_stored_are_read_as_often_as_is_counted(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files in fp32, in a run of that precision: every copy reads its block."""
    read, own = [0], OpenFile.read
    experts = {random_folder() / f"{name}_noise_model/diffusion_pytorch_model.safetensors" for name in ("high", "low")}

    def reading(self: OpenFile, offset: int, target: torch.Tensor, name: str) -> None:
        read[0] += target.nbytes if self.path in experts and "block" in name else 0
        own(self, offset, target, name)

    monkeypatch.setattr(OpenFile, "read", reading)
    pipeline = load("fp32", slots)
    plan = pipeline.plan(wanfast.Request("a", **SMALL))
    counted = count_reads(plan, sizes_of(pipeline.loaded, "fp32"), budget_here(pipeline.loaded, plan))
    pipeline.generate("a", output="latents", **SMALL)
    copied = pipeline.loaded.traffic.copied_bytes
    assert counted.num_bytes == pytest.approx(read[0], rel=0.01) and copied >= read[0]
    assert counted.loads > counted.blocks


@settings(max_examples=25, deadline=None)
@given(RUNS, st.integers(2, 8), st.integers(0, 11))
def test_a_residency_loads_as_often_as_its_played_store(runs: list[tuple[str, int]], num_slots: int, kept: int) -> None:
    loads, room = Loads(), kept * OWN
    residency = make_residency(loads, num_slots=num_slots, ram=room)
    passes = [expert for expert, count in runs for _ in range(count)]
    residency.begin(passes)
    for expert in passes:
        for _ in residency.blocks(expert):
            pass
    residency.release()
    size = {"block_bytes": OWN, "file_bytes": 7, "is_as_stored": False, "is_pinned": False}
    reads = reads_of_moves(tuple(runs), 5, num_slots, room=room, **size)
    assert sum(read.num_bytes > 0 for read in reads) == len(loads.keys)
    assert {read.num_bytes for read in reads} <= {0, 7}
    assert len(reads) == len(plan_moves([(expert, index) for expert in passes for index in range(5)], num_slots).moves)


def test_beside_a_gpu_a_mapped_file_is_read_once_where_there_is_room_and_for_each_copy_where_there_is_none() -> None:
    runs = (("high_noise", 3), ("low_noise", 2))
    size = {"block_bytes": 10, "file_bytes": 10, "is_as_stored": True, "is_pinned": True}
    roomy, none = (reads_of_moves(runs, 6, 3, room=room, **size) for room in (None, 0))
    moves = len(plan_moves([(e, i) for e, n in runs for _ in range(n) for i in range(6)], 3).moves)
    assert sum(read.num_bytes for read in roomy) == 12 * 10
    assert [read.num_bytes for read in none] == [10] * moves and moves > 20
    assert not any(read.is_kept for read in none) and sum(read.is_kept for read in roomy) > 12


def test_in_place_what_does_not_stay_is_read_for_each_use() -> None:
    reads = reads_in_place((("high_noise", 2), ("low_noise", 1)), 3, block_bytes=10, file_bytes=4, room=25)
    assert [read.num_bytes for read in reads] == [4, 4, 4, 0, 0, 4, 4, 4, 4]


def test_seconds_of_reading_are_those_that_are_waited_for() -> None:
    """Closed forms: a disk slower than the card bounds a stream; what host memory keeps comes before it is needed."""
    accesses = [("single", index % 4) for index in range(12)]
    schedule = plan_moves(accesses, 2)
    moves = len(schedule.moves)
    compute, copy = [1.0] * 12, [0.25] * moves
    without = simulate(schedule, compute, copy)
    assert simulate(schedule, compute, copy, [Reading(0.0, False)] * moves) == without
    slow = simulate(schedule, compute, copy, [Reading(3.0, False)] * moves)
    assert slow.seconds == pytest.approx(3.0 * moves + 0.25 + 1.0, rel=0.05)
    # Each is read as soon as the one before it is: the k-th is there after k reads, however late it is needed.
    early = simulate(schedule, compute, copy, [Reading(0.5, True)] * moves)
    assert early.seconds == pytest.approx(0.75 + 12) and early.stalls[0] == 0.75 and sum(early.stalls[1:]) == 0
    late = [Reading(0.0, True)] * (moves - 1) + [Reading(50.0, True)]
    assert simulate(schedule, compute, copy, late).seconds == pytest.approx(50.25 + (12 - schedule.moves[-1].first_use))


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", "a", "--model", "t2v-a14b", "--gpu", "4090", "--vram", "12GB", *words, "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_a_plan_tells_reads_and_their_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--stored", "bf16", "--size", "480p")
    roomy, tight = plan(capsys, *words, "--ram", "64GB"), plan(capsys, *words, "--ram", "16GB")
    one = roomy["files"]["num_bytes"] / 80
    assert roomy["files"]["loads"] == roomy["files"]["blocks"] == 80 and roomy["files"]["loads_per_step"] == 0
    assert tight["files"]["num_bytes"] == pytest.approx(tight["files"]["loads"] * one)
    assert tight["files"]["loads"] == pytest.approx(80 + 38 * tight["files"]["loads_per_step"], abs=40)
    assert tight["files"]["bytes_per_step"] == pytest.approx(tight["files"]["loads_per_step"] * one)
    assert 15 < tight["files"]["loads_per_step"] < 40
    for told in (roomy, tight):
        assert told["seconds"]["reading"] == pytest.approx(told["files"]["num_bytes"] / 3e9)
        assert told["seconds"]["reading_source"] == "assumed"
    each = tight["files"]["bytes_per_step"] / 3e9  # more than a step computes in 20 s: nothing is waited for
    assert each < tight["seconds"]["per_step"] == pytest.approx(roomy["seconds"]["per_step"], rel=0.02)
    short = (*words, "--num-frames", "9")  # a step of a second or two: the disk is what it waits for
    fast, slow = plan(capsys, *short, "--ram", "64GB"), plan(capsys, *short, "--ram", "16GB")
    assert slow["seconds"]["per_step"] >= slow["files"]["bytes_per_step"] / 3e9 * 0.95 > fast["seconds"]["per_step"]


@pytest.mark.parametrize(
    ("words", "there", "missing"),
    [
        (("--stored", "bf16", "--ram", "64GB"), ["80 blocks are read, 56."], ["again", "convert", "no room"]),
        (("--stored", "bf16", "--ram", "16GB"), ["of them again", "host memory has no room"], ["convert", "made anew"]),
        (("--ram", "32GB"), ["are read and made anew", "rounding what they hold", "`wanfast convert`"], []),
    ],
    ids=str,
)
def test_the_page_says_so(
    words: tuple[str, ...], there: list[str], missing: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "a", "--model", "t2v-a14b", "--gpu", "4090", "--vram", "12GB", *words]) == 0
    page = capsys.readouterr().out
    files = page[page.index("\nfiles ") : page.index("\nseconds ")]
    assert "at 3.00 GB per second, which is assumed" in files
    assert all(text in files for text in there) and not any(text in files for text in missing)
    assert max(map(len, page.splitlines())) <= 120


def test_without_a_rate_reading_is_left_out() -> None:
    assert math.isinf(wanfast.predict.Rates(1.0, 1.0, 1.0, "computed").disk)
    assert Read(0, True).num_bytes == 0
