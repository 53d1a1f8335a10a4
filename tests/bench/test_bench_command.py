"""`wanfast bench` as a user meets it: files, exit codes, refusals; engines stand in, but for one run of wan-tiny."""

import ast
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_engines import InProcess, StandIn, make_frames, stop_time
from safetensors.torch import save_file

import wanfast
from wanfast.__main__ import main
from wanfast.bench import command, files, settle
from wanfast.bench.case import Case, plan_of
from wanfast.bench.measure import Peak
from wanfast.bench.rounds import Contender
from wanfast.bench.schema import faults, report_schema

SMALL = ["--tiny", "--size", "48x32", "--num-frames", 5, "--steps", 4]  # the stand-ins' own size


def run(*words: object) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """One run of everything as it is: wan-tiny, two tiers beside diffusers, each in a process of its own."""
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        asked = ["--tiny", "--size", "32x32", "--num-frames", 5, "--steps", 4, "--runs", 1, "--tiers", "exact,fp32"]
        assert run("bench", "a red circle", *asked, "-o", "out", "--quiet") == 0
        assert sorted(path.name for path in (folder / "out").iterdir()) == ["bench.json", "bench.md"]
        yield {
            "report": json.loads((folder / "out" / "bench.json").read_text()),
            "page": (folder / "out" / "bench.md").read_text(),
        }


def test_a_real_report_is_whole(real: dict[str, Any]) -> None:
    report = real["report"]
    assert faults(report, report_schema()) == []
    assert report["findings"] == []
    assert report["case"]["order"] == ["wanfast exact", "diffusers", "wanfast fp32"]
    assert (report["case"]["weights"], report["case"]["prompt"]) == ("wan-tiny", "a red circle")
    assert report["command"][:2] == ["wanfast", "bench"]
    stages = {"text", "denoise", "step", "decode", "write", "other", "total"}
    for engine in report["engines"]:
        assert stages <= engine["warm"].keys() and stages | {"load"} <= engine["cold"].keys()
        assert len(engine["step_seconds"]) == 4 and min(engine["step_seconds"]) > 0
        assert abs(engine["warm"]["other"]["median"]) < 0.5 * engine["warm"]["total"]["median"]
        assert 0 < engine["tflops"] < 10
        assert engine["peak"]["source"] == "measured"
        assert 50e6 < engine["memory"]["ram_before"] < engine["memory"]["ram"] < 10e9
        assert (engine["power"], engine["memory"]["vram_device"]) == (None, None)
    ours = [engine for engine in report["engines"] if engine["role"] == "wanfast"]
    assert all((engine["copied_bytes"], engine["stall_seconds"]) == (0, 0) for engine in ours)


def test_a_real_reports_videos_are_the_references(real: dict[str, Any]) -> None:
    engines = {engine["name"]: engine for engine in real["report"]["engines"]}
    (fp32,), (exact,) = (engines[f"wanfast {tier}"]["differences"] for tier in ("fp32", "exact"))
    assert fp32["worst_pixel"] <= 1 and (fp32["psnr"] is None or fp32["psnr"] > 60) and fp32["ssim"] > 0.9999
    assert 0 < exact["worst_pixel"] < 40 and exact["psnr"] > 35
    assert engines["diffusers"]["differences"] == []


def test_a_real_page_tells_it(real: dict[str, Any]) -> None:
    page = real["page"]
    for told in ("# wan-tiny, 32x32, 5 frames", "| wanfast exact |", "diffusers / this", "measured", "- **cold**: "):
        assert told in page


