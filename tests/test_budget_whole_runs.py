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
# Pages of the files, which the allocator does not see, what an earlier run has left there, and what is not this one's.
STANDING = ("blocks of an expert", "pages of an expert's blocks", "weights around the blocks", "left to the system")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = replace(small_config("t2v", text_dim=TEXT.dim), dim=256, num_heads=4, ffn_dim=512, num_layers=2)
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
