"""A diffusers pipeline before and after `wanfast.accelerate`, and what the adapter adds to a forward of the DiT.

Small random pipelines of the three families, in fp32 with the scheduler's own loop, from prompt to frames. What the
adapter adds is told of a pipeline of wan-tiny's sizes, by CPU seconds of the thread that computes.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from side_by_side import compare

ROUNDS = 7
SHARE = {64: 0.05, 256: 0.01}  # at most, of a step, by side of the video
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


class Stages:
    """CPU seconds of each call of a function; what else the machine does costs none, but its caches."""

    def __init__(self, owner: Any, name: str, patch: pytest.MonkeyPatch) -> None:
        """Put a clock around a function or method, until the patch is undone."""
        self.seconds: list[float] = []
        inner = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            result = inner(*args, **kwargs)
            self.seconds.append(time.thread_time() - began)
            return result

        patch.setattr(owner, name, call)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("side", list(SHARE))
@pytest.mark.parametrize("task", ["t2v", "i2v", "ti2v"])
def test_share_of_the_adapter(
    benchmark: BenchmarkFixture, task: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What of a step passes in the module, but outside the DiT: two forwards a step, as guidance has them."""
    import wanfast
    from wanfast.bench.diffusers_pipeline import build_pipeline
    from wanfast.bench.random_model import random_model, tiny_of
    from wanfast.bench.settle import drawn_picture
    from wanfast.config import MODELS
    from wanfast.diffusers_backend import predict
    from wanfast.model import open_model
    from wanfast.plan import make_plan
    from wanfast.request import Request
    from wanfast.tiny import tiny_folder

    row = next(row for row in MODELS.values() if row.task == task)
    model = random_model(tiny_of(row, open_model(tiny_folder()).config), torch.float32, is_shared=False)
    picture = drawn_picture(side, side) if task == "i2v" else None
    size = {"width": side, "height": side, "num_frames": 17, "num_inference_steps": 10}
    request = Request("a red ball", seed=0, image_size=None if picture is None else picture.size, **size)
    plan = make_plan(model.config, request, precision="fp32")
    pipe = wanfast.accelerate(build_pipeline(model, plan, torch.float32, takes_picture=picture is not None))
    arguments = {"prompt": "a red ball", "guidance_scale": 4.0, "output_type": "latent", **size}
    if picture is not None:
        arguments["image"] = picture

    dit = Stages(predict, "predict_velocities", monkeypatch)
    module = Stages(wanfast.WanFastTransformer3DModel, "__call__", monkeypatch)
    pipe(**arguments)
    dit.seconds, module.seconds = [], []
    benchmark.pedantic(lambda: pipe(**arguments), rounds=2)
    outside = [whole - part for whole, part in zip(module.seconds, dit.seconds, strict=True)]
    share = statistics.median(outside) / statistics.median(module.seconds)
    benchmark.extra_info |= {
        "clock": "thread CPU seconds",
        "forward_ms": round(1e3 * statistics.median(module.seconds), 1),
        "adapter_us": round(1e6 * statistics.median(outside)),
        "adapter_percent_of_a_step": round(100 * share, 2),
        "threads": torch.get_num_threads(),
    }
    assert share <= SHARE[side]
