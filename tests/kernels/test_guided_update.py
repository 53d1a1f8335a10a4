"""One pass for guidance and solver: against float64, and as every solver's steps against diffusers."""

from dataclasses import replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from tolerance import assert_close
from torch import Tensor

from wanfast import solvers
from wanfast.kernels import guided_update
from wanfast.kernels.guided_update import Correction, Update, guided_update_reference, guided_update_triton
from wanfast.schedule import sigmas_and_timesteps
from wanfast.solvers import SOLVERS, Step

IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [guided_update_triton, guided_update_reference], ids=["kernel", "reference"]
)
SHAPES = pytest.mark.parametrize("shape", [(7,), (1, 16, 3, 5, 9), (1024,), (2, 1025)], ids=str)


def truth(latents, with_prompt, update, without, guidance, past) -> tuple[Tensor, Tensor, Tensor]:
    latents, with_prompt, without = latents.double(), with_prompt.double(), without.double()
    velocity = guidance * with_prompt + (1 - guidance) * without
    prediction = latents - update.sigma * velocity
    past = [x.double() for x in past]
    start = latents
    if update.correction is not None:
        start = sum(k * x for k, x in zip(update.correction.past, past, strict=True))
        start = start + update.correction.prediction * prediction
    updated = update.start * start + update.velocity * velocity + update.prediction * prediction
    return updated + sum(u * x for u, x in zip(update.past, past, strict=True)), prediction, start


@IMPLEMENTATIONS
@SHAPES
@pytest.mark.parametrize(
    ("past", "is_corrected"), [(0, False), (1, False), (1, True), (2, False), (2, True), (3, False), (3, True)]
)
def test_all_three_results_equal_float64(run, shape, past, is_corrected, device):
    latents, with_prompt, without, *earlier = torch.randn(3 + past, *shape, device=device)
    correction = Correction(prediction=-0.4, past=(0.9, -0.3, 0.7)[:past]) if is_corrected else None
    weights = (0.25, -0.35, 0.45)[:past]
    update = Update(sigma=0.8, start=0.6, velocity=-0.15, prediction=0.55, past=weights, correction=correction)
    got = run(latents, with_prompt, update, without=without, guidance=3.5, past=earlier)
    want = truth(latents, with_prompt, update, without, 3.5, earlier)
    for name, tensor, exact in zip(("latents", "prediction", "start"), _tensors(got), want, strict=True):
        assert tensor.shape == latents.shape, name
        assert_close(got=tensor, want=exact, op="guided_update")


def _tensors(updated) -> tuple[Tensor, Tensor, Tensor]:
    return updated.latents, updated.prediction, updated.start


@IMPLEMENTATIONS
def test_one_velocity_needs_no_guidance(run, device):
    latents, velocity = torch.randn(2, 3, 50, device=device)
    update = Update(sigma=0.7, start=1.0, velocity=-0.1)
    alone = run(latents, velocity, update, guidance=5.0)
    assert_close(got=alone.latents, want=latents.double() - 0.1 * velocity.double(), op="guided_update")
    both = run(latents, velocity, update, without=velocity, guidance=5.0)
    assert all(torch.equal(a, b) for a, b in zip(_tensors(alone), _tensors(both), strict=True))


@IMPLEMENTATIONS
def test_no_input_is_written_to_and_an_uncorrected_start_is_the_latents(run, device):
    inputs = list(torch.randn(5, 40, device=device))
    before = [x.clone() for x in inputs]
    update = Update(sigma=0.5, start=0.5, velocity=0.1, prediction=0.2, past=(0.3, 0.4))
    done = run(inputs[0], inputs[1], update, without=inputs[2], guidance=2.0, past=inputs[3:])
    assert done.start is inputs[0]
    done.latents.zero_()
    done.prediction.zero_()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def steps_of(solver: str, num_steps: int, shift: float, guidance: float) -> list[Step]:
    schedule = sigmas_and_timesteps(solver, num_steps, shift)
    return [
        Step(
            index=i,
            num_steps=num_steps,
            sigma=schedule.sigmas[i],
            sigma_next=schedule.sigmas[i + 1],
            timestep=schedule.timesteps[i],
            expert="single",
            guidance=guidance,
        )
        for i in range(num_steps)
    ]


def scheduler_of(solver: str, steps: list[Step], shift: float):
    """Diffusers' solver on these very steps."""
    if solver == "euler":
        return None
    kind = UniPCMultistepScheduler if solver == "unipc" else DPMSolverMultistepScheduler
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(len(steps))
    scheduler.sigmas = torch.tensor([*(step.sigma for step in steps), 0.0])
    scheduler.set_begin_index(0)
    return scheduler


@IMPLEMENTATIONS
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shift", [5.0, 12.0])
def test_twenty_guided_steps_are_those_of_diffusers(run, solver, shift, device, monkeypatch):
    monkeypatch.setattr(solvers, "guided_update", run)
    steps = steps_of(solver, 20, shift, guidance=4.0)
    scheduler = scheduler_of(solver, steps, shift)
    x = want = torch.randn(1, 16, 2, 3, 5, device=device)
    history = None
    for i, step in enumerate(steps):
        with_prompt, without = torch.randn(2, *x.shape, device=device)
        x, history = solvers.take_step(solver, x, with_prompt, step, history, without=without)
        guided = without + step.guidance * (with_prompt - without)
        if scheduler is None:
            want = want + (step.sigma_next - step.sigma) * guided
        else:
            want = scheduler.step(guided.cpu(), scheduler.timesteps[i], want.cpu()).prev_sample.to(device)
        assert_close(got=x, want=want, op="solver")


GOOD = Update(sigma=0.5, start=1.0, velocity=-0.1, past=(0.2,), correction=Correction(prediction=0.1, past=(0.9,)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": torch.zeros(4, 8).bfloat16()}, "latents: must be float32, got torch.bfloat16"),
        ({"latents": torch.zeros(8, 4).t()}, "latents: must be contiguous, got strides"),
        ({"with_prompt": torch.zeros(4, 9)}, r"with_prompt: must have latents' shape \(4, 8\), got \(4, 9\)"),
        ({"without": torch.zeros(8, 4).t()}, "without: must be contiguous, got strides"),
        ({"without": torch.zeros(4, 8).half()}, "without: must be float32, got torch.float16"),
        ({"past": [torch.zeros(4, 8, device="meta")]}, r"past\[0\]: must be on cpu, like latents, got meta"),
        ({"past": [torch.zeros(4, 8)] * 4}, "past: must be at most 3 tensors, got 4"),
        ({"past": []}, "past: a correction must have at least one tensor, got 0"),
        ({"past": [torch.zeros(4, 8)] * 2}, "update.past: must be 2 weights, one for each tensor of the past, got"),
        (
            {"update": replace(GOOD, correction=Correction(prediction=0.1, past=(1.0, 2.0)))},
            "update.correction.past: must be 1 weights",
        ),
    ],
)
def test_guided_update_refuses(arguments, message):
    zeros = torch.zeros(4, 8)
    good = {"latents": zeros, "with_prompt": zeros, "update": GOOD, "without": zeros, "past": [zeros]}
    guided_update(**good, guidance=2.0)
    with pytest.raises(ValueError, match=message):
        guided_update(**(good | arguments), guidance=2.0)
