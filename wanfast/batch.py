"""Many clips of one model, ordered by phase, so that weights move once for a group and not once for each clip.

    all prompts -> of each group: high-noise steps of each clip -> one swap -> low-noise steps of each -> each decoded

A clip takes the same steps on the same numbers as it would alone, so it comes out the same. Between its phases a clip
waits in host memory. While a group is decoded, the weights that the next one begins with are on their way.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from wanfast.budget import Budget
from wanfast.config import ExpertName
from wanfast.denoise import Conditions, OnProgress, OnState, Stretch, denoise, experts_of_passes
from wanfast.errors import MemoryBudgetError, NumericsError
from wanfast.forecast import bound_blocks, budget_here, decodes_beside_blocks
from wanfast.generation import Inputs, decode_frames, draw_noise, encode_image, no_memory, own_arithmetic
from wanfast.loaded import LoadedModel
from wanfast.out_of_memory import OutOfMemory, attempt
from wanfast.plan import Plan
from wanfast.prompts import encode_prompts
from wanfast.run_state import RunState, map_state
from wanfast.solvers import Step

GROUP_BYTES = 2_000_000_000  # of waiting clips, in host memory; as much again of encoded prompts

_HOST = torch.device("cpu")

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One clip to make."""

    plan: Plan
    inputs: Inputs  # without latents and context of the caller's
    on_state: OnState | None = None  # as in `generate_latents`
    is_cancelled: Callable[[], bool] | None = None  # asked before each step and each chunk of frames


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a clip: its frames, to be taken before the next clip is asked for, or why there are none."""

    index: int  # of the job
    frames: Iterator[Tensor] | None  # as `generate_frames` yields them; CancelledError where it is cancelled meanwhile
    error: Exception | None = None


@dataclass(slots=True)
class _Clip:
    """A clip between two phases; all of it is on the host."""

    index: int
    job: Job
    contexts: list[Tensor] = field(default_factory=list)  # of prompt and negative prompt; none before they are encoded
    picture: Tensor | None = None
    state: RunState | None = None
    error: Exception | None = None

    def fail(self, error: Exception) -> None:
        """Leave it at that; the error keeps nothing alive that was computed with."""
        self.error, self.state, self.picture = error.with_traceback(None), None, None
        error.__context__ = error.__cause__ = None


@torch.no_grad()
def generate_batch(
    model: LoadedModel, jobs: Sequence[Job], on_progress: Callable[[int], OnProgress] | None = None
) -> Iterator[Made]:
    """Make clips, a group at a time.

    A clip that needs more memory than there is, whose numbers leave the finite ones, or that is cancelled, is given
    with its error (MemoryBudgetError, NumericsError, CancelledError); the others are made all the same.

    Args:
        model: open weights, which all clips share.
        jobs: the clips.
        on_progress: gives, for a job's index, what is told how far that clip is.

    Yields:
        What became of each clip, in their order.

    Raises:
        CheckpointError: the model's files cannot be read: no clip could be made.
        MemoryBudgetError: there is not even memory to encode one prompt.
    """
    tell = on_progress or (lambda index: lambda stage, done, total: None)
    clips = [_Clip(index, job) for index, job in enumerate(jobs)]
    for clip in clips:
        _budget(model, clip)  # what cannot fit is known before anything is computed
    groups = _groups(clips)
    for number, group in enumerate(groups):
        model.compute_in(group[0].job.plan.precision)
        _encode(model, clips[group[0].index :], len(group), tell(group[0].index))
        _begin(model, group, tell)
        _denoise_by_phase(model, group, tell)
        following = groups[number + 1] if number + 1 < len(groups) else []
        with _weights_coming(model, group, following):
            for clip in group:
                frames = None if clip.error else _frames(model, clip, tell(clip.index))
                yield Made(clip.index, frames, clip.error)
                clip.state, clip.picture, clip.contexts = None, None, []


def _groups(clips: Sequence[_Clip]) -> list[list[_Clip]]:
    """Split clips, in order, into groups that can wait in host memory together and compute in one precision."""
    groups: list[list[_Clip]] = []
    room = 0
    for clip in clips:
        # fp32 latents, two predictions and what the last step started from; pictures as much again at most.
        needed = 8 * 4 * math.prod(clip.job.plan.latent_shape)
        is_another = bool(groups) and clip.job.plan.precision != groups[-1][0].job.plan.precision
        if needed > room or not groups or is_another:
            groups.append([])
            room = GROUP_BYTES
        groups[-1].append(clip)
        room -= needed
    return groups


def _budget(model: LoadedModel, clip: _Clip) -> Budget | None:
    """Settle a clip's memory; None where it has failed, of which too little memory may be the reason."""
    if clip.error is None:
        try:
            return budget_here(model, clip.job.plan, clip.job.inputs.loras)
        except MemoryBudgetError as error:
            clip.fail(error)
    return None


