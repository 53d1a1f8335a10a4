"""The planned peak of whole runs against the record of torch's allocator, on the CPU."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from reference import text, vae
from reference.checkpoints import write_official
from reference.dit import small_config
from reference.families import TEXT, make_family
from tracked import tracked_peak

import wanfast
from wanfast.budget import Budget
from wanfast.dit.weights import expected_tensors
from wanfast.forecast import budget_here
from wanfast.random_weights import random_tensors
from wanfast.request import Request

TOLERANCE = 0.05
# What an earlier run has left there, and what is not this one's.
STANDING = ("blocks of an expert", "weights around the blocks", "left to the system")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), num_layers=2)


@pytest.fixture(scope="module")
def six_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("six"), num_layers=6)


def write_model(folder: Path, num_layers: int) -> Path:
    config = replace(small_config("t2v", text_dim=TEXT.dim), dim=256, num_heads=4, ffn_dim=512, num_layers=num_layers)
    family = make_family("t2v", folder)
    experts = {name: random_tensors(expected_tensors(config), seed=name) for name in ("high_noise", "low_noise")}
    return write_official(
        folder / "model",
        task="t2v",
        experts=experts,
        vae=vae.official_state(family.vae, "2.1"),
        text=text.official_state(family.text_encoder),
        num_heads=4,
        tokenizer=family.tokenizer,
    )


def planned(budget: Budget, stage: str) -> int:
    (found,) = (one for one in budget.stages if one.name.startswith(stage))
    return sum(size for what, size in found.items.items() if what not in STANDING)


@pytest.mark.parametrize(("width", "height", "num_frames"), [(256, 256, 17), (512, 384, 5)])
def test_the_planned_peak_is_the_allocator_s(width: int, height: int, num_frames: int, folder: Path) -> None:
    pipeline = wanfast.load(folder, device="cpu", precision="fp32")
    sizes = {"width": width, "height": height, "num_frames": num_frames, "num_inference_steps": 2, "seed": 1}
    plan = pipeline.plan(Request("a", **sizes))  # type: ignore[arg-type]
    budget = budget_here(pipeline.loaded, plan)
    dit = pipeline.loaded.config.dit
    context = torch.randn(2, dit.text_len, dit.text_dim)  # prompts of full length, for which the plan has room
    pipeline.generate(context=context, output="latents", **sizes)  # type: ignore[call-overload]
    got = tracked_peak(lambda: pipeline.generate(context=context, output="latents", **sizes))  # type: ignore[call-overload]
    assert planned(budget, "steps") == pytest.approx(got, rel=TOLERANCE)

    got = tracked_peak(lambda: pipeline.generate(context=context, **sizes))  # type: ignore[call-overload]
    frames = num_frames * height * width * 3  # the Video, which a file written as it is decoded does not need
    assert budget.peak.name == "decode"
    assert planned(budget, "decode") == pytest.approx(got - frames, rel=TOLERANCE)


@pytest.mark.parametrize("slots", [None, 2, 3])
@pytest.mark.parametrize("precision", ["exact", "fp32"])
def test_slots_and_what_is_kept_for_them_too(
    precision: Literal["exact", "fp32"], slots: int | None, six_blocks: Path
) -> None:
    """From nothing to the swap of experts: in place, in two slots and in half; what threads keep the store tells."""
    size = wanfast.load(six_blocks, device="cpu", precision=precision).loaded.block_bytes
    pipeline = wanfast.load(six_blocks, device="cpu", precision=precision, vram=None if slots is None else slots * size)
    sizes = {"width": 256, "height": 256, "num_frames": 9, "num_inference_steps": 3, "seed": 1}
    plan = pipeline.plan(Request("a", **sizes))  # type: ignore[arg-type]
    assert len(plan.steps_per_expert) == 2
    budget, dit = budget_here(pipeline.loaded, plan), pipeline.loaded.config.dit
    context = torch.randn(2, dit.text_len, dit.text_dim)
    (steps,) = (stage.items for stage in budget.stages if stage.name.startswith("steps"))
    elsewhere = {"left to the system", "blocks, kept to be copied"}
    elsewhere |= set() if slots is None else {"blocks that are being read or made"}  # by a thread, one at a time
    got = tracked_peak(lambda: pipeline.generate(context=context, output="latents", **sizes))  # type: ignore[call-overload]
    assert sum(taken for what, taken in steps.items() if what not in elsewhere) == pytest.approx(got, rel=TOLERANCE)
    if slots is None:
        return
    assert steps[f"{slots} slots for 6 blocks"] == slots * size
    kept = steps.get("blocks, kept to be copied", 0)
    assert (kept > 0) == (precision == "exact")
    assert pipeline.loaded.host_bytes == pytest.approx(kept + slots * size, rel=TOLERANCE)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_short_run_holds_less_of_a_solver(num_steps: int, six_blocks: Path) -> None:
    pipeline = wanfast.load(six_blocks, device="cpu", precision="exact")
    sizes = {"width": 256, "height": 256, "num_frames": 17, "num_inference_steps": num_steps, "seed": 1}
    budget = budget_here(pipeline.loaded, pipeline.plan(Request("a", **sizes)))  # type: ignore[arg-type]
    dit = pipeline.loaded.config.dit
    context = torch.randn(2, dit.text_len, dit.text_dim)
    pipeline.generate(context=context, output="latents", **sizes)  # type: ignore[call-overload]
    got = tracked_peak(lambda: pipeline.generate(context=context, output="latents", **sizes))  # type: ignore[call-overload]
    assert planned(budget, "steps") == pytest.approx(got, rel=0.02)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize(("width", "height", "num_frames"), [(256, 256, 1), (256, 256, 9)])
def test_in_8_bits_too(
    precision: Literal["int8", "fp8"], width: int, height: int, num_frames: int, folder: Path
) -> None:
    """In 8 bits a CPU runs references, which widen what kernels keep in registers."""
    pipeline = wanfast.load(folder, device="cpu", precision=precision)
    sizes = {"width": width, "height": height, "num_frames": num_frames, "num_inference_steps": 1, "seed": 1}
    plan = pipeline.plan(Request("a", **sizes))  # type: ignore[arg-type]
    budget = budget_here(pipeline.loaded, plan)
    dit = pipeline.loaded.config.dit
    context = torch.randn(2, dit.text_len, dit.text_dim)
    pipeline.generate(context=context, output="latents", **(sizes | {"num_frames": 1}))  # type: ignore[call-overload]
    got = tracked_peak(lambda: pipeline.generate(context=context, output="latents", **sizes))  # type: ignore[call-overload]
    assert planned(budget, "steps") == pytest.approx(got, rel=TOLERANCE)
    (steps,) = (stage for stage in budget.stages if stage.name.startswith("steps"))
    held = pipeline.loaded.host_bytes
    assert steps.items["blocks of an expert"] == pytest.approx(held, rel=TOLERANCE)
