"""The steps of a run: latents, velocity, latents of less noise, with whatever memory there is.

    for each step:  velocities = DiT with the prompt, DiT without   latents, history = take_step(latents, velocities)

When memory runs out in a step, blocks are let go, then the step is cut finer, and it is taken again.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wanfast.config import ExpertName
from wanfast.dit.chunking import Chunking, leaner
from wanfast.dit.condition import keep_first_frame
from wanfast.dit.model import predict_velocities
from wanfast.dit.text import TextMemory
from wanfast.errors import MemoryBudgetError, NumericsError
from wanfast.loaded import LoadedModel
from wanfast.lora import Lora
from wanfast.plan import EIGHT_BIT, Plan
from wanfast.run_state import RunState, map_state
from wanfast.solvers import History, Step, take_step

_log = logging.getLogger("wanfast")

_EXPLODED = 1e3
# What has no type of its own: torch's CPU allocator, CUDA itself, its libraries, Triton.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
OnStep = Callable[[Step, Tensor], None]
OnState = Callable[[RunState], None]
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What every step of a run is told besides its latents."""

    contexts: list[Tensor]  # prompt, then negative prompt, [1, T, text channels] each
    picture: Tensor | None = None  # as `encode_image` gives it
    loras: tuple[Lora, ...] = ()


def denoise(
    model: LoadedModel,
    plan: Plan,
    start: RunState,
    steps: Sequence[Step],
    conditions: Conditions,
    chunking: Chunking,
    *,
    on_step: OnStep | None,
    on_state: OnState | None,
    progress: OnProgress,
    on_prediction: OnStep | None = None,
) -> RunState:
    """Take steps of the plan, from `start` on; after the last one of the plan the latents are clean.

    Args:
        model: whose passes over the experts' blocks have been announced, as `experts_of_passes` lists them.
        plan: of the run.
        start: latents [1, C, F, H, W], fp32, before the first of the steps, and the solver's history.
        steps: of the plan, in a row.
        conditions: prompts, picture and LoRAs.
        chunking: how steps are cut; they are cut finer where memory runs out.
        on_step: called after each step with it and a copy of its latents [C, F, H, W].
        on_state: called after each step with all that the steps after it need.
        progress: called with "steps", steps done and all steps of the plan.
        on_prediction: called after each step with it and the clean latents [C, F, H, W] that its velocity implies.

    Returns:
        The state after the last of the steps, on the model's device.

    Raises:
        NumericsError: latents are not finite, in 16 bits too.
        MemoryBudgetError: a step needs more memory than there is with the fewest blocks and the finest cut.
        CheckpointError: a block cannot be read.
    """
    state = map_state(start, model.device)
    first_frame = conditions.picture if plan.task == "ti2v" else None
    latents, history = keep_first_frame(state.latents, first_frame), state.history
    text_memories: dict[ExpertName, TextMemory] = {}
    for step in steps:
        progress("steps", step.index, len(plan.steps))
        memory = text_memories.get(step.expert) or TextMemory(chunking.text_bytes)
        text_memories = {step.expert: memory}  # the other expert's makes room
        for is_exact in (False, True):
            taken, chunking = _take_in_less_memory(
                model, plan, step, latents, history, conditions, chunking, memory, is_exact=is_exact
            )
            next_latents, next_history, (velocity, *without) = taken
            if plan.precision not in EIGHT_BIT or _is_sound(next_latents):
                break
            if not is_exact:
                _log.warning("step %d: 8-bit numbers ran out of range; it is taken again in 16 bits", step.index + 1)
                model.announce(experts_of_passes(plan.steps[step.index :], chunking))
        if on_prediction is not None:
            predicted = _without_noise(latents, step, velocity, *without)
            on_prediction(step, keep_first_frame(predicted, first_frame)[0])
        latents, history = keep_first_frame(next_latents, first_frame), next_history
        _refuse_non_finite(latents, step, plan)
        state = RunState(step.index + 1, latents, history)
        if on_step is not None:
            on_step(step, latents[0].clone())
        if on_state is not None:
            on_state(state)
    progress("steps", state.next_step, len(plan.steps))
    return state


