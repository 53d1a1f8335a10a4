"""Seconds of a plan from what earlier generations took here: noted once each, and never in the way."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

import wanfast
from wanfast import rates
from wanfast.budget import make_budget
from wanfast.config import T2V_A14B
from wanfast.plan import Plan, make_plan
from wanfast.predict import Rates, decode_chunk_flops, predict
from wanfast.rates import StageClock, measured_rates, note_rates, rates_file
from wanfast.request import Request
from wanfast.residency.slots import HostSlots
from wanfast.residency.store import HostBlock
from wanfast.weight_sizes import weight_sizes

STEP, CHUNK = 3.0, 2.0  # seconds


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def plan_of(num_steps: int = 6) -> Plan:
    request = Request("a", width=832, height=480, num_frames=13, num_inference_steps=num_steps)
    return make_plan(T2V_A14B, request, precision="exact")


def clock_of(plan: Plan, step: float = STEP, chunk: float = CHUNK) -> StageClock:
    """A run whose first step of each expert, and whose first chunk, take ten times as long."""
    clock, now = StageClock(), 100.0
    firsts = {0} | {min((one.index for one in plan.steps if one.expert == "low_noise"), default=0)}
    noted: list[tuple[int, float]] = []
    for index in range(len(plan.steps) + 1):
        noted.append((index, now))
        now += 10 * step if index in firsts else step
    clock.times["steps"] = noted
    ends = [0, *range(1, plan.num_frames + 1, 4)]
    clock.times["decode"] = [(done, now + (10 + at if at else 0) * chunk) for at, done in enumerate(ends)]
    return clock


def test_a_plan_takes_the_rates_of_earlier_runs() -> None:
    plan = plan_of()
    assert measured_rates(T2V_A14B, "cpu", "exact", 1e9) is None
    note_rates(T2V_A14B, plan, clock_of(plan))
    found = measured_rates(T2V_A14B, "cpu", "exact", 1e9)
    assert found is not None
    assert found.source == "measured"
    assert found.link == 1e9
    assert found.dit_flops == pytest.approx(2 * plan.flops_per_forward / STEP)
    assert found.vae_flops == pytest.approx(decode_chunk_flops(T2V_A14B, plan) / CHUNK)
    assert measured_rates(T2V_A14B, "cpu", "fp32", 1e9) is None


def test_the_median_of_the_last_runs_counts() -> None:
    plan = plan_of()
    for step in (50.0, 50.0, 1.0, 2.0, 3.0, 400.0, 3.5):
        note_rates(T2V_A14B, plan, clock_of(plan, step))
    found = measured_rates(T2V_A14B, "cpu", "exact", 1e9)
    assert found is not None
    assert found.dit_flops == pytest.approx(2 * plan.flops_per_forward / 3.0)


def test_a_damaged_file_is_measured_anew() -> None:
    plan = plan_of()
    rates_file().parent.mkdir(parents=True)
    key = rates._key(T2V_A14B, "cpu", "exact")
    endless = json.dumps({key: {"dit": [float("inf"), 1e-300], "vae": [1e12, "x", None]}})
    for text in ("{", "[]", '{"a": 3}', '{"a": {"dit": ["x"]}}', "", "[" * 10**5, f'{{"a": {"9" * 5000}}}', endless):
        rates_file().write_text(text)
        assert measured_rates(T2V_A14B, "cpu", "exact", 1e9) is None
        note_rates(T2V_A14B, plan, clock_of(plan))
        assert measured_rates(T2V_A14B, "cpu", "exact", 1e9) is not None


def test_a_disk_that_cannot_be_written_to_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(rates, "cache_folder", lambda: tmp_path / "file" / "prompts")
    plan = plan_of()
    note_rates(T2V_A14B, plan, clock_of(plan))
    assert measured_rates(T2V_A14B, "cpu", "exact", 1e9) is None


def test_too_little_was_seen() -> None:
    plan = plan_of(1)  # which may have waited for its weights
    note_rates(T2V_A14B, plan, clock_of(plan))
    assert measured_rates(T2V_A14B, "cpu", "exact", 1e9) is None
    note_rates(T2V_A14B, plan, StageClock())


def test_waits_for_blocks_are_not_in_the_rates_and_are_added_for_the_slots_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run on a slow link waits in every step; what is predicted of the same run is as long as it was."""
    plan = plan_of()
    link, num_slots = 2e9, 10
    sizes = weight_sizes(T2V_A14B, "exact")
    budget = replace(make_budget(T2V_A14B, plan, sizes, vram=None), num_slots=num_slots)
    rates_of_it = Rates(2 * plan.flops_per_forward / STEP, 1e12, link, "measured")
    truth = predict(T2V_A14B, plan, sizes, budget, rates_of_it)
    assert truth.stall > 5
    now, waited = 0.0, 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = StageClock(idle=lambda: waited)
    stall = truth.seconds_per_step - STEP
    for index in range(len(plan.steps) + 1):
        clock("steps", index, len(plan.steps))
        now, waited = now + STEP + stall, waited + stall
    clock.times["decode"] = clock_of(plan).times["decode"]
    note_rates(T2V_A14B, plan, clock)
    found = measured_rates(T2V_A14B, "cpu", "exact", link)
    assert found is not None
    assert found.dit_flops == pytest.approx(rates_of_it.dit_flops)
    again = predict(T2V_A14B, plan, sizes, budget, found)
    assert again.seconds_per_step == pytest.approx(STEP + stall)
    resident = predict(T2V_A14B, plan, sizes, replace(budget, num_slots=80), found)
    assert resident.seconds_per_step == pytest.approx(STEP)


def test_a_run_through_slots_tells_how_long_it_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy takes a while on a CPU, where the thread that computes waits for it."""
    fill, slept = HostSlots.fill, 0.002

    def slowly(self: HostSlots, slot: int, block: HostBlock) -> None:
        time.sleep(slept)
        fill(self, slot, block)

    monkeypatch.setattr(HostSlots, "fill", slowly)
    clocks: list[StageClock] = []
    monkeypatch.setattr("wanfast.generation.note_rates", lambda config, plan, clock: clocks.append(clock))
    pipeline = wanfast.load(device="cpu", vram="8MB")
    began = time.perf_counter()
    pipeline.generate("a ball", width=32, height=32, num_frames=1, num_inference_steps=3)
    took = time.perf_counter() - began
    idle = pipeline.loaded.traffic.idle_seconds
    assert idle == pipeline.loaded.traffic.stall_seconds > 0
    noted = [seconds for _, seconds in clocks[0].times["steps"]]
    assert 0 <= noted[-1] - noted[0] <= took - idle


def test_progress_is_passed_on() -> None:
    seen: list[tuple[str, int, int]] = []
    clock = StageClock(lambda *report: seen.append(report))
    clock("steps", 0, 2)
    clock("steps", 1, 2)
    assert seen == [("steps", 0, 2), ("steps", 1, 2)]
    assert [done for done, _ in clock.parts("steps")] == [0]


def test_a_run_leaves_its_rates_and_the_next_plan_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wanfast.__main__ import main

    monkeypatch.setattr(rates, "MIN_SECONDS", 0)
    small = ["--size", "32x32", "--num-frames", "9", "--steps", "8", "--device", "cpu"]
    assert main(["plan", "a ball", *small]) == 0
    assert "seconds" not in capsys.readouterr().out
    pipeline = wanfast.load(device="cpu")
    pipeline.generate("a ball", width=32, height=32, num_frames=9, num_inference_steps=8)
    assert main(["plan", "a ball", *small]) == 0
    assert "in all; from measured rates" in capsys.readouterr().out
