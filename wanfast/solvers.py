"""Solvers of the flow ODE d latents / d sigma = velocity: each is a function that takes one step.

With alpha = 1 - sigma and lambda = ln alpha - ln sigma, the clean latents that a velocity implies are
x0 = latents - sigma velocity. unipc and dpmpp extrapolate x0 over lambda from the last two steps; euler follows the
velocity.

Coefficients are computed in fp32 on the CPU and combined before they meet a tensor, as in the reference, so results
agree with it to the last bits, and no step waits for a device. Tensors stay where they are.

Source: Wan-Video/Wan2.2, wan/utils/fm_solvers_unipc.py and fm_solvers.py.
UniPC: arXiv 2302.04867. DPM-Solver++: arXiv 2211.01095.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from wanfast.config import ExpertName, SolverName


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


Solver = Callable[[Tensor, Tensor, Step, History | None], tuple[Tensor, History | None]]


def unipc(latents: Tensor, velocity: Tensor, step: Step, history: History | None) -> tuple[Tensor, History | None]:
    """Take one step of UniPC, order 2 (B(h) = e^h - 1): correct the last step by the new velocity, then predict.

    Args:
        latents: any shape, fp32, at step.sigma.
        velocity: DiT output at the latents, guided; the latents' shape, fp32.
        step: the step to take.
        history: what the step before returned; None on the first.

    Returns:
        Latents at step.sigma_next, and the history for the next step. No input is written to.
    """
    prediction = latents - step.sigma * velocity
    if step.sigma_next == 0.0:
        return prediction, None  # the limit of the formula; a correction of `latents` has no weight in it
    if history is None:
        history = History((prediction,), (step.sigma,), latents)
    else:
        corrected = _correct(prediction, step.sigma, history)
        history = History(
            (*history.predictions[-1:], prediction),
            (*history.sigmas[-1:], step.sigma),
            corrected,
        )
    return _predict(step.sigma_next, history), history


def _predict(sigma_next: float, history: History) -> Tensor:
    """Carry history.latents from the newest sigma on to sigma_next: UniP, of order 1 on the first step, then 2."""
    span = _Span.between(history.sigmas[-1], sigma_next)
    base = span.ratio * history.latents - span.gain * history.predictions[-1]
    if len(history.predictions) == 1:
        return base
    return base - span.gain * (0.5 * _slope(history, span.h))


def _correct(prediction: Tensor, sigma: float, history: History) -> Tensor:
    """Redo the last step, now that x0 at its end is known: UniC, of the order the last prediction had."""
    span = _Span.between(history.sigmas[-1], sigma)
    newest = history.predictions[-1]
    base = span.ratio * history.latents - span.gain * newest
    change = prediction - newest
    if len(history.predictions) == 1:
        return base - span.gain * (0.5 * change)
    weight, weight_end = _corrector_weights(_position(history, span.h), span.h)
    return base - span.gain * (weight * _slope(history, span.h) + weight_end * change)


def _slope(history: History, h: Tensor) -> Tensor:
    """Difference of the two remembered predictions, in units of a step of length h in lambda."""
    older, newest = history.predictions
    return (older - newest) / _position(history, h).item()


def _position(history: History, h: Tensor) -> Tensor:
    """Where the older prediction lies in lambda, counted from the newest in units of h; negative."""
    older, newest = history.sigmas
    return (_lambda(older) - _lambda(newest)) / h


def _corrector_weights(position: Tensor, h: Tensor) -> tuple[float, float]:
    """Solve UniC's two order conditions for the weights of the slope behind and of the change ahead."""
    growth = torch.expm1(-h)
    phi_2 = growth / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    one = torch.ones_like(position)
    conditions = torch.stack([one, one, position, one]).view(2, 2)
    weights = torch.linalg.solve(conditions, torch.stack([phi_2 / growth, phi_3 * 2 / growth]))
    return weights[0].item(), weights[1].item()


def dpmpp_2m(latents: Tensor, velocity: Tensor, step: Step, history: History | None) -> tuple[Tensor, History | None]:
    """Take one step of DPM-Solver++ 2M (midpoint, deterministic); the first and the last step are of order 1.

    Where the run starts at sigma 1, lambda is -inf there and the second step is of order 1 too, by the same formula.

    Args:
        latents: any shape, fp32, at step.sigma.
        velocity: DiT output at the latents, guided; the latents' shape, fp32.
        step: the step to take.
        history: what the step before returned; None on the first.

    Returns:
        Latents at step.sigma_next, and the history for the next step. No input is written to.
    """
    prediction = latents - step.sigma * velocity
    if step.sigma_next == 0.0:
        return prediction, None  # the limit of the formula
    span = _Span.between(step.sigma, step.sigma_next)
    gain = _alpha(step.sigma_next) * (torch.exp(-span.h) - 1.0)
    result = span.ratio * latents - gain.item() * prediction
    if history is not None:
        behind = _lambda(step.sigma) - _lambda(history.sigmas[-1])
        slope = (1.0 / (behind / span.h)).item() * (prediction - history.predictions[-1])
        result = result - (0.5 * gain).item() * slope
    return result, History((prediction,), (step.sigma,), latents)


def euler(latents: Tensor, velocity: Tensor, step: Step, history: History | None) -> tuple[Tensor, History | None]:
    """Follow the velocity in a straight line from step.sigma to step.sigma_next.

    Args:
        latents: any shape, fp32, at step.sigma.
        velocity: DiT output at the latents, guided; the latents' shape, fp32.
        step: the step to take.
        history: returned as it came; one step needs no other.

    Returns:
        Latents at step.sigma_next, and the history. No input is written to.
    """
    length = _scalar(step.sigma_next) - _scalar(step.sigma)
    return latents + length.item() * velocity, history


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