def _without_noise(latents: Tensor, step: Step, velocity: Tensor, without: Tensor | None = None) -> Tensor:
    """Take all noise away at once, by the velocity with the prompt and, where there is guidance, the one without."""
    guided = velocity if without is None else without + step.guidance * (velocity - without)
    return latents - step.sigma * guided


def experts_of_passes(steps: Sequence[Step], chunking: Chunking) -> list[ExpertName]:
    """List the expert of each pass over an expert's blocks that steps take."""
    return [step.expert for step in steps for _ in range(step.num_forwards if chunking.in_turn else 1)]


def _take_in_less_memory(
    model: LoadedModel,
    plan: Plan,
    step: Step,
    latents: Tensor,
    history: History | None,
    conditions: Conditions,
    chunking: Chunking,
    text_memory: TextMemory,
    *,
    is_exact: bool,
) -> tuple[tuple[Tensor, History | None, list[Tensor]], Chunking]:
    """Take a step: its latents, history and velocities. Out of memory, let blocks go or cut finer, and do it again."""
    while True:
        try:
            velocities = step_velocities(
                model, plan, step, latents, conditions, chunking, text_memory, is_exact=is_exact
            )
            velocity, without = velocities[0], velocities[1] if len(velocities) > 1 else None
            taken = take_step(plan.solver, latents, velocity, step, history, without=without)
            return (*taken, velocities), chunking
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        # Outside of the handler, which would keep what the failed step had allocated.
        finer = leaner(chunking)
        steps_left = plan.steps[step.index :]
        if model.make_room(experts_of_passes(steps_left, chunking)):
            remedy = "with fewer blocks on the device"
        elif finer is not None:
            chunking, remedy = finer, "with less of it at a time"
            text_memory.let_go(chunking.text_bytes)
            model.announce(experts_of_passes(steps_left, chunking))
        else:
            raise MemoryBudgetError(
                f"step {step.index + 1} of {step.num_steps}: out of memory with the fewest blocks that can be kept and"
                f" the least computed at a time ({reason}); try a smaller size or fewer frames"
            )
        _log.warning("step %d: out of memory; it is taken again %s", step.index + 1, remedy)


def _is_sound(latents: Tensor) -> bool:
    """Whether latents are finite, and of the size that latents have: about 1, never hundreds."""
    return bool(latents.abs().amax() < _EXPLODED)  # false for NaN too


def _refuse_non_finite(latents: Tensor, step: Step, plan: Plan) -> None:
    """Stop at the step that went wrong: everything after it would be computed for nothing."""
    if bool(torch.isfinite(latents).all()):
        return
    remedy = "try precision fp32" if plan.precision != "fp32" else "the expert's weights may be damaged"
    raise NumericsError(
        f"step {step.index + 1} of {step.num_steps} ({step.expert}): latents are not finite any more; {remedy}"
    )


def step_velocities(
    model: LoadedModel,
    plan: Plan,
    step: Step,
    latents: Tensor,
    conditions: Conditions,
    chunking: Chunking,
    text_memory: TextMemory,
    *,
    is_exact: bool = False,
) -> list[Tensor]:
    """Predict the velocity with the prompt, and without it where the step's guidance asks for that.

    `is_exact` takes 16-bit arithmetic whatever the precision.
    """
    contexts = conditions.contexts[: step.num_forwards]
    velocities: list[Tensor] = []
    for together in [[context] for context in contexts] if chunking.in_turn else [contexts]:
        outer, blocks = model.expert(step.expert, conditions.loras, is_exact=is_exact)
        velocities += predict_velocities(
            latents,
            step.timestep,
            together,
            outer,
            blocks,
            model.config.dit,
            condition=conditions.picture if plan.task == "i2v" else None,
            first_frame_timestep=0.0 if plan.task == "ti2v" and conditions.picture is not None else None,
            text_memory=text_memory,
            chunk_tokens=chunking.tokens,
        )
    return velocities


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)
