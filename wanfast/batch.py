"""Many clips of one model, ordered by phase, so that weights move once for a group and not once for each clip.

    all prompts of a group -> each clip's high-noise steps -> one swap -> each clip's low-noise steps -> each decoded

A clip takes the same steps on the same numbers as it would alone, so it comes out the same. Between its phases a clip
waits in host memory.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wanfast.denoise import Conditions, OnProgress, OnState, denoise, experts_of_passes
from wanfast.dit.chunking import Chunking
from wanfast.errors import MemoryBudgetError, NumericsError
from wanfast.forecast import bound_blocks
from wanfast.generation import Inputs, decode_frames, draw_noise, encode_image, encode_prompts, own_arithmetic
from wanfast.loaded import LoadedModel
from wanfast.plan import Plan
from wanfast.run_state import RunState, map_state
from wanfast.solvers import Step

GROUP_BYTES = 2_000_000_000  # of waiting clips, in host memory

_HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One clip to make."""

    plan: Plan
    inputs: Inputs  # without latents and context of the caller's
    on_state: OnState | None = None  # as in `generate_latents`


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a clip: its frames, to be taken before the next clip is asked for, or why there are none."""

    index: int  # of the job
    frames: Iterator[Tensor] | None  # as `generate_frames` yields them
    error: Exception | None = None


@dataclass(slots=True)
class _Waiting:
    """A clip between two phases."""

    index: int
    job: Job
    conditions: Conditions  # on the host, as is the state
    state: RunState
    error: Exception | None = None


@torch.no_grad()
def generate_batch(
    model: LoadedModel, jobs: Sequence[Job], on_progress: Callable[[int], OnProgress] | None = None
) -> Iterator[Made]:
    """Make clips, a group at a time.

    Args:
        model: open weights, which all clips share.
        jobs: the clips.
        on_progress: gives, for a job's index, what is told how far that clip is.

    Yields:
        What became of each clip, in their order.

    Raises:
        CheckpointError: the model's files cannot be read: no clip could be made.
        MemoryBudgetError: a clip of a group needs more memory than is free when the group begins.
    """
    tell = on_progress or (lambda index: lambda stage, done, total: None)
    start = 0
    for size in _group_sizes([job.plan for job in jobs]):
        clips = _begin(model, jobs[start : start + size], start, tell)
        _denoise_by_phase(model, clips, tell)
        if model.device.type == "cuda":
            model.release_experts()  # the VAE's activations need the room
        for clip in clips:
            latents = clip.state.latents[0]
            frames = None if clip.error else decode_frames(model, clip.job.plan, latents, tell(clip.index))
            yield Made(clip.index, frames, clip.error)
        start += size


def _group_sizes(plans: Sequence[Plan]) -> list[int]:
    """Split clips, in order, into groups that can wait in host memory together."""
    sizes: list[int] = []
    room = 0
    for plan in plans:
        # fp32 latents, two predictions and what the last step started from; texts and pictures as much again at most.
        needed = 8 * 4 * math.prod(plan.latent_shape)
        if needed > room or not sizes:
            sizes.append(0)
            room = GROUP_BYTES
        sizes[-1] += 1
        room -= needed
    return sizes


def _begin(model: LoadedModel, jobs: Sequence[Job], start: int, tell: Callable[[int], OnProgress]) -> list[_Waiting]:
    """Encode the prompts of a group together, and each picture."""
    clips = []
    with own_arithmetic(model):
        contexts = encode_prompts(model, [job.plan for job in jobs], tell(start))
        for index, (job, context) in enumerate(zip(jobs, contexts, strict=True), start):
            state = job.inputs.state or RunState(0, draw_noise(job.plan), None)
            conditions = Conditions(contexts=[part.to(_HOST) for part in context], loras=job.inputs.loras)
            clip = _Waiting(index, job, conditions, state)
            clips.append(clip)
            if job.inputs.image is not None:
                try:
                    picture = encode_image(model, job.plan, job.inputs.image, tell(index))
                except MemoryBudgetError as error:
                    clip.error = error
                else:
                    clip.conditions = replace(conditions, picture=picture.to(_HOST))
    return clips


def _denoise_by_phase(model: LoadedModel, clips: Sequence[_Waiting], tell: Callable[[int], OnProgress]) -> None:
    """Take every clip's steps of one expert, then every clip's of the next; a clip that fails drops out."""
    order: list[tuple[_Waiting, tuple[Step, ...]]] = []
    for expert in model.config.experts:
        for clip in clips:
            ahead = clip.job.plan.steps[clip.state.next_step :]
            order.append((clip, tuple(step for step in ahead if step.expert == expert.name)))
    chunking = bound_blocks(model, [clip.job.plan for clip in clips], clips[0].conditions.loras)
    experts = experts_of_passes([step for _, steps in order for step in steps], chunking)
    with own_arithmetic(model), model.passes(experts):
        for clip, steps in order:
            if steps and clip.error is None:
                _take(model, clip, steps, chunking, tell(clip.index))


def _take(model: LoadedModel, clip: _Waiting, steps: Sequence[Step], chunking: Chunking, progress: OnProgress) -> None:
    job, device = clip.job, model.device
    picture = None if clip.conditions.picture is None else clip.conditions.picture.to(device)
    contexts = [part.to(device) for part in clip.conditions.contexts]
    conditions = replace(clip.conditions, contexts=contexts, picture=picture)
    try:
        state = denoise(
            model,
            job.plan,
            clip.state,
            steps,
            conditions,
            chunking,
            on_step=None,
            on_state=job.on_state,
            progress=progress,
        )
    except (NumericsError, MemoryBudgetError) as error:
        clip.error = error
    else:
        clip.state = map_state(state, _HOST)
