"""What a plan says of memory is what a run does with it: slots, blocks in place, host memory; once and again."""

from pathlib import Path

import pytest
import torch
from blocks import make_block
from reference import loras
from reference.tiny import random_folder

import wanfast
from wanfast import forecast
from wanfast.__main__ import main
from wanfast.budget import Budget
from wanfast.errors import MemoryBudgetError
from wanfast.forecast import budget_here
from wanfast.pipeline import plan_for
from wanfast.residency import Residency

SMALL = {"width": 32, "height": 32, "num_frames": 1, "num_inference_steps": 4, "seed": 1}
ROOMY = 200 * 10**9


def load(**options: object) -> wanfast.Pipeline:
    return wanfast.load(random_folder(), device="cpu", **options)


def budget_of(pipeline: wanfast.Pipeline) -> Budget:
    return budget_here(pipeline.loaded, pipeline.plan(wanfast.Request("a", **SMALL)))


@pytest.mark.parametrize("slots", [None, 2, 2.5, 3, 4, 9])
@pytest.mark.parametrize("precision", ["fp32", "exact"])
def test_a_cpu_has_the_slots_of_the_plan_or_none(slots: float | None, precision: str) -> None:
    """wan-tiny has four blocks in each of two experts."""
    size = load(precision=precision).loaded.block_bytes
    pipeline = load(precision=precision, vram=None if slots is None else int(slots * size))
    budget = budget_of(pipeline)
    pipeline.generate("a", output="latents", **SMALL)
    residency = pipeline.loaded._residency
    assert budget.is_in_place == (slots is None or slots >= 4) == (residency._slots is None)
    assert len(residency._held) == (0 if budget.is_in_place else budget.num_slots)
    assert budget.is_as_stored == (precision == "fp32")
    held = sum(size for stage in budget.stages[1:2] for what, size in stage.items.items() if "kept" in what)
    held += 0 if budget.is_in_place else budget.num_slots * budget.slot_bytes
    if budget.is_in_place:
        held = budget.stages[1].items["blocks of an expert"]
    assert pipeline.loaded.host_bytes == pytest.approx(held, rel=0.05, abs=30_000)  # vectors that a file has in 16 bits


@pytest.mark.parametrize("missing", [1, 10**6])
def test_less_than_two_slots_on_a_cpu_are_refused(missing: int, capsys: pytest.CaptureFixture[str]) -> None:
    size = load().loaded.block_bytes
    with pytest.raises(MemoryBudgetError, match=rf"^vram: must hold 2 blocks of .* on a CPU, got .*; try {2 * size} "):
        load(vram=2 * size - missing).generate("a", **SMALL)
    line = ["plan", "a", "--model", str(random_folder()), "--device", "cpu", "--vram"]
    assert main([*line, str(2 * size - missing)]) == 1
    assert "vram: must hold 2 blocks" in capsys.readouterr().err
    assert main([*line, str(2 * size)]) == 0


@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_blocks_take_the_room_that_the_plan_has_for_them(kept: int) -> None:
    """Converted, and in place: those that find none are made anew for each use, and the video is the same."""
    roomy = load(precision="exact", ram=ROOMY)
    want = roomy.generate("a", output="latents", **SMALL)
    steps = budget_of(roomy).stages[1]
    size = roomy.loaded.block_bytes
    others = max(stage.total for stage in budget_of(roomy).stages) - steps.items["blocks of an expert"]
    room = others + (kept + 0.5) * size  # decoding takes more than the steps, and than two blocks while one is made
    tight = load(precision="exact", ram=int(room))
    budget = budget_of(tight)
    assert budget.host_missing == (4 - kept) * size
    got = tight.generate("a", output="latents", **SMALL)
    assert torch.equal(got, want)
    assert len(tight.loaded._residency._in_place) == kept
    assert tight.loaded.host_bytes <= kept * size


def test_what_a_model_holds_is_room_for_its_next_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load(precision="exact")
    monkeypatch.setattr(forecast, "free_host_memory", lambda: 2_300_000_000 - pipeline.loaded.host_bytes)
    before = budget_of(pipeline)
    pipeline.generate("a", output="latents", **SMALL)
    assert pipeline.loaded.host_bytes > 0
    assert budget_of(pipeline) == before


def test_a_system_that_does_not_tell_has_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(forecast, "free_host_memory", lambda: sys.maxsize)
    budget = budget_of(load())
    assert budget.limit is None and budget.host_room is None


def test_a_group_of_clips_leaves_room_for_those_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load(precision="exact", ram=3 * 10**9)
    budget = budget_of(pipeline)
    rooms: list[int] = []
    monkeypatch.setattr(pipeline.loaded, "allow_host", rooms.append)
    for clips in (1, 2, 5):
        forecast.bound_blocks(pipeline.loaded, [budget] * clips)
    assert budget.host_room is not None and budget.clip_bytes > 0
    assert rooms == [budget.host_room - (clips - 1) * budget.clip_bytes for clips in (1, 2, 5)]


def test_host_memory_can_be_bounded_between_runs() -> None:
    residency = Residency(make_block, 5, torch.device("cpu"), slot_bytes=1024)
    list(residency.blocks("high_noise"))
    assert residency.host_bytes == 5 * 113
    residency.clear_device()
    residency.allow_host(2 * 113)
    list(residency.blocks("high_noise"))
    assert residency.host_bytes == 2 * 113


def test_loras_are_held_to_memory_before_anything_is_loaded(tmp_path: Path) -> None:
    config = load().loaded.config
    style = loras.write_lora(
        tmp_path / "style.safetensors", loras.random_factors(loras.linear_layers(config.dit), rank=600)
    )
    bare = budget_of(load(ram=ROOMY))
    pipeline = load(ram=bare.peak.total + 1_000_000)
    assert budget_of(pipeline).fits
    opened = wanfast.lora.open_loras([style], config, pipeline.loaded.model.experts)
    with pytest.raises(MemoryBudgetError, match=r"^ram: .*LoRAs"):
        plan_for(pipeline.loaded, wanfast.Request("a", **SMALL), opened)
    with pytest.raises(MemoryBudgetError, match=r"^ram: .*LoRAs"):
        pipeline.generate("a", loras=[style], **SMALL)
    assert pipeline.loaded.host_bytes == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "read once and stay, of one expert at a time"),
        (["--precision", "exact"], "made once and stay, of one expert at a time"),
        (["--vram", "8MB"], "--vram is less than an expert: its blocks of 3.17 MB"),
    ],
    ids=str,
)
def test_a_plan_for_a_cpu_says_so(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "a", "--model", str(random_folder()), "--device", "cpu", *words]) == 0
    shown = capsys.readouterr().out
    assert told in shown
    assert "all of it is the host's: a CPU has no other" in shown
    assert "host: " not in shown
    assert shown.count("left to the system") == 3
