"""Solvers of the flow ODE d latents / d sigma = velocity: each gives the weights of one step, which one pass takes.

With alpha = 1 - sigma and lambda = ln alpha - ln sigma, the clean latents that a velocity implies are
x0 = latents - sigma velocity. unipc and dpmpp extrapolate x0 over lambda from the last two steps; euler follows the
velocity.

Every step is a sum of the latents, the velocity, x0 and what is remembered, with weights that the sigmas settle: they
are computed in fp32 on the CPU, as in the reference, and no step waits for a device. Tensors stay where they are.

Source: Wan-Video/Wan2.2, wan/utils/fm_solvers_unipc.py and fm_solvers.py.
UniPC: arXiv 2302.04867. DPM-Solver++: arXiv 2211.01095.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from wanfast.config import ExpertName, SolverName
from wanfast.kernels import Correction, Update, guided_update


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a run, settled before anything is computed."""

    index: int  # from 0
    num_steps: int
    sigma: float  # exactly an fp32 value; the latents' noise level before the step
    sigma_next: float  # after it; 0 ends the run
    timestep: int | float  # what the DiT is told, in [0, 1000]
    expert: ExpertName
    guidance: float

    @property
    def num_forwards(self) -> int:
        """DiT evaluations the step needs: at guidance 1 the negative prompt has no weight."""
        return 1 if self.guidance == 1.0 else 2


@dataclass(frozen=True, slots=True)
class History:
    """What a multistep solver remembers of the steps before: at most two of each, the newest last."""

    predictions: tuple[Tensor, ...]  # x0 of each step, the latents' shape
    sigmas: tuple[float, ...]  # where they were made
    latents: Tensor  # what the last step started from, after its correction


Solver = Callable[[Step, tuple[float, ...]], Update]  # (step, sigmas of what is remembered) -> weights


def take_step(
    solver: SolverName,
    latents: Tensor,
    velocity: Tensor,
    step: Step,
    history: History | None,
    *,
    without: Tensor | None = None,
) -> tuple[Tensor, History | None]:
    """Guide the velocity and take one step.

    Args:
        solver: a key of SOLVERS.
        latents: any shape, fp32, at step.sigma.
        velocity: of the DiT at the latents, with the prompt; like the latents.
        step: the step to take.
        history: what the step before returned; None on the first.
        without: the velocity without the prompt, likewise, where the step's guidance asks for it.

    Returns:
        Latents at step.sigma_next, and the history for the next step; None where it needs none. No input is written to.
    """
    sigmas = () if history is None else history.sigmas
    update = SOLVERS[solver](step, sigmas)
    past = () if history is None else (history.latents, *reversed(history.predictions))
    past = past[: len(update.past)]
    latents, velocity = latents.contiguous(), velocity.contiguous()
    without = None if without is None else without.contiguous()
    done = guided_update(latents, velocity, update, without=without, guidance=step.guidance, past=past)
    if solver == "euler" or step.sigma_next == 0.0:
        return done.latents, None
    kept = history if solver == "unipc" and history is not None else History((), (), latents)
    predictions, sigmas = (*kept.predictions[-1:], done.prediction), (*kept.sigmas[-1:], step.sigma)
    return done.latents, History(predictions, sigmas, done.start)


def unipc(step: Step, sigmas: tuple[float, ...]) -> Update:
    """Weigh a step of UniPC, order 2 (B(h) = e^h - 1): correct the last step by the new velocity, then predict.

    Args:
        step: the step to take.
        sigmas: of the predictions that are remembered, at most two, the newest last.

    Returns:
        Weights; the past is what the last step started from, then its prediction, then the one before that.
    """
    if step.sigma_next == 0.0:
        return _to_clean(step)  # the limit of the formula; a correction of the latents has no weight in it
    span = _Span.between(step.sigma, step.sigma_next)
    if not sigmas:
        return Update(sigma=step.sigma, start=span.ratio, prediction=-span.gain)
    slope = -0.5 * span.gain / _position(sigmas[-1], step.sigma, span.h)
    rest = (0.0,) * (len(sigmas) - 1)
    return Update(
        sigma=step.sigma,
        start=span.ratio,
        prediction=-span.gain - slope,
        past=(0.0, slope, *rest),
        correction=_correction(step.sigma, sigmas),
    )


