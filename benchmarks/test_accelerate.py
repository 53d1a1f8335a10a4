"""A diffusers pipeline before and after `wanfast.accelerate`, and what the adapter adds to a forward of the DiT.

Small random pipelines of the three families, in fp32 with the scheduler's own loop, from prompt to frames.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from side_by_side import compare

ROUNDS = 7
USES = ["t2v", "i2v", "ti2v", "ti2v with a picture"]
SIZE = {"height": 96, "width": 96, "num_frames": 9, "num_inference_steps": 4}


def _call(case: Any) -> Callable[[], Any]:
    size = dict(SIZE)
    if "image" in case.arguments:
        size["image"] = case.arguments["image"].resize((SIZE["width"], SIZE["height"]))
    return lambda: case.run(**size)


@pytest.mark.parametrize("use", USES)
def test_pipeline(benchmark: BenchmarkFixture, use: str, tmp_path: Path) -> None:
    from reference.pipelines import furthest, make_case

    import wanfast

    theirs = make_case(use, tmp_path)
    ours = copy.deepcopy(theirs)
    wanfast.accelerate(ours.pipe)
    assert furthest(_call(ours)(), _call(theirs)()) <= 1 / 255
    compare(benchmark, _call(ours), _call(theirs), peer="diffusers", rounds=ROUNDS)


@pytest.mark.parametrize("use", ["t2v", "i2v", "ti2v"])
def test_forward_of_the_adapter(benchmark: BenchmarkFixture, use: str, tmp_path: Path) -> None:
    """The DiT called by the pipeline's module, beside the DiT called with its weights in hand."""
    from reference.pipelines import make_case

    import wanfast
    from wanfast.dit.model import predict_velocities

    pipe = wanfast.accelerate(make_case(use, tmp_path).pipe)
    model = pipe.transformer
    latents = torch.randn(1, model.config.in_channels, 5, 16, 16)
    text = torch.randn(1, 512, model.config.text_dim)
    timestep = torch.full((1, 320), 611.0) if use == "ti2v" else torch.tensor([611])
    experts, name = model._wanfast
    expert = experts.open(name, latents.device)
    config = replace(expert.config, text_len=512)

    @torch.no_grad()
    def through_the_module() -> None:
        for _ in range(10):
            model(latents, timestep, text, return_dict=False)

    @torch.no_grad()
    def by_itself() -> None:
        for _ in range(10):
            predict_velocities(latents, 611.0, [text], expert.outer, expert.blocks(), config)

    compare(benchmark, through_the_module, by_itself, peer="dit", rounds=ROUNDS)
