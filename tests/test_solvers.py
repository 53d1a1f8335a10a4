"""Solvers, against numbers the reference printed, diffusers step by step, and an ODE whose solution is known."""

import math
import zlib

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from tolerance import assert_close
from torch import Tensor

from wanfast import solvers
from wanfast.kernels.guided_update import guided_update_reference
from wanfast.schedule import sigmas_and_timesteps
from wanfast.solvers import SOLVERS, Step, take_step


def make_steps(solver: str, num_steps: int, shift: float) -> list[Step]:
    schedule = sigmas_and_timesteps(solver, num_steps, shift)
    return steps_between(schedule.sigmas, schedule.timesteps)


def steps_between(sigmas, timesteps=None) -> list[Step]:
    return [
        Step(
            index=i,
            num_steps=len(sigmas) - 1,
            sigma=sigmas[i],
            sigma_next=sigmas[i + 1],
            timestep=timesteps[i] if timesteps else 1000 * sigmas[i],
            expert="single",
            guidance=1.0,
        )
        for i in range(len(sigmas) - 1)
    ]


def seeded(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def toy_velocity(x: Tensor, step: Step) -> Tensor:
    return 0.5 * x + 0.3 * torch.sin(3 * x) - 0.2 * step.timestep / 1000


def run(solver: str, steps: list[Step], x: Tensor, velocity) -> list[Tensor]:
    history, trace = None, []
    for step in steps:
        x, history = take_step(solver, x, velocity(x, step), step, history)
        trace.append(x)
    return trace


LAST_DIGIT = 1e-6  # of numbers up to 1.6, of which 7 digits were printed: sums in another order moved them by 6e-7


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


GOLDEN_TRACES = {
    "unipc": (
        "-0.6198387 1.557683 -0.5787063 1.542578 -0.5217791 1.520339 -0.438276 1.484483 -0.3111817 1.416018 "
        "-0.06307513 1.246133",
        "0.05333029 0.5523063",
    ),
    "dpmpp": (
        "-0.6198485 1.557697 -0.5784305 1.54265 -0.5209786 1.520529 -0.4368421 1.484771 -0.308556 1.416604 "
        "-0.0615636 1.246688",
        "0.05420167 0.5521871",
    ),
}
GOLDEN_LONG = {
    "unipc": "0.04083838 0.5525468 -0.100571 -0.00624835 -0.119082",
    "dpmpp": "0.04107887 0.5525717 -0.100005 -0.00602897 -0.118458",
}


@pytest.mark.parametrize("solver", GOLDEN_TRACES)
def test_every_step_of_six_is_the_reference_s_but_for_the_last_printed_digit(solver):
    trace = run(solver, make_steps(solver, 6, 5.0), seeded("noise", 1, 2, 2, 3, 3), toy_velocity)
    elements, statistics = GOLDEN_TRACES[solver]
    last = trace[-1].double()
    got = [x.flatten()[i].item() for x in trace for i in (0, 7)] + [last.mean().item(), last.std(unbiased=False).item()]
    assert got == pytest.approx(numbers(elements + " " + statistics), rel=0, abs=LAST_DIGIT)


@pytest.mark.parametrize("solver", GOLDEN_LONG)
def test_twenty_steps_end_where_the_reference_does(solver):
    last = run(solver, make_steps(solver, 20, 12.0), seeded("noise", 1, 2, 2, 3, 3), toy_velocity)[-1]
    values = [last.double().mean().item(), last.double().std(unbiased=False).item()]
    at = [last.flatten()[i].item() for i in (0, 1, 35)]
    assert [*values, *at] == pytest.approx(numbers(GOLDEN_LONG[solver]), rel=0, abs=LAST_DIGIT)


@pytest.mark.parametrize(("num_steps", "shift"), [(40, 12.0), (40, 5.0), (50, 5.0)])
def test_every_step_of_unipc_is_diffusers(num_steps, shift):
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )
    scheduler.set_timesteps(num_steps)
    steps = make_steps("unipc", num_steps, shift)
    assert [step.timestep for step in steps] == scheduler.timesteps.tolist()
    ours = torch.tensor([*(step.sigma for step in steps), 0.0])
    # diffusers takes its grid from 1 - linspace(1, 0.001), the reference from linspace(0.999, 0): fp32 may round apart.
    assert (scheduler.sigmas - ours).abs().max() <= 6e-8

    x = want = seeded("start", 1, 16, 3, 4, 6)
    history = None
    for step, timestep in zip(steps, scheduler.timesteps, strict=True):
        velocity = seeded(f"velocity {step.index}", *x.shape)
        x, history = take_step("unipc", x, velocity, step, history)
        want = scheduler.step(velocity, timestep, want).prev_sample
        assert_close(got=x, want=want, op="solver")