def _correction(sigma: float, sigmas: tuple[float, ...]) -> Correction:
    """Redo the last step, now that x0 at its end is known: UniC, of the order the last prediction had."""
    span = _Span.between(sigmas[-1], sigma)
    if len(sigmas) == 1:
        return Correction(prediction=-0.5 * span.gain, past=(span.ratio, -0.5 * span.gain))
    position = (_lambda(sigmas[-2]) - _lambda(sigmas[-1])) / span.h
    weight, weight_end = _corrector_weights(position, span.h)
    slope = span.gain * (weight / position.item())
    return Correction(
        prediction=-span.gain * weight_end, past=(span.ratio, span.gain * (weight_end - 1) + slope, -slope)
    )


def _position(older: float, newest: float, h: Tensor) -> float:
    """Where the older prediction lies in lambda, counted from the newest in units of h; negative."""
    return ((_lambda(older) - _lambda(newest)) / h).item()


def _corrector_weights(position: Tensor, h: Tensor) -> tuple[float, float]:
    """Solve UniC's two order conditions for the weights of the slope behind and of the change ahead."""
    growth = torch.expm1(-h)
    phi_2 = growth / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    one = torch.ones_like(position)
    conditions = torch.stack([one, one, position, one]).view(2, 2)
    weights = torch.linalg.solve(conditions, torch.stack([phi_2 / growth, phi_3 * 2 / growth]))
    return weights[0].item(), weights[1].item()


def dpmpp_2m(step: Step, sigmas: tuple[float, ...]) -> Update:
    """Weigh a step of DPM-Solver++ 2M (midpoint, deterministic); the first and the last step are of order 1.

    Where the run starts at sigma 1, lambda is -inf there and the second step is of order 1 too, by the same formula.

    Args:
        step: the step to take.
        sigmas: of the prediction that is remembered, if there is one.

    Returns:
        Weights; the past is as for `unipc`.
    """
    if step.sigma_next == 0.0:
        return _to_clean(step)  # the limit of the formula
    span = _Span.between(step.sigma, step.sigma_next)
    gain = (_alpha(step.sigma_next) * (torch.exp(-span.h) - 1.0)).item()
    if not sigmas:
        return Update(sigma=step.sigma, start=span.ratio, prediction=-gain)
    behind = _lambda(step.sigma) - _lambda(sigmas[-1])
    slope = 0.5 * gain / (behind / span.h).item()
    return Update(sigma=step.sigma, start=span.ratio, prediction=-gain - slope, past=(0.0, slope))


def euler(step: Step, sigmas: tuple[float, ...]) -> Update:
    """Weigh a straight line along the velocity from step.sigma to step.sigma_next; nothing is remembered."""
    length = _scalar(step.sigma_next) - _scalar(step.sigma)
    return Update(sigma=step.sigma, start=1.0, velocity=length.item())


def _to_clean(step: Step) -> Update:
    return Update(sigma=step.sigma, start=0.0, prediction=1.0)


@dataclass(frozen=True, slots=True)
class _Span:
    """Coefficients shared by all formulas between two sigmas."""

    h: Tensor  # lambda at the end less lambda at the start; scalar, fp32, CPU
    ratio: float  # sigma at the end over sigma at the start
    gain: float  # alpha at the end x (e^-h - 1)

    @classmethod
    def between(cls, start: float, end: float) -> "_Span":
        h = _lambda(end) - _lambda(start)
        ratio = _scalar(end) / _scalar(start)
        return cls(h, ratio.item(), (_alpha(end) * torch.expm1(-h)).item())


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")  # whatever torch's default device is


def _alpha(sigma: float) -> Tensor:
    return 1 - _scalar(sigma)


def _lambda(sigma: float) -> Tensor:
    return torch.log(_alpha(sigma)) - torch.log(_scalar(sigma))


SOLVERS: MappingProxyType[SolverName, Solver] = MappingProxyType({"unipc": unipc, "dpmpp": dpmpp_2m, "euler": euler})
