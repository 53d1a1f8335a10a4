"""The plan in words: what runs, where every byte lives stage by stage, how long it takes, and why."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from wanfast.budget import Budget, gigabytes
from wanfast.config import DEFAULT_NEGATIVE_PROMPT
from wanfast.dit.chunking import CHUNKINGS
from wanfast.plan import Part, Plan
from wanfast.predict import Prediction
from wanfast.solvers import Step


def format_plan(plan: Plan, budget: Budget | None = None, prediction: Prediction | None = None) -> str:
    """Describe the plan on one page of text, with its memory and its seconds where they are known."""
    channels, *latent = plan.latent_shape
    is_default = plan.negative_prompt == DEFAULT_NEGATIVE_PROMPT
    task = {"t2v": "text to video", "i2v": "image to video"}[plan.mode]
    rows = [
        ("model", f"{plan.model}, {task}"),
        ("runs on", f"{plan.device}, precision {plan.precision}"),
        ("prompt", plan.prompt or "(none)"),
        ("negative prompt", "Wan's own" if is_default else plan.negative_prompt),
        *_image_rows(plan),
        ("video", f"{plan.width}x{plan.height}, {_frames(plan)} at {plan.fps} per second ({_seconds(plan)})"),
        ("latents", f"{channels} channels, {_times(latent)}"),
        ("tokens", f"{_times(plan.token_grid)} = {plan.num_tokens:,}"),
        ("seed", str(plan.seed)),
        (
            "solver",
            f"{plan.solver}, shift {plan.shift:g}, {len(plan.steps)} steps, {plan.num_forwards} DiT evaluations",
        ),
        *(("", line) for line in _step_lines(plan.steps)),
        ("weights", "as large as in the precision they compute in; computed"),
        *(("", line) for line in _part_lines(plan.parts)),
        ("work", _work(plan)),
    ]
    if budget is not None:
        rows += _labelled("memory", _memory_lines(budget))
    if prediction is not None:
        rows += _labelled("seconds", _second_lines(plan, prediction))
    return "\n".join(f"{label:<17}{text}".rstrip() for label, text in rows)


def _image_rows(plan: Plan) -> list[tuple[str, str]]:
    if plan.image_size is None:
        return []
    return [("image", f"{_times(plan.image_size)}, fitted to the area of {_times(plan.asked_size)}")]


def _step_lines(steps: tuple[Step, ...]) -> list[str]:
    lines = []
    for expert, group in groupby(steps, key=lambda step: step.expert):
        run = list(group)
        first, last = run[0], run[-1]
        lines.append(
            f"steps {first.index + 1}-{last.index + 1}  {expert}, guidance {first.guidance:g}, "
            f"sigma {first.sigma:.3f} -> {last.sigma_next:.3f}, timesteps {first.timestep:g} -> {last.timestep:g}"
        )
    return lines


def _part_lines(parts: tuple[Part, ...]) -> list[str]:
    return [f"{part.name:<14}{part.parameters / 1e9:8.3f} B parameters {part.bytes / 1e9:8.2f} GB" for part in parts]


def _work(plan: Plan) -> str:
    each, total = (
        f"{flops / 1e12:,.4f}" if flops < 1e13 else f"{flops / 1e12:,.0f}"
        for flops in (plan.flops_per_forward, plan.flops_per_forward * plan.num_forwards)
    )
    return f"{each} TFLOP per DiT evaluation, {total} in all; computed"


def _frames(plan: Plan) -> str:
    return "1 frame" if plan.num_frames == 1 else f"{plan.num_frames} frames"


def _seconds(plan: Plan) -> str:
    return f"{plan.num_frames / plan.fps:.1f} s"


def _times(sides: Any) -> str:
    return " x ".join(map(str, sides))


def _labelled(label: str, lines: Iterator[str]) -> list[tuple[str, str]]:
    return [(label if index == 0 else "", line) for index, line in enumerate(lines)]


def _memory_lines(budget: Budget) -> Iterator[str]:
    limit = "" if budget.limit is None else f" of {gigabytes(budget.limit)}"
    yield f"{gigabytes(budget.peak.total)}{limit} at the peak, which is {budget.peak.name}; computed"
    for stage in budget.stages:
        yield f"{stage.name}: {gigabytes(stage.total)}"
        for what, size in sorted(stage.items.items(), key=lambda item: -item[1]):
            yield f"  {what:<38}{gigabytes(size):>10}"
    yield _why(budget)
    if budget.chunking != CHUNKINGS[0]:
        turns = ", with and without the prompt in turn" if budget.chunking.in_turn else ""
        yield f"to fit, {budget.chunking.tokens} tokens are computed at a time{turns}"
    for name, tiling in budget.tilings.items():
        if tiling.num_tiles > 1:
            yield f"{name}: in {tiling.num_tiles} strips without a seam; whole pictures need {gigabytes(tiling.whole)}"
    host = sum(budget.host.values())
    yield f"host: {gigabytes(host)}" + ("" if budget.host_limit is None else f" of {gigabytes(budget.host_limit)}")
    for what, size in budget.host.items():
        yield f"  {what:<38}{gigabytes(size):>10}"
    if budget.host_missing:
        yield f"  {gigabytes(budget.host_missing)} of blocks find no room and are read from their files in each step"


def _why(budget: Budget) -> str:
    each = f"{gigabytes(budget.slot_bytes)} ({budget.stored})"
    if budget.num_slots >= budget.num_blocks * budget.num_experts:
        return f"every block of {each} stays: each is copied once"
    if budget.is_resident:
        return f"one expert stays, {budget.num_blocks} blocks of {each}; the other takes its slots block by block"
    return f"an expert does not fit beside the rest: its blocks of {each} stream through {budget.num_slots} slots"


def _second_lines(plan: Plan, prediction: Prediction) -> Iterator[str]:
    how = "computed, at the peak rates of the card: a bound from below"
    yield f"{prediction.total:,.1f} in all; {how if prediction.source == 'computed' else 'from measured rates'}"
    yield ", ".join(f"{stage} {seconds:,.1f}" for stage, seconds in prediction.seconds.items())
    yield f"{prediction.seconds_per_step:,.2f} per step, {len(plan.steps)} steps"
    if not plan.device.startswith("cuda"):  # blocks are used where they are
        return
    switch = f", {prediction.switch_stall:.2f} at the switch of experts" if len(plan.steps_per_expert) > 1 else ""
    waits = f"waits for copies {prediction.stall:.2f}{switch}"
    yield f"{gigabytes(prediction.copied)} of blocks copied to the card; {waits}"