@pytest.mark.parametrize(("num_steps", "shift"), [(4, 5.0), (40, 12.0), (50, 5.0)])
def test_every_step_of_dpmpp_is_diffusers_given_the_official_sigmas(num_steps, shift):
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )
    scheduler.set_timesteps(num_steps)
    steps = make_steps("dpmpp", num_steps, shift)
    scheduler.sigmas = torch.tensor([*(step.sigma for step in steps), 0.0])
    scheduler.set_begin_index(0)
    x = want = seeded("start", 1, 16, 3, 4, 6)
    history = None
    for step, timestep in zip(steps, scheduler.timesteps, strict=True):
        velocity = seeded(f"velocity {step.index}", *x.shape)
        x, history = take_step("dpmpp", x, velocity, step, history)
        want = scheduler.step(velocity, timestep, want).prev_sample
        assert_close(got=x, want=want, op="solver")


RATE, FORCE, FREQUENCIES = -1.3, 0.7, torch.arange(1, 7, dtype=torch.float64)


def forced_velocity(x: Tensor, step: Step) -> Tensor:
    """dx/dsigma = RATE x + FORCE cos(w sigma), an element per frequency w: one error alone may cancel by luck."""
    return RATE * x + FORCE * torch.cos(FREQUENCIES * step.sigma)


def forced_solution(sigma: float) -> Tensor:
    """The solution of `forced_velocity` that is 1 at sigma 0.9."""
    w = FREQUENCIES

    def particular(at: float) -> Tensor:
        return FORCE * (w * torch.sin(w * at) - RATE * torch.cos(w * at)) / (RATE**2 + w**2)

    return particular(sigma) + (1 - particular(0.9)) * math.exp(RATE * (sigma - 0.9))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpmpp", 2), ("unipc", 3)])  # a corrector adds one
def test_halving_the_steps_shrinks_the_error_by_the_solver_s_order(solver, order, monkeypatch):
    monkeypatch.setattr(solvers, "guided_update", guided_update_reference)  # which takes float64
    errors = []
    for num_steps in (32, 64):
        lambdas = torch.linspace(math.log(0.1 / 0.9), math.log(0.8 / 0.2), num_steps + 1, dtype=torch.float64)
        sigmas = torch.sigmoid(-lambdas).float().tolist()
        last = run(solver, steps_between(sigmas), forced_solution(sigmas[0]), forced_velocity)[-1]
        errors.append((last - forced_solution(sigmas[-1])).norm().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25), errors


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 40])
def test_a_velocity_that_points_at_one_clean_latent_ends_there(solver, num_steps):
    clean, noise = seeded("clean", 4, 5), seeded("noise", 4, 5)
    steps = make_steps(solver, num_steps, 5.0)
    start = (1 - steps[0].sigma) * clean + steps[0].sigma * noise
    last = run(solver, steps, start, lambda x, step: (x - clean) / step.sigma)[-1]
    assert_close(got=last, want=clean, op="solver")


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_input_is_written_to_and_the_same_step_twice_gives_the_same_bits(solver):
    steps = make_steps(solver, 5, 5.0)
    x, history = seeded("start", 3, 4), None
    for step in steps:
        velocity = toy_velocity(x, step)
        before = [t.clone() for t in (x, velocity, *(history.predictions if history else ()))]
        first, second = (take_step(solver, x, velocity, step, history) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert first[0].dtype == torch.float32
        after = [x, velocity, *(history.predictions if history else ())]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        x, history = first


@pytest.mark.parametrize("solver", SOLVERS)
def test_torch_s_default_device_and_dtype_change_nothing(solver):
    steps, start = make_steps(solver, 5, 5.0), seeded("start", 3, 4)
    want = run(solver, steps, start, toy_velocity)[-1]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = run(solver, steps, start, toy_velocity)[-1]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)


@pytest.mark.parametrize(("guidance", "forwards"), [(1.0, 1), (1, 1), (3.5, 2), (0.0, 2), (1.0000001, 2)])
def test_only_guidance_one_needs_no_negative_prompt(guidance, forwards):
    step = Step(index=0, num_steps=1, sigma=1.0, sigma_next=0.0, timestep=1000, expert="single", guidance=guidance)
    assert step.num_forwards == forwards
