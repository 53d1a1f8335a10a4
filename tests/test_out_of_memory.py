"""Memory that runs out in the middle: the step is taken again in less memory, and the video is the same."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import text, vae
from reference.checkpoints import write_official
from reference.dit import small_config
from reference.families import TEXT, make_family
from torch import Tensor

import wanfast
import wanfast.budget as budget
import wanfast.denoise as denoise
import wanfast.forecast as forecast
from wanfast.budget import make_budget
from wanfast.dit.weights import expected_tensors
from wanfast.errors import MemoryBudgetError
from wanfast.random_weights import random_tensors
from wanfast.request import Request
from wanfast.vae.memory import VAEActivations
from wanfast.weight_sizes import largest_block

SMALL: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 4, "seed": 1}
ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    "cpu": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts of eight blocks each."""
    folder = tmp_path_factory.mktemp("model")
    config = replace(small_config("t2v", text_dim=TEXT.dim), num_layers=8)
    family = make_family("t2v", folder)
    experts = {name: random_tensors(expected_tensors(config), seed=name) for name in ("high_noise", "low_noise")}
    return write_official(
        folder / "model",
        task="t2v",
        experts=experts,
        vae=vae.official_state(family.vae, "2.1"),
        text=text.official_state(family.text_encoder),
        num_heads=config.num_heads,
        tokenizer=family.tokenizer,
    )


def load(model: Path, num_slots: int) -> wanfast.Pipeline:
    """On the CPU, with slots that blocks are copied to as on a GPU."""
    whole = wanfast.load(model, device="cpu")
    size = max(largest_block(reader, torch.float32) for reader in whole.loaded.model.experts.values())
    return wanfast.load(model, device="cpu", vram=num_slots * size)


def failing(calls: set[int], error: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let some of the calls of a block fail, after the block before has been computed."""
    made: list[int] = []
    own = denoise.predict_velocities

    def predict(*arguments: Any, **more: Any) -> list[Tensor]:
        latents, timestep, contexts, outer, blocks, config = arguments

        def some() -> Any:
            for block in blocks:
                made.append(1)
                if len(made) in calls:
                    raise error()
                yield block

        return own(latents, timestep, contexts, outer, some(), config, **more)

    monkeypatch.setattr(denoise, "predict_velocities", predict)
    return made


def num_layers(pipeline: wanfast.Pipeline) -> int:
    return pipeline.loaded.config.dit.num_layers


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("calls", [{1}, {2}, {3, 4}, {8}, {9}, {20, 30}])
def test_the_step_is_taken_again(
    kind: str, calls: set[int], model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    want = load(model, 4).generate("a red ball", output="latents", **SMALL)
    pipeline = load(model, 7)
    with monkeypatch.context() as patched:
        failing(calls, ERRORS[kind], patched)
        steps: list[int] = []
        got = pipeline.generate(
            "a red ball", output="latents", on_step=lambda step, _: steps.append(step.index), **SMALL
        )
    assert torch.equal(got, want)
    assert steps == [0, 1, 2, 3]
    assert caplog.text.count("it is taken again with fewer weights") == len(calls)


@pytest.mark.parametrize("calls", [{1}, {9, 10}, {12, 40}])
def test_without_a_block_to_spare_the_step_is_cut_finer(
    calls: set[int], model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    want = load(model, 4).generate("a red ball", output="latents", **SMALL)
    pipeline = load(model, 2)
    with monkeypatch.context() as patched:
        made = failing(calls, ERRORS["cuda"], patched)
        got = pipeline.generate("a red ball", output="latents", **SMALL)
    assert torch.equal(got, want)
    assert caplog.text.count("it is taken again with less of it at a time") == len(calls)
    # Passes with and without the prompt take turns from then on: each is a call of every block.
    blocks, steps = num_layers(pipeline), SMALL["num_inference_steps"]
    assert len(made) > blocks * (steps + 1)


def test_without_a_block_to_spare_the_end_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load(model, 2)
    with monkeypatch.context() as patched:
        failing({num_layers(pipeline) + again for again in (1, 2, 3, 4)}, ERRORS["cuda"], patched)
        told = r"step 2 of 4: out of memory with the fewest blocks.*least computed at a time.*smaller size"
        with pytest.raises(MemoryBudgetError, match=told):
            pipeline.generate("a red ball", output="latents", **SMALL)


def test_other_errors_are_not_taken_for_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing({2}, lambda: RuntimeError("shapes do not match"), monkeypatch)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        load(model, 4).generate("a red ball", output="latents", **SMALL)


def test_a_gpu_keeps_the_blocks_that_the_plan_has_room_for(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is pretended: only the arithmetic on the way from plan to slots is run."""
    pipeline = wanfast.load(model, device="cpu")
    loaded, request = pipeline.loaded, Request("a", width=32, height=32, num_frames=5, num_inference_steps=4)
    plan = replace(pipeline.plan(request), device="cuda")
    none = VAEActivations(0, 0, 0)
    for name, size in {"text_activations": 0, "decode_activations": none, "encode_activations": none}.items():
        monkeypatch.setattr(budget, name, lambda *_, size=size, **__: size)  # of so small a model, more than its blocks
    sizes = replace(forecast.sizes_of(loaded, loaded.precision), vae_decoder=0, text_slot=0)
    monkeypatch.setattr(forecast, "sizes_of", lambda model, precision: sizes)
    whole = make_budget(loaded.config, plan, sizes, vram=None)
    others = whole.peak.total - whole.num_slots * whole.slot_bytes
    loaded.device = torch.device("cuda")
    allowed: list[int] = []
    monkeypatch.setattr(loaded, "allow_blocks", allowed.append)
    for slots in (2, 5, 8):
        limit = others + slots * whole.slot_bytes
        monkeypatch.setattr(forecast, "_limits_here", lambda model, limit=limit: (limit, 10**12))
        forecast.bound_blocks(loaded, [forecast.budget_here(loaded, plan)])
    assert allowed == [slots * whole.slot_bytes for slots in (2, 5, 8)]
    monkeypatch.setattr(forecast, "_limits_here", lambda model: (whole.slot_bytes, 10**12))
    with pytest.raises(MemoryBudgetError, match="needs"):
        forecast.budget_here(loaded, plan)


def test_fewer_slots_are_kept_from_the_next_run_on(model: Path) -> None:
    want = load(model, 6).generate("a red ball", output="latents", **SMALL)
    pipeline = load(model, 6)
    pipeline.generate("a red ball", output="latents", **SMALL)
    residency = pipeline.loaded._residency
    size = residency._size_slots([])
    residency.allow(3 * size)
    assert torch.equal(pipeline.generate("a red ball", output="latents", **SMALL), want)
    assert len(residency._held) == 3
