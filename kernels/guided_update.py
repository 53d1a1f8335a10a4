"""Guidance and one solver step, element by element.

    velocity   = without + guidance * (with_prompt - without)          or the one velocity there is
    prediction = latents - sigma * velocity                             the clean latents that it implies
    start      = k_0 * past_0 + k_1 * past_1 + k_2 * past_2 + k_prediction * prediction     or the latents
    updated    = u_start * start + u_velocity * velocity + u_prediction * prediction
                 + u_0 * past_0 + u_1 * past_1 + u_2 * past_2

The first sum for `start` is a corrector: it takes the last step again, now that the prediction at its end is known.

Grid       (ceil(E / 1024),), E elements in one row.
Tile       1024 elements, 4 warps.
Numerics   fp32; products and sums in the order above. Terms whose weights are all 0 are left out.
Traffic    4*E bytes for each tensor read and written: at most 6 reads and 3 writes; bandwidth-bound.
Reference  guided_update_reference, below.
Source     Guidance: arXiv 2207.12598. UniPC: arXiv 2302.04867. DPM-Solver++: arXiv 2211.01095. All of Wan's solvers are
           of this form: wan/utils/fm_solvers.py and fm_solvers_unipc.py in Wan-Video/Wan2.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import require
from ._launch import on_device_of, runs_triton, tl, triton

MAX_PAST = 3
BLOCK = 1024
NUM_WARPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Weights of the sum that replaces the latents a step starts from."""

    prediction: float
    past: tuple[float, ...]  # one for each tensor of the past


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Weights of one solver step."""

    sigma: float  # noise level of the latents
    start: float  # weights of `updated`, from here on
    velocity: float = 0.0
    prediction: float = 0.0
    past: tuple[float, ...] = ()  # one for each tensor of the past
    correction: Correction | None = None  # of what the step starts from


@dataclass(frozen=True, slots=True)
class Updated:
    """What one step gives; the tensors are fresh, but for an uncorrected start."""

    latents: Tensor  # at the next noise level
    prediction: Tensor  # clean latents, as this step's velocity implies them
    start: Tensor  # what the step started from: the latents, or their correction


def guided_update_reference(
    latents: Tensor,
    with_prompt: Tensor,
    update: Update,
    *,
    without: Tensor | None = None,
    guidance: float = 1.0,
    past: Sequence[Tensor] = (),
) -> Updated:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    velocity = with_prompt if without is None else without + guidance * (with_prompt - without)
    prediction = latents - update.sigma * velocity
    start = latents
    if update.correction is not None:
        corrected = [weight * x for weight, x in zip(update.correction.past, past, strict=True)]
        start = sum(corrected[1:], corrected[0]) + update.correction.prediction * prediction
    terms = [(update.velocity, velocity), (update.prediction, prediction), *zip(update.past, past, strict=True)]
    updated = update.start * start
    for weight, x in terms:
        if weight != 0.0:
            updated = updated + weight * x
    return Updated(updated, prediction, start)


@triton.jit
def _guided_update_kernel(
    latents_ptr,  # [E], contiguous, as all of them
    with_prompt_ptr,
    without_ptr,  # read where GUIDED
    past_0_ptr,  # the first PAST of these three are read
    past_1_ptr,
    past_2_ptr,
    updated_ptr,
    prediction_ptr,
    start_ptr,  # written where CORRECTED
    E,  # a multiple of 16 has code of its own, with 16-byte accesses
    guidance,
    sigma,
    k_0,
    k_1,
    k_2,
    k_prediction,
    u_start,
    u_velocity,
    u_prediction,
    u_0,
    u_1,
    u_2,
    GUIDED: tl.constexpr,
    PAST: tl.constexpr,  # 0 to 3
    CORRECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < E

    start = tl.load(latents_ptr + at, mask=live, other=0.0)
    velocity = tl.load(with_prompt_ptr + at, mask=live, other=0.0)
    if GUIDED:
        without = tl.load(without_ptr + at, mask=live, other=0.0)
        velocity = without + guidance * (velocity - without)
    prediction = start - sigma * velocity
    tl.store(prediction_ptr + at, prediction, mask=live)

    past_0 = tl.load(past_0_ptr + at, mask=live & (PAST > 0), other=0.0)
    past_1 = tl.load(past_1_ptr + at, mask=live & (PAST > 1), other=0.0)
    past_2 = tl.load(past_2_ptr + at, mask=live & (PAST > 2), other=0.0)
    if CORRECTED:
        start = k_0 * past_0 + k_1 * past_1 + k_2 * past_2 + k_prediction * prediction
        tl.store(start_ptr + at, start, mask=live)
    updated = u_start * start + u_velocity * velocity + u_prediction * prediction
    updated += u_0 * past_0 + u_1 * past_1 + u_2 * past_2
    tl.store(updated_ptr + at, updated, mask=live)


def _weights(past: Sequence[float]) -> list[float]:
    return [float(weight) for weight in (*past, *[0.0] * (MAX_PAST - len(past)))]


def guided_update_triton(
    latents: Tensor,
    with_prompt: Tensor,
    update: Update,
    *,
    without: Tensor | None = None,
    guidance: float = 1.0,
    past: Sequence[Tensor] = (),
) -> Updated:
    """Launch the kernel on checked arguments."""
    correction = update.correction
    updated, prediction = torch.empty_like(latents), torch.empty_like(latents)
    start = latents if correction is None else torch.empty_like(latents)
    elements = latents.numel()
    with on_device_of(latents):
        _guided_update_kernel[(-(-elements // BLOCK),)](
            latents,
            with_prompt,
            with_prompt if without is None else without,
            *past,
            *[latents] * (MAX_PAST - len(past)),
            updated,
            prediction,
            start,
            elements,
            float(guidance),
            float(update.sigma),
            *_weights(() if correction is None else correction.past),
            0.0 if correction is None else float(correction.prediction),
            float(update.start),
            float(update.velocity),
            float(update.prediction),
            *_weights(update.past),
            GUIDED=without is not None,
            PAST=len(past),
            CORRECTED=correction is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return Updated(updated, prediction, start)


def guided_update(
    latents: Tensor,
    with_prompt: Tensor,
    update: Update,
    *,
    without: Tensor | None = None,
    guidance: float = 1.0,
    past: Sequence[Tensor] = (),
) -> Updated:
    """Combine the velocities with and without the prompt, and take the solver step whose weights are given.

    Args:
        latents: any shape, contiguous, fp32, at noise level update.sigma.
        with_prompt: the DiT's velocity at the latents; like the latents.
        update: weights of the step.
        without: velocity for the negative prompt, like the latents; None where with_prompt is the only velocity.
        guidance: how far to go from `without` through with_prompt; 1 is with_prompt itself. Of no effect alone.
        past: at most 3 tensors like the latents that the weights refer to: predictions and starts of steps before.

    Returns:
        Latents at the next noise level, this step's prediction, and what the step started from. No input is written to.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above, or the weights do not fit the past.
    """
    tensors = {"latents": latents, "with_prompt": with_prompt}
    tensors |= {f"past[{i}]": x for i, x in enumerate(past)} | ({} if without is None else {"without": without})
    for name, x in tensors.items():
        require(x.dtype == torch.float32, f"{name}: must be float32", x.dtype)
        require(x.is_contiguous(), f"{name}: must be contiguous", f"strides {x.stride()}")
        require(x.shape == latents.shape, f"{name}: must have latents' shape {tuple(latents.shape)}", tuple(x.shape))
        require(x.device == latents.device, f"{name}: must be on {latents.device}, like latents", x.device)
    require(len(past) <= MAX_PAST, f"past: must be at most {MAX_PAST} tensors", len(past))
    correction = update.correction
    require(correction is None or len(past) > 0, "past: a correction must have at least one tensor", len(past))
    for name, weights in (("update", update), ("update.correction", correction)):
        fits = weights is None or len(weights.past) == len(past)
        require(fits, f"{name}.past: must be {len(past)} weights, one for each tensor of the past", weights)
    run = guided_update_triton if runs_triton(latents) else guided_update_reference
    return run(latents, with_prompt, update, without=without, guidance=guidance, past=past)
