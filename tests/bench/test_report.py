"""A report tells what was planted: a slow stage, a wrong video, runs that differ; and it is what its schema says."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_engines import FRAMES, HEIGHT, WIDTH, InProcess, StandIn, make_frames, stop_time

from wanfast.bench.case import Case, Tier, plan_of
from wanfast.bench.compare import check_comparable, read_report, slower_stages
from wanfast.bench.engine import Run
from wanfast.bench.markdown import make_markdown
from wanfast.bench.measure import Footprint, Peak
from wanfast.bench.report import FORMAT, judge, make_report, stage_seconds
from wanfast.bench.rounds import Contender, run_rounds
from wanfast.bench.schema import faults, report_schema
from wanfast.checkpoint.lookup import Sources
from wanfast.config import T2V_A14B
from wanfast.errors import RequestError
from wanfast.request import Request

PEAK = Peak(2e15, "a card of the tests", "datasheet")
ABOUT: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": ["wanfast", "bench", "--tiny"],
    "commit": "0123456789ab+",
    "versions": {name: "1.0" for name in ("wanfast", "python", "torch", "triton", "diffusers", "transformers")},
    "machine": {"system": "Linux", "cpu": "a CPU", "cores": 2, "ram": 10**10, "gpu": None},
}
FP32, EXACT = Tier("fp32", "fp32"), Tier("exact", "exact")


def make_case(**changes: Any) -> Case:
    settled = {
        "weights": "wan-tiny",
        "sources": Sources(),
        "config": T2V_A14B,
        "request": Request(
            "a ball", width=WIDTH, height=HEIGHT, num_frames=FRAMES, num_inference_steps=4, shift=5.0, seed=0
        ),
        "picture": None,
        "tiers": (FP32,),
        "reference_precision": "fp32",
        "placement": "model",
        "device": "cpu",
        "vram": None,
        "ram": None,
        "runs": 3,
        "warmup": 0,
        "threads": 1,
    }
    return Case(**(settled | changes))


def bench(folder: Path, ours: dict[Tier, StandIn], theirs: StandIn | None = None, **changes: Any) -> dict[str, Any]:
    """Run stand-ins for the engines through everything but the command line; the report's case has four steps."""
    case = make_case(tiers=tuple(ours), **changes)
    assert len(plan_of(case).steps) == 4
    given = [Contender(name="diffusers", role="reference", host=InProcess(theirs or StandIn(), folder))]
    given += [
        Contender(name=f"wanfast {tier.name}", role="wanfast", host=InProcess(engine, folder), tier=tier)
        for tier, engine in ours.items()
    ]
    noise = torch.zeros(plan_of(case).latent_shape)
    results = run_rounds(given, noise, runs=case.runs, warmup=0, tell=lambda *_: None)
    report = make_report(case, results, {torch.float32: PEAK, torch.bfloat16: PEAK}, ABOUT)
    report["findings"] = judge(report, case, results)
    as_read: dict[str, Any] = json.loads(json.dumps(report, allow_nan=False))
    assert faults(as_read, report_schema()) == []
    return as_read


def engine_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(engine for engine in report["engines"] if engine["name"] == name)


