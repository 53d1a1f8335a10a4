"""The steps of a run: latents, velocity, latents of less noise, with whatever memory there is.

    for each step:  velocities = DiT with the prompt, DiT without   latents, history = take_step(latents, velocities)

When memory runs out in a step, blocks are let go, then the step is cut finer, and it is taken again.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from wanfast.config import ExpertName
from wanfast.dit.chunking import Chunking, leaner
from wanfast.dit.condition import keep_first_frame
from wanfast.dit.model import patch_grid, predict_velocities
from wanfast.dit.text import TextMemory
from wanfast.dit.token_order import token_order
from wanfast.errors import MemoryBudgetError, NumericsError
from wanfast.loaded import LoadedModel
from wanfast.lora import Lora
from wanfast.out_of_memory import OutOfMemory, attempt
from wanfast.plan import EIGHT_BIT, Plan
from wanfast.residency import free_memory, gigabytes
from wanfast.rope import rope_rotations
from wanfast.run_state import RunState, map_state
from wanfast.solvers import History, Step, take_step

_log = logging.getLogger("wanfast")

_EXPLODED = 1e3
OnStep = Callable[[Step, Tensor], None]
OnState = Callable[[RunState], None]
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What every step of a run is told besides its latents."""

    contexts: list[Tensor]  # prompt, then negative prompt, [1, T, text channels] each
    picture: Tensor | None = None  # as `encode_image` gives it
    loras: tuple[Lora, ...] = ()


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps of one run in a row."""

    steps: tuple[Step, ...]
    chunking: Chunking  # how they are cut


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What all steps of a run share."""

    model: LoadedModel
    plan: Plan
    conditions: Conditions
    order: Tensor | None  # of `token_order`, where there are steps with sparse attention; on the device
    rotations: Tensor  # of `rope_rotations`, in that order, on the device

    @property
    def first_frame(self) -> Tensor | None:
        """What the first latent frame is held to."""
        return self.conditions.picture if self.plan.task == "ti2v" else None


@dataclass(frozen=True, slots=True)
class _Taken:
    """A step that was taken."""

    latents: Tensor  # after it
    history: History | None
    velocities: list[Tensor]  # with the prompt, and without it where there is guidance
    largest: float  # magnitude in the latents; NaN where there is one


def denoise(
    model: LoadedModel,
    plan: Plan,
    start: RunState,
    stretches: Sequence[Stretch],
    conditions: Conditions,
    *,
    on_step: OnStep | None,
    on_state: OnState | None,
    progress: OnProgress,
    on_prediction: OnStep | None = None,
) -> tuple[RunState, tuple[Stretch, ...]]:
    """Take a stretch of a plan's steps, from `start` on; after the plan's last one the latents are clean.

    Args:
        model: whose passes over the experts' blocks have been announced, as `experts_of_passes` lists them.
        plan: of the run.
        start: latents [1, C, F, H, W], fp32, before the first of the steps, and the solver's history.
        stretches: the one to take, then those that are taken after it, of this run or of others: where memory runs out
            they are announced anew, cut as much finer as this one.
        conditions: prompts, picture and LoRAs.
        on_step: called after each step with it and a copy of its latents [C, F, H, W].
        on_state: called after each step with all that the steps after it need.
        progress: called with "steps", steps done and all steps of the plan.
        on_prediction: called after each step with it and the clean latents [C, F, H, W] that its velocity implies.

    Returns:
        The state after the last of the steps, on the model's device, and the stretches that follow.

    Raises:
        NumericsError: latents are not finite, in 16 bits too.
        MemoryBudgetError: a step needs more memory than there is with the fewest blocks and the finest cut.
        CheckpointError: a block cannot be read, or a file of the model was written to meanwhile.
    """
    state, dit = map_state(start, model.device), model.config.dit
    rotations, order = rope_rotations(patch_grid(state.latents, dit), dit.head_dim), None
    if plan.attention_density < 1:  # dense steps have the same order: to them it makes no difference
        order = token_order(patch_grid(state.latents, dit))
        rotations, order = rotations[order], order.to(model.device)
    run = _Run(model=model, plan=plan, conditions=conditions, order=order, rotations=rotations.to(model.device))
    state = replace(state, latents=keep_first_frame(state.latents, run.first_frame))
    text_memories: dict[ExpertName, TextMemory] = {}
    left = tuple(stretches)
    for step in stretches[0].steps:
        progress("steps", step.index, len(plan.steps))
        memory = text_memories.get(step.expert) or TextMemory(left[0].chunking.text_bytes)
        text_memories = {step.expert: memory}  # the other expert's makes room
        for is_exact in (False, True):
            taken, left = _take_in_less_memory(run, left, state, memory, is_exact=is_exact)
            if plan.precision not in EIGHT_BIT or taken.largest < _EXPLODED:  # about 1 is usual; false for NaN too
                break
            if not is_exact:
                _log.warning("step %d: 8-bit numbers ran out of range; it is taken again in 16 bits", step.index + 1)
                model.announce(experts_of_passes(left))
        if on_prediction is not None:
            predicted = _without_noise(state.latents, step, *taken.velocities)
            on_prediction(step, keep_first_frame(predicted, run.first_frame)[0])
        model.refuse_written()
        _refuse_non_finite(taken.largest, step, plan)
        state = RunState(step.index + 1, taken.latents, taken.history)
        left = (replace(left[0], steps=left[0].steps[1:]), *left[1:])
        if on_step is not None:
            on_step(step, state.latents[0].clone())
        if on_state is not None:
            on_state(state)
    progress("steps", state.next_step, len(plan.steps))
    return state, left[1:]