class Played:
    """What `bench` runs in place of processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ours, self.theirs = StandIn(), StandIn()
        self.cases: list[Case] = []

    def contenders(self, case: Case, checkout: Path | None, folder: Path) -> list[Contender]:
        self.cases.append(case)
        made = [Contender(name="diffusers", role="reference", host=InProcess(self.theirs, folder))]
        for tier in case.tiers:
            host = InProcess(self.ours, folder)
            made.append(Contender(name=f"wanfast {tier.name}", role="wanfast", host=host, tier=tier))
        return made


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Played:
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    stop_time(monkeypatch)
    engines = Played(tmp_path)
    monkeypatch.setattr(command, "contenders_of", engines.contenders)
    monkeypatch.setattr(command, "peak_rate", lambda device, dtype: Peak(1e12, "a peak", "measured"))
    return engines


def names() -> set[str]:
    return {str(path.relative_to(Path.cwd())) for path in Path.cwd().rglob("*") if path.is_file()}


def test_the_paths_go_to_stdout_and_the_rest_to_stderr(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", *SMALL, "-o", "out") == 0
    out, err = capsys.readouterr()
    assert out == "out/bench.json\nout/bench.md\n"
    assert re.search(r"^at least 0 s for all runs \(computed", err, re.MULTILINE)
    assert re.search(r"^run 1 of 8: wanfast fp32$", err, re.MULTILINE)
    assert re.search(r"^run 8 of 8: diffusers \(\d+ s so far\)$", err, re.MULTILINE)
    assert run("bench", *SMALL, "--json", "a.json", "--markdown", "b.md", "--quiet", "--runs", 1) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("a.json\nb.md\n", "")
    assert names() == {"out/bench.json", "out/bench.md", "a.json", "b.md"}
    assert json.loads(Path("a.json").read_text())["case"]["runs"] == 1


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (3599, "60 min"), (5960, "99 min"), (5980, "1.7 h"), (9e4, "25.0 h")],
)
def test_durations_are_said_shortly(seconds: float, said: str) -> None:
    assert settle.duration(seconds) == said


def test_the_least_time_counts_each_engine_at_its_own_rate(played: Played) -> None:
    """By hand: a forward's operations for every forward of every engine, and two padded prompts for diffusers."""
    assert run("bench", *SMALL, "--tiers", "exact,fp32", "--runs", 2, "--warmup", 1, "-o", "out", "--quiet") == 0
    case = played.cases[0]
    rates = {torch.float32: Peak(1e9, "", "measured"), torch.bfloat16: Peak(4e9, "", "measured")}
    dim, inner, ffn = case.config.text.dim, case.config.text.attention_dim, case.config.text.ffn_dim
    matrices = 4 * dim * inner + 3 * dim * ffn
    others = 2 * dim + case.config.text.num_buckets * case.config.text.num_heads  # two norms, and the positions' table
    padded = 2 * 2 * case.config.text.num_layers * (matrices + others) * 512
    forwards = 8 * plan_of(case).flops_per_forward  # 4 steps with guidance
    want = 4 * (padded / 1e9 + forwards / 1e9 + forwards / 4e9 + forwards / 1e9)
    assert settle.least_seconds(case, rates) == pytest.approx(want, rel=1e-9)