def kinds(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [(finding["kind"], finding["engine"]) for finding in report["findings"]]


@pytest.fixture(autouse=True)
def _stopped_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_time(monkeypatch)


def test_what_sleeps_is_what_is_told(tmp_path: Path) -> None:
    steps = (2.0, 1.0, 6.0, 1.5)  # the schedule's first two are the high-noise expert's
    report = bench(tmp_path, {FP32: StandIn(text=3.0, steps=steps, frame=0.5)}, StandIn())
    assert [step.expert for step in plan_of(make_case()).steps] == ["high_noise"] * 2 + ["low_noise"] * 2
    ours = engine_of(report, "wanfast fp32")
    assert list(ours["warm"]) == ["text", "denoise", "step", "switch", "decode", "write", "other", "total"]
    assert list(ours["cold"]) == ["load", *ours["warm"]]
    median = {stage: spread["median"] for stage, spread in ours["warm"].items()}
    want = {"text": 3.0, "denoise": 10.5, "step": 1.25, "switch": 4.5, "decode": 2.5, "write": 0.0, "other": 0.0}
    assert median == pytest.approx(want | {"total": 16.0})
    assert ours["cold"] == pytest.approx(want | {"load": 0.0, "total": 16.0})
    assert ours["step_seconds"] == pytest.approx(steps)
    assert all(len(spread["runs"]) == 3 for spread in ours["warm"].values())
    assert (ours["copied_bytes"], ours["stall_seconds"]) == (1000, 0.5)
    assert report["case"]["order"] == ["wanfast fp32", "diffusers"]


def test_seconds_per_forward_are_of_steady_steps_and_give_the_rates(tmp_path: Path) -> None:
    ours = engine_of(bench(tmp_path, {FP32: StandIn(steps=(8.0, 2.0, 8.0, 3.0))}), "wanfast fp32")
    plan = plan_of(make_case())
    per_forward = ours["seconds_per_forward"]["median"]
    assert per_forward == pytest.approx(1.25)  # two forwards in a step with guidance
    assert ours["tflops"] == pytest.approx(plan.flops_per_forward / per_forward / 1e12)
    assert ours["share_of_peak"] == pytest.approx(ours["tflops"] * 1e12 / PEAK.flops)


def test_a_step_of_one_forward_is_not_taken_for_two(tmp_path: Path) -> None:
    tier = Tier("lightning4", "fp32", "lightning4")
    ours = engine_of(bench(tmp_path, {tier: StandIn(steps=(2.0,) * 4)}), "wanfast lightning4")
    assert (ours["forwards"], ours["preset"]) == (4, "lightning4")
    assert ours["seconds_per_forward"]["median"] == pytest.approx(2.0)


def test_switch_needs_a_step_to_hold_it_to() -> None:
    footprint = Footprint(**dict.fromkeys(Footprint.__slots__))
    plan = plan_of(make_case())

    def run(*steps: float) -> Run:
        return Run(seconds={"total": 10.0}, steps=steps, footprint=footprint, digest="", frames=None)

    assert stage_seconds(run(3.0, 1.0, 5.0, 1.0), plan)["switch"] == 4.0
    assert "switch" not in stage_seconds(run(3.0, 1.0, 5.0), plan)
    told = stage_seconds(run(), plan)
    assert told == {"other": 10.0, "total": 10.0}


def test_equal_videos_raise_no_word(tmp_path: Path) -> None:
    report = bench(tmp_path, {FP32: StandIn(), EXACT: StandIn()})
    assert report["findings"] == []
    (difference,) = engine_of(report, "wanfast exact")["differences"]
    assert difference == {
        **{"to": "diffusers", "identical": True, "psnr": None, "ssim": pytest.approx(1)},
        **{"worst_pixel": 0, "worst_frame": 0},
    }
    assert engine_of(report, "diffusers")["differences"] == []
    page = make_markdown(report)
    assert "| identical | 1.00000 | 0/255 |" in page
    assert "WRONG" not in page


def shifted(by: int) -> np.ndarray:
    frames = make_frames()
    frames[3, 4:9, 5:7, 1] += np.uint8(by)
    return frames


def test_a_planted_wrong_video_is_seen_and_flagged(tmp_path: Path) -> None:
    """One tier of two returns altered frames: its numbers tell it, and it alone is called wrong."""
    report = bench(tmp_path, {FP32: StandIn(frames=shifted(9)), EXACT: StandIn()})
    assert kinds(report) == [("different", "wanfast fp32")]
    (difference,) = engine_of(report, "wanfast fp32")["differences"]
    assert (difference["worst_pixel"], difference["worst_frame"]) == (9, 3)
    error = 10 * np.log10(255**2 / (81 * 10 / make_frames().size))
    assert difference["psnr"] == pytest.approx(error, abs=1e-6)
    assert difference["ssim"] < 1
    page = make_markdown(report)
    assert "**WRONG** wanfast fp32: its worst pixel is 9/255" in page
    assert "| 9/255 |" in page


@pytest.mark.parametrize(
    ("tier", "noise", "is_wrong"),
    [
        (FP32, 1, False),  # one step of 8 bits: the last rounding
        (FP32, 2, True),
        (EXACT, 2, False),
        (EXACT, 30, True),  # below 30 dB
        (Tier("lightning4", "fp32", "lightning4"), 60, False),  # another schedule makes another video
    ],
)
def test_how_far_a_tier_may_be(tmp_path: Path, tier: Tier, noise: int, is_wrong: bool) -> None:
    frames = make_frames() + np.random.default_rng(1).integers(0, noise + 1, (FRAMES, HEIGHT, WIDTH, 3)).astype(
        np.uint8
    )
    report = bench(tmp_path, {tier: StandIn(frames=frames)}, runs=1)
    assert kinds(report) == ([("different", f"wanfast {tier.name}")] if is_wrong else [])


def test_runs_that_differ_are_told(tmp_path: Path) -> None:
    class Unsteady(StandIn):
        def run(self, *arguments: Any) -> Any:
            self.frames = make_frames(len(self.seen))
            return super().run(*arguments)

    report = bench(tmp_path, {EXACT: Unsteady()})
    assert ("unsteady", "wanfast exact") in kinds(report)


def test_random_weights_are_speed_only_and_say_so(tmp_path: Path) -> None:
    report = bench(tmp_path, {FP32: StandIn(frames=shifted(90))}, weights="random")
    ours = engine_of(report, "wanfast fp32")
    assert (ours["differences"], ours["memory"]["ram"], report["findings"]) == ([], None, [])
    page = make_markdown(report)
    assert "**Speed only**" in page and "not told" in page and "identical" not in page


def test_an_engine_without_memory_has_a_row_of_its_own(tmp_path: Path) -> None:
    report = bench(tmp_path, {FP32: StandIn()}, StandIn(fails="run memory"))
    theirs = engine_of(report, "diffusers")
    assert (theirs["error"], theirs["cold"], theirs["warm"]) == ("vram: too little", None, {})
    assert kinds(report) == [("failed", "diffusers")]
    assert "**FAILED** diffusers: vram: too little" in make_markdown(report)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same case, and one with 30 ms more in one stage of one engine."""
    folder = tmp_path_factory.mktemp("reports")
    with pytest.MonkeyPatch.context() as patch:
        stop_time(patch)
        before = bench(folder, {FP32: StandIn(text=0.02), EXACT: StandIn(text=0.02)})
        after = bench(folder, {FP32: StandIn(text=0.05), EXACT: StandIn(text=0.02)})
    return before, after


def test_a_planted_slowdown_is_flagged_where_it_is(reports: tuple[dict[str, Any], dict[str, Any]]) -> None:
    before, after = reports
    found = slower_stages(after, before)
    told = [(f["kind"], f["engine"], f["stage"]) for f in found]
    assert told == [("slower", "wanfast fp32", "text")]  # of a total of four seconds it is nothing
    says = next(f["says"] for f in found if f["stage"] == "text")
    assert "0.05" in says and "instead of 0.02" in says
    page = make_markdown(after | {"findings": found})
    assert "**SLOWER** wanfast fp32 text: " in page


def spread(*runs: float) -> dict[str, Any]:
    return {"median": sorted(runs)[len(runs) // 2], "min": min(runs), "max": max(runs), "runs": list(runs)}


@pytest.mark.parametrize(
    ("before", "after", "is_slower"),
    [
        ((1.0, 1.0, 1.0), (1.04, 1.04, 1.04), False),  # under 5 %
        ((1.0, 1.0, 1.0), (1.06, 1.06, 1.06), True),
        ((1.0, 1.0, 1.2), (1.15, 1.15, 1.15), False),  # it varied by as much before
        ((1.0, 1.0, 1.0), (1.0, 1.15, 1.2), False),  # it varies by more now
        ((1.0, 1.0, 1.2), (1.25, 1.25, 1.25), True),
        ((0.001,) * 3, (0.0025,) * 3, False),  # less than a timer and a busy machine cost
        ((1.0,) * 3, (0.5,) * 3, False),
    ],
)
def test_slower_is_more_than_the_noise(
    reports: tuple[dict[str, Any], dict[str, Any]],
    before: tuple[float, ...],
    after: tuple[float, ...],
    is_slower: bool,
) -> None:
    old, new = copy.deepcopy(reports[0]), copy.deepcopy(reports[0])
    engine_of(old, "wanfast fp32")["warm"] = {"decode": spread(*before)}
    engine_of(new, "wanfast fp32")["warm"] = {"decode": spread(*after)}
    assert [(f["kind"], f["stage"]) for f in slower_stages(new, old)] == ([("slower", "decode")] if is_slower else [])


def test_a_slower_reference_and_another_machine_are_notes(reports: tuple[dict[str, Any], dict[str, Any]]) -> None:
    old, new = copy.deepcopy(reports[0]), copy.deepcopy(reports[0])
    engine_of(new, "diffusers")["warm"] = {"decode": spread(9.0, 9.0)}
    new["machine"]["cpu"] = "another"
    new["engines"] = [engine for engine in new["engines"] if engine["name"] != "wanfast exact"]
    assert [(f["kind"], f["engine"]) for f in slower_stages(new, old)] == [("note", "diffusers"), ("note", None)]


SPOILED: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": lambda report: report.update(format=FORMAT + 1),
    "no engines": lambda report: report.update(engines=[]),
    "a stage without runs": lambda report: report["engines"][0]["warm"]["text"].pop("runs"),
    "seconds as text": lambda report: report["engines"][0]["warm"]["text"].update(median="fast"),
    "an unknown field": lambda report: report["case"].update(host="mine"),
    "a truth for a number": lambda report: report["case"].update(steps=True),
}


@pytest.mark.parametrize("case", SPOILED)
def test_another_file_than_a_report_is_refused(
    case: str, reports: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    report = copy.deepcopy(reports[0])
    (tmp_path / "good.json").write_text(json.dumps(report))
    assert read_report(tmp_path / "good.json") == report
    SPOILED[case](report)
    (tmp_path / "bad.json").write_text(json.dumps(report))
    with pytest.raises(RequestError, match=r"compare: must be a JSON file that wanfast bench wrote, got .*bad.json"):
        read_report(tmp_path / "bad.json")


@pytest.mark.parametrize("text", ["", "[1", "[]", "[" * 100_000, '{"format": NaN}'])
def test_no_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(RequestError, match="compare: must be a JSON file that wanfast bench wrote"):
        read_report(tmp_path / "bad.json")
    with pytest.raises(RequestError, match=r"nothing\.json"):
        read_report(tmp_path / "nothing.json")


def test_other_cases_are_not_compared(reports: tuple[dict[str, Any], dict[str, Any]]) -> None:
    before, after = reports
    check_comparable(after["case"], before, "old.json")
    for name, value in (("width", 64), ("device", "cuda:0"), ("guidance", {"single": 1.0}), ("threads", 9)):
        with pytest.raises(RequestError, match=rf"compare: must be of the same case, got old.json with {name} "):
            check_comparable(after["case"] | {name: value}, before, "old.json")
    check_comparable(after["case"] | {"prompt": "another", "seed": 3, "runs": 9}, before, "old.json")


def test_what_a_user_wrote_does_not_break_the_page(tmp_path: Path) -> None:
    report = bench(tmp_path, {FP32: StandIn()})
    report["command"] = ["wanfast", "bench", "a | ball\n# Wrong `x`"]
    lines = make_markdown(report).splitlines()
    assert "`wanfast bench 'a | ball # Wrong 'x''`" in lines  # quoted, as the shell needs it
    tables = [line for line in lines if line.startswith("|")]
    assert len({line.count(" | ") for line in tables[:4]}) == 1
