"""The same LoRAs on both engines of a benchmark: the same video, and a word where diffusers takes them otherwise."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference.loras import linear_layers, random_factors, write_lora
from reference.tiny import random_tiny
from safetensors.torch import save_file

from wanfast.bench import diffusers_loras, measure, official_engine
from wanfast.bench.case import Case, Tier, plan_of
from wanfast.bench.compare import check_comparable
from wanfast.bench.difference import compare_videos
from wanfast.bench.diffusers_engine import DiffusersEngine
from wanfast.bench.engine import Run, WanfastEngine, measured_run
from wanfast.bench.official_engine import check_checkout
from wanfast.bench.random_model import tiny_of
from wanfast.bench.report import case_of
from wanfast.checkpoint.lookup import Sources
from wanfast.config import MODELS
from wanfast.errors import RequestError
from wanfast.generation import draw_noise
from wanfast.lora import LoraSpec
from wanfast.model import open_model
from wanfast.request import Request

FP32 = Tier("fp32", "fp32")


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "gc", SimpleNamespace(collect=lambda: 0))  # half a second with diffusers imported


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two experts, one step of each, without LoRAs."""
    tiny = random_tiny(tmp_path_factory.mktemp("tiny") / "wan-tiny")
    return Case(
        weights="tiny random",
        sources=Sources(),
        config=tiny_of(MODELS["t2v-A14B"], open_model(tiny).config),
        request=Request("a red ball", width=32, height=32, num_frames=1, num_inference_steps=2, shift=1.0, seed=0),
        picture=None,
        tiers=(FP32,),
        reference_precision="fp32",
        placement="model",
        device="cpu",
        vram=None,
        ram=None,
        runs=1,
        warmup=0,
        threads=1,
    )


def lora_file(case: Case, path: Path, *, seed: int = 0, dialect: str = "comfyui", alpha: float | None = 2.0) -> Path:
    factors = random_factors(linear_layers(case.config.dit), seed=seed)
    return write_lora(path, factors, dialect=dialect, alpha=alpha)


def video(engine: Any, case: Case, folder: Path) -> Run:
    engine.load()
    noise = draw_noise(plan_of(case))[0]
    return measured_run(engine, torch.device("cpu"), noise, None, folder / "clip.mp4", keeps_frames=True)


@pytest.mark.parametrize("dialect", ["comfyui", "diffusers"])
def test_both_engines_run_the_same_loras(plain: Case, tmp_path: Path, dialect: str) -> None:
    alpha = 2.0 if dialect == "comfyui" else None
    both, low = (
        lora_file(plain, tmp_path / f"{seed}.safetensors", seed=seed, dialect=dialect, alpha=alpha) for seed in (1, 2)
    )
    case = replace(plain, loras=(LoraSpec(both, 0.5), LoraSpec(low, -1.0, "low_noise")))
    assert {step.expert for step in plan_of(case).steps} == {"high_noise", "low_noise"}
    got, want = (video(engine, case, tmp_path) for engine in (WanfastEngine(case, FP32), DiffusersEngine(case)))
    assert got.frames is not None and want.frames is not None and want.notes == ()
    assert compare_videos(got.frames, want.frames).worst_pixel <= 1
    for fewer in ((), case.loras[:1], (replace(case.loras[0], strength=1.0), case.loras[1])):
        other = video(WanfastEngine(replace(case, loras=fewer), FP32), case, tmp_path)
        assert other.frames is not None and compare_videos(other.frames, want.frames).worst_pixel > 3


def test_what_diffusers_cannot_load_ends_it(plain: Case, tmp_path: Path) -> None:
    """Whether it says so, or would go on without."""
    dim = plain.config.dit.dim
    unknown = lora_file(plain, tmp_path / "bare.safetensors", dialect="bare")
    dropped = tmp_path / "whole.safetensors"
    save_file({"diffusion_model.blocks.0.self_attn.q.diff": torch.randn(dim, dim)}, dropped)
    for file, why in ((unknown, "Invalid LoRA checkpoint"), (dropped, "it adapts no layer of it")):
        case = replace(plain, loras=(LoraSpec(file),))
        with pytest.raises(RequestError, match=rf"^lora: diffusers cannot load {file.name} \({why}.*no comparison"):
            DiffusersEngine(case).load()


def test_layers_that_one_engine_leaves_out_are_told(
    plain: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(plain, loras=(LoraSpec(lora_file(plain, tmp_path / "some.safetensors"), target="low_noise"),))
    own = diffusers_loras.load_file
    monkeypatch.setattr(
        diffusers_loras,
        "load_file",
        lambda path: {name: tensor for name, tensor in own(path).items() if "blocks.0.ffn.2" not in name},
    )
    count = len(linear_layers(plain.config.dit))
    run = video(DiffusersEngine(case), case, tmp_path)
    says = f"of some.safetensors diffusers adapts {count - 1} layers of low_noise, wanfast {count}; the videos differ"
    assert run.notes == (f"{says} by that",)


def test_without_peft_it_is_said(plain: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(plain, loras=(LoraSpec(lora_file(plain, tmp_path / "some.safetensors")),))
    monkeypatch.setattr(diffusers_loras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"^lora: diffusers loads LoRAs through the peft package"):
        DiffusersEngine(case).load()


def test_a_report_names_them_and_is_compared_by_them(plain: Case, tmp_path: Path) -> None:
    file = lora_file(plain, tmp_path / "some.safetensors")
    case = replace(plain, loras=(LoraSpec(file, 0.5, "low_noise"),))
    told = json.loads(json.dumps(case_of(case, [])))
    assert told["loras"] == [{"file": "some.safetensors", "strength": 0.5, "target": "low_noise"}]
    check_comparable(told, {"case": told}, "old.json")
    before = {name: value for name, value in case_of(plain, []).items() if name != "loras"}
    check_comparable(case_of(plain, []), {"case": before}, "old.json")  # of a report from before there were LoRAs
    with pytest.raises(RequestError, match=r"^compare: must be of the same case, got old\.json with loras \[\]"):
        check_comparable(told, {"case": before}, "old.json")


def test_the_official_code_runs_none(plain: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(official_engine, "missing_here", lambda: [])
    (tmp_path / "generate.py").touch()
    (tmp_path / "wan").mkdir()
    (tmp_path / "Wan2.1_VAE.pth").touch()
    known = replace(plain, weights="checkpoint", sources=Sources(model=tmp_path))
    with pytest.raises(RequestError, match=r"^reference: the official code computes in bf16"):
        check_checkout(tmp_path, known)
    with pytest.raises(RequestError, match=r"^reference: the official code loads no LoRA"):
        check_checkout(tmp_path, replace(known, loras=(LoraSpec(lora_file(plain, tmp_path / "some.safetensors")),)))