def test_what_is_there_is_kept(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("bench.json", "bench.md"):
        Path(name).write_text("mine")
        assert run("bench", *SMALL) == 2
        assert f"output: must not exist yet, got {name}" in capsys.readouterr().err
        assert (names(), Path(name).read_text(), played.cases) == ({name}, "mine", [])
        Path(name).unlink()
    Path("bench.md").write_text("mine")
    assert run("bench", *SMALL, "--overwrite") == 0
    assert Path("bench.md").read_text().startswith("# wan-tiny")


def test_what_appears_meanwhile_is_kept_too(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    def appear(engine: Any, *arguments: Any, own: Callable[..., Any] = StandIn.run) -> Any:
        Path("bench.json").write_text("mine")
        return own(engine, *arguments)

    played.ours.run = appear.__get__(played.ours)  # type: ignore[method-assign]
    assert run("bench", *SMALL) == 0
    assert capsys.readouterr().out == "bench-2.json\nbench.md\n"
    assert Path("bench.json").read_text() == "mine"


@pytest.mark.parametrize("when", ["run", "write"])
def test_what_is_interrupted_leaves_nothing(
    when: str, played: Played, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if when == "run":
        played.theirs.run = interrupt  # type: ignore[assignment, method-assign]
    else:
        monkeypatch.setattr(files.os, "fsync", interrupt)
    assert run("bench", *SMALL, "--json", "a.json") == 130
    out, err = capsys.readouterr()
    assert out == "" and "no report was written" in err
    assert names() == set()


def test_a_full_disk_leaves_nothing(
    played: Played, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert run("bench", *SMALL) == 1
    assert "bench.json: cannot be written (No space left on device)" in capsys.readouterr().err
    assert names() == set()


def test_a_slowdown_is_told_and_fails_when_asked(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", *SMALL, "--json", "old.json", "--markdown", "old.md") == 0
    again = ["bench", *SMALL, "--compare", "old.json", "--fail-if-slower", "--overwrite"]
    assert run(*again) == 0
    assert json.loads(Path("bench.json").read_text())["findings"] == []
    played.ours.frame = 0.5
    capsys.readouterr()
    assert run(*again) == 1
    out, err = capsys.readouterr()
    assert out == "bench.json\nbench.md\n"
    assert "SLOWER: wanfast fp32 decode: 2.5 s instead of 0 s" in err
    report = json.loads(Path("bench.json").read_text())
    assert report["compared_with"] == json.loads(Path("old.json").read_text())["date"]
    assert {(f["kind"], f["stage"]) for f in report["findings"]} == {("slower", "decode"), ("slower", "total")}
    assert run(*again[:-2], "--overwrite") == 0


def test_a_wrong_video_is_told_and_fails_when_asked(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    played.ours.frames = make_frames()
    played.ours.frames[1, 2, 3] += 50
    assert run("bench", *SMALL, "--fail-if-different") == 1
    out, err = capsys.readouterr()
    assert out == "bench.json\nbench.md\n"
    assert "WRONG: wanfast fp32: its worst pixel is 50/255" in err
    assert run("bench", *SMALL, "--overwrite", "--fail-if-slower") == 0


def test_no_engine_at_all_is_a_failure(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    played.ours.fails, played.theirs.fails = "load memory", "load memory"
    assert run("bench", *SMALL) == 1
    assert "no engine could run: vram: too little" in capsys.readouterr().err
    assert names() == set()


def test_without_diffusers_one_line_says_how_to_get_it(
    played: Played, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else found(name))
    assert run("bench", *SMALL) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "reference: needs diffusers" in err and "pip install wanfast[bench]" in err


MISTAKES = {
    "no model": ([], 2, "model: must be given"),
    "random without an alias": (["--random"], 2, "model: must be one of t2v-A14B, i2v-A14B, ti2v-5B"),
    "random of files": (["--random", "--high", "a.safetensors"], 2, "model: must be an alias"),
    "random and tiny": (["--random", "--tiny", "--model", "ti2v-5b"], 2, "random: must be left out with --tiny"),
    "unknown tier": (["--tiny", "--tiers", "exact,fast"], 2, "tiers: each must be a precision"),
    "unknown preset": (["--tiny", "--tiers", "fp32+fast"], 2, "tiers: each must be a precision"),
    "a tier twice": (["--tiny", "--tiers", "fp32,exact,fp32"], 2, "tiers: must name each tier once"),
    "no runs": (["--tiny", "--runs", 0], 2, "runs: must be at least 1"),
    "warm-up below 0": (["--tiny", "--warmup", -1], 2, "warmup: must be at least 0"),
    "size": (["--tiny", "--size", "30x32"], 2, "width: must be a multiple of 16"),
    "one guidance without": (["--tiny", "--guidance-low", 1, "--guidance-high", 3], 2, "guidance: must be above 1"),
    "guidance below 1": (["--tiny", "--guidance", 0.5], 2, "guidance: must be above 1"),
    "no folder": (["--tiny", "-o", "nowhere/out"], 1, "nowhere does not exist"),
    "one name for both": (["--tiny", "--json", "a", "--markdown", "./a"], 2, "markdown: must be another file"),
    "no earlier report": (["--tiny", "--compare", "old.json"], 2, "compare: must be a JSON file"),
    "empty tiers": (["--tiny", "--tiers", ""], 2, "tiers: must not be empty"),
    "no checkout": (["--tiny", "--reference", "."], 2, "reference: must be a checkout"),
    "device": (["--tiny", "--device", "cuda:7"], 2, "device: must be one this machine has"),
    "vram": (["--tiny", "--vram", "lots"], 2, "vram: must be an amount of memory"),
    "no LoRA file": (["--tiny", "--lora", "gone.safetensors"], 2, "lora: must be"),
    "unknown case preset": (["--tiny", "--preset", "fast"], 2, "preset: must be one of lightning4"),
    "unknown flag": (["--tiny", "--run", 3], 2, "--run: no such argument, did you mean --runs"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case: str, played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    words, code, named = MISTAKES[case]
    assert run("bench", *words) == code
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1), err
    assert named in err
    assert (names(), played.cases) == (set(), [])


def test_what_the_host_cannot_hold_is_refused(
    played: Played, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settle, "free_host_memory", lambda: 4 * 10**9)
    assert run("bench", "--random", "--model", "t2v-a14b", "--tiers", "fp32,exact") == 1
    err = capsys.readouterr().err
    assert "ram: the case needs " in err and "random weights of exact" in err and len(err.splitlines()) == 1
    assert played.cases == []
    monkeypatch.setattr(settle, "free_host_memory", lambda: 40 * 10**9)
    assert run("bench", "--random", "--model", "t2v-a14b", "--size", "48x32", "--num-frames", 5, "--steps", 4) == 0
    (case,) = played.cases
    assert case.is_speed_only and case.config.dit.dim == 5120 and case.device == "cpu"
    assert "**Speed only**" in Path("bench.md").read_text()


def test_a_case_is_settled_once_for_all(played: Played) -> None:
    assert run("bench", "--tiny", "--model", "I2V-a14b", "--size", "64x48", "--steps", 4, "--tiers", "lightning4") == 0
    (case,) = played.cases
    assert (case.weights, case.config.task, case.config.dit.dim) == ("tiny random", "i2v", 256)
    assert case.picture is not None and case.picture.size == (64, 48)
    assert case.request.seed == 0 and case.request.prompt == settle.PROMPT
    (tier,) = case.tiers
    assert (tier.precision, tier.preset) == ("fp32", "lightning4")
    assert tier.apply(case.request).num_inference_steps == 4
    assert case.reference_precision == "fp32"


def test_few_steps_and_loras_are_of_every_engine(played: Played) -> None:
    dim, layer = 256, "diffusion_model.blocks.0.self_attn.q"
    factors = {f"{layer}.lora_down.weight": torch.ones(2, dim), f"{layer}.lora_up.weight": torch.ones(dim, 2)}
    save_file(factors, "few steps.safetensors")
    words = ["--tiny", "--size", "48x32", "--num-frames", 5, "--preset", "lightning4"]
    assert run("bench", *words, "--lora", "few steps.safetensors:0.5@low", "--quiet") == 0
    (case,) = played.cases
    assert (case.request.num_inference_steps, case.request.solver, case.request.guidance) == (4, "euler", 1.0)
    (lora,) = case.loras
    assert (Path(lora.path).name, lora.strength, lora.target) == ("few steps.safetensors", 0.5, "low_noise")
    report, page = json.loads(Path("bench.json").read_text()), Path("bench.md").read_text()
    assert report["case"]["loras"] == [{"file": "few steps.safetensors", "strength": 0.5, "target": "low_noise"}]
    assert report["case"]["forwards"] == 4
    assert "with the LoRAs of every engine few steps.safetensors at 0.5" in page
    assert set(report["definitions"]["tiers"]) == {"exact", "8-bit", "cached", "few-step"}
    assert "- tier cached: none" in page


def test_diffusers_is_imported_by_functions_alone() -> None:
    """So that help, other commands and the process that measures do without it."""
    for path in (Path(wanfast.__file__).parent / "bench").glob("*.py"):
        tree = ast.parse(path.read_text())
        at_the_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        found = {name for node in at_the_top for name in _modules(node)}
        assert not found & {"diffusers", "transformers", "accelerate", "pynvml"}, path


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    full = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return [name.split(".")[0] for name in full]


def test_a_gpu_is_looked_at_by_another_process() -> None:
    assert command.apart(os.getpid) != os.getpid()
    with pytest.raises(ValueError):
        command.apart(partial(math.sqrt, -1.0))


def test_the_threads_are_those_of_this_process(played: Played) -> None:
    assert run("bench", *SMALL, "--runs", 1) == 0
    assert played.cases[0].threads == torch.get_num_threads()