def _encode(model: LoadedModel, clips: Sequence[_Clip], at_least: int, progress: OnProgress) -> None:
    """Encode the prompts of clips, unless the first ones have theirs: of as many as can wait, so that one pass does.

    Those of another precision wait for their group: the encoder computes in the dtype of theirs.
    """
    text_bytes = model.config.dit.text_len * model.config.dit.text_dim * model.compute_dtype.itemsize
    first = [clip for clip in clips[:at_least] if clip.error is None]
    if all(clip.contexts for clip in first):
        return
    unfailed = (clip for clip in clips[: max(at_least, GROUP_BYTES // text_bytes)] if clip.error is None)
    some = [clip for clip in unfailed if clip.job.plan.precision == model.precision]
    with own_arithmetic(model):
        contexts = encode_prompts(model, [clip.job.plan for clip in some], progress)
    for clip, context in zip(some, contexts, strict=True):
        clip.contexts = context


def _begin(model: LoadedModel, group: Sequence[_Clip], tell: Callable[[int], OnProgress]) -> None:
    """Draw each clip's noise and encode its picture."""
    for clip in group:
        job = clip.job
        if clip.error is not None:
            continue
        clip.state = job.inputs.state or RunState(0, draw_noise(job.plan), None)
        if job.inputs.image is not None:
            picture = _alone(model, clip, partial(encode_image, model, job.plan, job.inputs.image, tell(clip.index)))
            clip.picture = None if picture is None else picture.to(_HOST)


def _denoise_by_phase(model: LoadedModel, group: Sequence[_Clip], tell: Callable[[int], OnProgress]) -> None:
    """Take every clip's steps of one expert, then every clip's of the next; a clip that fails drops out."""
    budgets = {clip.index: budget for clip in group if (budget := _budget(model, clip)) is not None}
    if not budgets:
        return
    bound_blocks(model, list(budgets.values()))
    left = [
        (clip, Stretch(steps, budgets[clip.index].chunking))
        for expert in model.config.experts
        for clip in group
        if clip.error is None and (steps := _steps_of(clip, expert.name))
    ]
    with model.passes(experts_of_passes(stretch for _, stretch in left)):
        while left:
            clip, following = left[0][0], left[1:]
            taken = _alone(model, clip, partial(_take, model, clip, [one for _, one in left], tell(clip.index)))
            if taken is None:
                left = [(other, stretch) for other, stretch in following if other is not clip]
                model.announce(experts_of_passes(stretch for _, stretch in left))
            else:
                clip.state, finer = taken
                left = [(other, stretch) for (other, _), stretch in zip(following, finer, strict=True)]


def _steps_of(clip: _Clip, expert: ExpertName) -> tuple[Step, ...]:
    """List an expert's steps that a clip has before it."""
    state = clip.state or clip.job.inputs.state
    ahead = clip.job.plan.steps[0 if state is None else state.next_step :]
    return tuple(step for step in ahead if step.expert == expert)


def _take(
    model: LoadedModel, clip: _Clip, stretches: Sequence[Stretch], progress: OnProgress
) -> tuple[RunState, tuple[Stretch, ...]]:
    """Take the first of the stretches; give the clip's state and the other stretches, as `denoise` does."""
    assert clip.state is not None, "a clip that has begun"
    device, job = model.device, clip.job
    conditions = Conditions(
        contexts=[context.to(device) for context in clip.contexts],
        picture=None if clip.picture is None else clip.picture.to(device),
        loras=job.inputs.loras,
    )

    def on_state(state: RunState) -> None:
        if job.on_state is not None:
            job.on_state(state)
        _refuse_cancelled(clip)

    _refuse_cancelled(clip)
    with own_arithmetic(model):
        state, following = denoise(
            model, job.plan, clip.state, stretches, conditions, on_step=None, on_state=on_state, progress=progress
        )
    return map_state(state, _HOST), following


def _alone(model: LoadedModel, clip: _Clip, work: Callable[[], Result]) -> Result | None:
    """Do a clip's work; what goes wrong with it alone is its own, and gives None."""
    try:
        made = attempt(work)
    except (NumericsError, MemoryBudgetError, CancelledError) as error:
        clip.fail(error)
        return None
    if isinstance(made, OutOfMemory):
        clip.fail(no_memory(model, f"{clip.job.plan.width}x{clip.job.plan.height}", made))
        return None
    return made


def _frames(model: LoadedModel, clip: _Clip, progress: OnProgress) -> Iterator[Tensor]:
    assert clip.state is not None, "a clip that was denoised"
    _refuse_cancelled(clip)
    for chunk in decode_frames(model, clip.job.plan, clip.state.latents[0], progress):
        yield chunk
        _refuse_cancelled(clip)


def _refuse_cancelled(clip: _Clip) -> None:
    if clip.job.is_cancelled is not None and clip.job.is_cancelled():
        raise CancelledError(f"clip {clip.index + 1}: cancelled")


def _weights_coming(
    model: LoadedModel, group: Sequence[_Clip], following: Sequence[_Clip]
) -> AbstractContextManager[None]:
    """Let the weights come that the next group begins with, while this one is decoded.

    They go to the device where the decoder leaves them their room there, else as far as host memory.
    """
    unfailed = [clip for clip in following if clip.error is None and clip.job.plan.precision == model.precision]
    # A pass for each step, where they are settled later: what counts is which blocks are needed soonest.
    experts = [one.name for one in model.config.experts for clip in unfailed for _ in _steps_of(clip, one.name)]
    decoded = [clip.job for clip in group if clip.error is None]
    if model.device.type == "cuda" and not (
        experts and all(decodes_beside_blocks(model, job.plan, job.inputs.loras) for job in decoded)
    ):
        model.release_experts()  # the VAE's activations need the room
        return model.reading_ahead(experts)
    return model.passes(experts)