def _without_noise(latents: Tensor, step: Step, velocity: Tensor, without: Tensor | None = None) -> Tensor:
    """Take all noise away at once, by the velocity with the prompt and, where there is guidance, the one without."""
    guided = velocity if without is None else without + step.guidance * (velocity - without)
    return latents - step.sigma * guided


def experts_of_passes(stretches: Iterable[Stretch]) -> list[ExpertName]:
    """List the expert of each pass over an expert's blocks that the steps take."""
    return [
        step.expert
        for stretch in stretches
        for step in stretch.steps
        for _ in range(step.num_forwards if stretch.chunking.in_turn else 1)
    ]


def _take_in_less_memory(
    run: _Run, left: tuple[Stretch, ...], before: RunState, memory: TextMemory, *, is_exact: bool
) -> tuple[_Taken, tuple[Stretch, ...]]:
    """Take the first step that is left. Out of memory, let blocks go or cut finer all that is left, and do it again."""
    model, step = run.model, left[0].steps[0]
    while True:
        chunking = left[0].chunking
        taken = attempt(partial(_take, run, step, before, chunking, memory, is_exact=is_exact))
        if not isinstance(taken, OutOfMemory):
            return taken, left
        finer = leaner(chunking)
        if model.make_room():
            remedy = "with fewer weights on the device"
        elif finer is not None:
            left = tuple(replace(part, chunking=leaner(part.chunking) or part.chunking) for part in left)
            memory.let_go(finer.text_bytes)
            remedy = "with less of it at a time"
        else:
            raise MemoryBudgetError(
                f"step {step.index + 1} of {step.num_steps}: out of memory with the fewest blocks that can be kept and"
                f" the least computed at a time ({taken.reason}); two blocks take {gigabytes(2 * model.block_bytes)},"
                f" {gigabytes(free_memory(model.device))} are free; try a smaller size or fewer frames, or end what"
                " else takes memory"
            )
        _log.warning("step %d: out of memory (%s); it is taken again %s", step.index + 1, taken.reason, remedy)
        model.announce(experts_of_passes(left))


def _take(run: _Run, step: Step, before: RunState, chunking: Chunking, memory: TextMemory, *, is_exact: bool) -> _Taken:
    velocities = _velocities(run, step, before.latents, chunking, memory, is_exact=is_exact)
    velocity, without = velocities[0], velocities[1] if len(velocities) > 1 else None
    latents, history = take_step(run.plan.solver, before.latents, velocity, step, before.history, without=without)
    latents = keep_first_frame(latents, run.first_frame)
    # The one number of a step that the host waits for; NaN and infinity are what it says then.
    return _Taken(latents, history, velocities, float(latents.abs().amax()))


def _velocities(
    run: _Run, step: Step, latents: Tensor, chunking: Chunking, memory: TextMemory, *, is_exact: bool
) -> list[Tensor]:
    """Predict the velocity with the prompt, and without it where the step's guidance asks for that."""
    model, plan, conditions = run.model, run.plan, run.conditions
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
            text_memory=memory,
            chunk_tokens=chunking.tokens,
            rotations=run.rotations,
            order=run.order,
            attention_density=plan.density_of(step),
        )
    return velocities


def _refuse_non_finite(largest: float, step: Step, plan: Plan) -> None:
    """Stop at the step that went wrong: everything after it would be computed for nothing."""
    if math.isfinite(largest):
        return
    remedy = "try precision fp32" if plan.precision != "fp32" else "the expert's weights may be damaged"
    raise NumericsError(
        f"step {step.index + 1} of {step.num_steps} ({step.expert}): latents are not finite any more; {remedy}"
    )
