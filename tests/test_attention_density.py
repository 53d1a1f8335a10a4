"""Sparse attention in whole runs: asked for by name, in the steps that are said, and repeated, resumed and planned."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from reference.families import official_by_task
from torch import Tensor

import wanfast
import wanfast.run_state as run_state
from wanfast.__main__ import main
from wanfast.budget import make_budget
from wanfast.config import MODELS
from wanfast.errors import RequestError
from wanfast.machines import known_gpu
from wanfast.plan import Plan, kept_keys, make_plan, plan_to_dict
from wanfast.plan_text import format_plan
from wanfast.predict import datasheet_rates, predict
from wanfast.rates import StageClock, note_rates, rates_file
from wanfast.request import Request
from wanfast.run_state import RunKeeper, RunState
from wanfast.video import read_settings, read_video
from wanfast.weight_sizes import weight_sizes

SIZE, FRAMES, STEPS = 160, 17, 6  # 500 tokens: 4 blocks of queries, 8 of keys; two dense steps
T2V = MODELS["t2v-A14B"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return official_by_task(tmp_path_factory.mktemp("models"))


def latents_of(model: Path, task: str, precision: Any = "fp32", **options: Any) -> list[Tensor]:
    """The latents after each step."""
    seen: list[Tensor] = []
    image = Image.linear_gradient("L").resize((SIZE, SIZE)).convert("RGB") if task != "t2v" else None
    pipeline = wanfast.load(model, device="cpu", precision=precision)
    options = {"width": SIZE, "height": SIZE, "num_frames": FRAMES, "num_inference_steps": STEPS} | options
    arguments = {"seed": 3, "image": image, "output": "latents"} | options
    pipeline.generate("a red ball", on_step=lambda _, latents: seen.append(latents), **arguments)
    return seen


def difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_density_one_is_the_dense_run_bit_for_bit(precision: str, models: Callable[[str], Path]) -> None:
    options = {"width": 64, "height": 64, "num_frames": 9, "num_inference_steps": 3, "precision": precision}
    dense = latents_of(models("t2v"), "t2v", **options)
    one = latents_of(models("t2v"), "t2v", attention_density=1.0, **options)
    assert all(torch.equal(got, want) for got, want in zip(one, dense, strict=True))


@pytest.mark.parametrize("task", ["t2v", "i2v", "ti2v"])
def test_the_first_steps_are_dense_and_the_others_are_not(task: str, models: Callable[[str], Path]) -> None:
    size = {"width": 320, "height": 320} if task == "ti2v" else {}  # whose latents are half as large
    dense = latents_of(models(task), task, **size)
    sparse = latents_of(models(task), task, attention_density=0.2, **size)
    full = latents_of(models(task), task, attention_density=0.9999, **size)
    for step in range(STEPS):
        assert difference(full[step], dense[step]) < 2e-5  # the same sums in another order
        assert (difference(sparse[step], dense[step]) < 2e-5) == (step < 2)


@pytest.mark.parametrize(
    ("density", "message"),
    [
        (0, "above 0, up to 1 .all keys., got 0; for example 0.5"),
        (-0.5, "above 0, up to 1"),
        (1.01, "above 0, up to 1 .all keys., got 1.01"),
        (math.nan, "must be finite, got nan; for example 0.5"),
        ("0.5", "must be a number, got '0.5'"),
        (True, "must be a number, got True"),
    ],
)
def test_another_density_is_refused_by_name(density: Any, message: str) -> None:
    with pytest.raises(RequestError, match=f"attention_density: .*{message}"):
        make_plan(T2V, Request("a", attention_density=density), precision="exact")


def test_a_single_step_is_dense_and_says_so() -> None:
    request = Request("a", num_inference_steps=1, attention_density=0.5)
    with pytest.raises(RequestError, match=r"attention_density: must be 1 for a single step.*take 2 steps or more"):
        make_plan(T2V, request, precision="exact")
    assert make_plan(T2V, replace(request, attention_density=1), precision="exact").attention_density == 1


def plan(density: float | None, **options: Any) -> Plan:
    request = Request("a", width=832, height=480, seed=0, attention_density=density, **options)
    return make_plan(T2V, request, precision="int8", device="cuda")


@pytest.mark.parametrize(("steps", "num_dense"), [(40, 8), (50, 10), (4, 1), (2, 1), (6, 2), (11, 3)])
def test_the_first_fifth_of_the_steps_is_dense(steps: int, num_dense: int) -> None:
    sparse = plan(0.3, num_inference_steps=steps)
    assert sparse.num_dense_steps == num_dense
    assert [sparse.density_of(step) for step in sparse.steps] == [1.0] * num_dense + [0.3] * (steps - num_dense)
    assert plan(None, num_inference_steps=steps).num_dense_steps == steps


def test_the_plan_counts_what_is_computed() -> None:
    dense, sparse = plan(None), plan(0.3)
    assert dense.sparse_flops_per_forward == dense.flops_per_forward == sparse.flops_per_forward
    assert dense.flops == dense.num_forwards * dense.flops_per_forward
    kept = 64 * (math.ceil(0.3 * 512) + 2)  # of 32,760 tokens
    assert kept_keys(32_760, 0.3) == kept
    saved = 39 * 4 * 32_760 * (32_760 - kept) * 5120  # in all blocks but the first
    assert sparse.flops_per_forward - sparse.sparse_flops_per_forward == saved
    assert sparse.flops == dense.flops - 32 * 2 * saved
    assert kept_keys(100, 0.1) == 100, "the diagonal's two blocks are all there are"


def test_the_plan_says_which_steps_and_what_it_saves() -> None:
    dense, sparse = plan(None), plan(0.3)
    gpu = known_gpu("NVIDIA GeForce RTX 4090")
    assert gpu is not None
    sizes = weight_sizes(T2V, "int8")
    budgets = [make_budget(T2V, one, sizes, vram=gpu.memory) for one in (dense, sparse)]
    seconds = [
        predict(T2V, one, sizes, budget, datasheet_rates(gpu, one))
        for one, budget in zip((dense, sparse), budgets, strict=True)
    ]
    assert seconds[0].dense is None
    assert seconds[1].dense == pytest.approx(seconds[0].seconds["steps"])
    assert seconds[1].seconds["steps"] == pytest.approx(seconds[1].dense * sparse.flops / dense.flops, rel=0.01)
    text = format_plan(sparse, budgets[1], seconds[1])
    assert "density 0.3 in steps 9-40, in all blocks but the first; dense elsewhere" in text
    assert "at most 9,984 of 32,760 tokens" in text
    assert f"steps would take {seconds[1].dense:,.1f} with dense attention" in text
    assert "lists of blocks" in text
    plain = format_plan(dense, budgets[0], seconds[0])
    assert not any(word in plain for word in ("density", "sparse", "lists of blocks", "dense"))
    assert budgets[1].peak.total > budgets[0].peak.total
    assert plan_to_dict(sparse)["request"]["attention_density"] == 0.3


def test_measured_rates_are_of_the_work_that_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sparse, clock = plan(0.3, num_inference_steps=10), StageClock()
    begins = [0.0]
    for step in sparse.steps:  # at 1e12 operations per second
        begins.append(begins[-1] + sparse.flops_of(step) / 1e12)
    clock.times["steps"] = list(enumerate(begins))
    note_rates(T2V, sparse, clock)
    (entry,) = json.loads(rates_file().read_text()).values()
    assert entry["dit"] == [pytest.approx(1e12)]


FLAGS = ["--size", f"{SIZE}x{SIZE}", "--num-frames", str(FRAMES), "--steps", "4", "--seed", "3", "--quiet"]


def test_it_is_recorded_repeated_and_resumed(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_state, "KEEP_AFTER_SECONDS", 0.0)
    line = ["generate", "a red ball", "--model", str(models("t2v")), *FLAGS]
    sparse = [*line, "--attention-density", "0.2"]
    assert main([*line, "-o", "dense.mp4"]) == 0
    assert main([*sparse, "-o", "whole.mp4"]) == 0
    assert read_settings("whole.mp4")["request"]["attention_density"] == 0.2
    assert read_settings("dense.mp4")["request"]["attention_density"] == 1
    assert main(["rerun", "whole.mp4", "-o", "again.mp4", "--quiet"]) == 0
    own = RunKeeper.update

    def update(self: RunKeeper, state: RunState) -> None:
        own(self, state)
        if state.next_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(RunKeeper, "update", update)
        assert main([*sparse, "-o", "a.mp4"]) == 130
    assert main(["resume", "a.mp4.resume", "--quiet"]) == 0
    whole = read_video("whole.mp4")
    assert torch.equal(read_video("again.mp4"), whole)
    assert torch.equal(read_video("a.mp4"), whole)
    assert not torch.equal(read_video("dense.mp4"), whole)


def test_a_line_of_a_batch_may_have_its_own(models: Callable[[str], Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    (tmp_path / "clips").mkdir()
    lines = [{"prompt": "a", "output": "a.mp4", "attention_density": 0.4}, {"prompt": "b", "output": "b.mp4"}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--size", "32x32", "--num-frames", "5", "--steps", "2", "--seed", "3", "--quiet"]
    command = ["generate", "--prompts", str(prompts), "--model", str(models("t2v")), "--attention-density", "0.9"]
    assert main([*command, *flags, "-o", str(tmp_path / "clips")]) == 0
    found = [read_settings(tmp_path / "clips" / name)["request"]["attention_density"] for name in ("a.mp4", "b.mp4")]
    assert found == [0.4, 0.9]


def test_verify_takes_it_as_part_of_a_tier(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["verify", "--tiers", "fp32+density0.5", "--captions", "1", "--steps", "2", "--device", "cpu", "--quiet"]
    assert main([*line, "--json"]) == 0
    columns = json.loads(capsys.readouterr().out)
    assert [column["name"] for column in columns] == ["exact", "fp32+density0.5"]
