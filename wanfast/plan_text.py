"""The plan in words: what runs, where every byte lives stage by stage, how long it takes, and why."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from wanfast.budget import Budget
from wanfast.config import DEFAULT_NEGATIVE_PROMPT
from wanfast.dit.chunking import CHUNKINGS
from wanfast.machines import DISK
from wanfast.plan import Part, Plan, kept_keys
from wanfast.predict import FileReads, Prediction
from wanfast.residency import gigabytes
from wanfast.solvers import Step


def format_plan(
    plan: Plan,
    budget: Budget | None = None,
    prediction: Prediction | None = None,
    *,
    reason: str | None = None,
    reads: FileReads | None = None,
    instead: tuple[Budget, Prediction | None] | None = None,
) -> str:
    """Describe the plan on one page of text.

    Args:
        plan: to describe.
        budget: its memory, where that is known.
        prediction: its seconds, likewise.
        reason: for its precision, where it does not go without saying.
        reads: what it reads from files, where that is known.
        instead: the same in int8, to be set beside it.
    """
    channels, *latent = plan.latent_shape
    is_default = plan.negative_prompt == DEFAULT_NEGATIVE_PROMPT
    task = {"t2v": "text to video", "i2v": "image to video"}[plan.mode]
    rows = [
        ("model", f"{plan.model}, {task}"),
        ("runs on", f"{plan.device}, precision {plan.precision}"),
        *([] if reason is None else [("", f"{plan.precision}: {reason}")]),
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
        *_density_rows(plan),
        ("weights", "as large as in the precision they compute in; computed"),
        *(("", line) for line in _part_lines(plan.parts)),
        ("work", _work(plan)),
    ]
    if budget is not None:
        rows += _labelled("memory", _memory_lines(budget, on_gpu=plan.device.startswith("cuda")))
    if budget is not None and reads is not None:
        rows += _labelled("files", _file_lines(budget, reads, prediction))
    if prediction is not None:
        rows += _labelled("seconds", _second_lines(plan, prediction))
    if instead is not None:
        rows.append(("instead", _instead(*instead)))
    return "\n".join(f"{label:<17}{text}".rstrip() for label, text in rows)


def _instead(budget: Budget, prediction: Prediction | None) -> str:
    """What int8 would take."""
    told = [f"{gigabytes(budget.peak.total)} at the peak"]
    source = "computed"
    if prediction is not None:
        told = [f"{prediction.total:,.1f} s", *told, f"{gigabytes(prediction.copied)} copied"]
        source = prediction.source
    return f"--precision int8: {', '.join(told)}; {source}; its cost: `wanfast verify`"


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


def _density_rows(plan: Plan) -> list[tuple[str, str]]:
    if plan.attention_density == 1:
        return []
    first, last = plan.num_dense_steps + 1, len(plan.steps)
    which = f"step {last}" if first == last else f"steps {first}-{last}"
    keys = kept_keys(plan.num_tokens, plan.attention_density)
    lines = [
        f"density {plan.attention_density:g} in {which}, in all blocks but the first; dense elsewhere",
        f"there a token attends to at most {keys:,} of {plan.num_tokens:,} tokens",
    ]
    if plan.device.startswith("cuda") and plan.precision == "fp32":
        lines.append("in fp32 no kernel does it: block by block through torch")
    return _labelled("attention", iter(lines))


def _part_lines(parts: tuple[Part, ...]) -> list[str]:
    return [f"{part.name:<14}{_short(part.parameters):>10} parameters {gigabytes(part.bytes):>12}" for part in parts]


def _short(number: int) -> str:
    """Write a large count in thousands, millions or billions."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.3f} {unit}"
    return str(number)


def _work(plan: Plan) -> str:
    each, total = _operations(plan.flops_per_forward), _operations(plan.flops)
    each = f"{each} per DiT evaluation"
    if plan.attention_density < 1:
        each += f", {_operations(plan.sparse_flops_per_forward)} with sparse attention"
    return f"{each}, {total} in all; computed"


def _operations(flops: int) -> str:
    """In TFLOP but for tiny models, whose work would be nothing in these."""
    for limit, unit in ((10**12, "T"), (10**9, "G")):
        if flops >= limit:
            return f"{flops / limit:,.{0 if flops >= 10 * limit else 2}f} {unit}FLOP"
    return f"{flops / 1e6:,.2f} MFLOP"


def _frames(plan: Plan) -> str:
    return "1 frame" if plan.num_frames == 1 else f"{plan.num_frames} frames"


def _seconds(plan: Plan) -> str:
    return f"{plan.num_frames / plan.fps:.1f} s"


def _times(sides: Any) -> str:
    return " x ".join(map(str, sides))


def _labelled(label: str, lines: Iterator[str]) -> list[tuple[str, str]]:
    return [(label if index == 0 else "", line) for index, line in enumerate(lines)]


def _memory_lines(budget: Budget, *, on_gpu: bool) -> Iterator[str]:
    limit = "" if budget.limit is None else f" of {gigabytes(budget.limit)}"
    yield f"{gigabytes(budget.peak.total)}{limit} at the peak, which is {budget.peak.name}; computed"
    if not on_gpu:
        yield "all of it is the host's: a CPU has no other"
    for stage in budget.stages:
        yield f"{stage.name}: {gigabytes(stage.total)}"
        yield from _item_lines(stage.items)
    yield _why(budget, on_gpu=on_gpu)
    if budget.chunking != CHUNKINGS[0]:
        turns = ", with and without the prompt in turn" if budget.chunking.in_turn else ""
        yield f"to fit, {budget.chunking.tokens} tokens are computed at a time{turns}"
    for name, tiling in budget.tilings.items():
        if tiling.num_tiles > 1:
            yield f"{name}: in {tiling.num_tiles} strips without a seam; whole pictures need {gigabytes(tiling.whole)}"
    if on_gpu:
        host = sum(budget.host.values())
        yield f"host: {gigabytes(host)}" + ("" if budget.host_limit is None else f" of {gigabytes(budget.host_limit)}")
        yield from _item_lines(budget.host)
    if budget.host_missing:
        yield f"  blocks of {gigabytes(budget.host_missing)} that are needed again find no room"


def _item_lines(items: Mapping[str, int]) -> Iterator[str]:
    for what, size in sorted(items.items(), key=lambda item: -item[1]):
        yield f"  {what:<38}{gigabytes(size):>10}"


def _why(budget: Budget, *, on_gpu: bool) -> str:
    each = f"{gigabytes(budget.slot_bytes)} ({budget.stored})"
    if budget.is_in_place:
        verb = "read" if budget.is_as_stored else "made"
        stay = f"{verb} once and stay" if not budget.host_missing else f"{verb} again where there is no room for them"
        return f"on a CPU blocks of {each} are {stay}, of one expert at a time"
    if not on_gpu:
        return f"--vram is less than an expert: its blocks of {each} pass through {budget.num_slots} slots"
    if budget.num_slots >= budget.num_blocks * budget.num_experts:
        return f"every block of {each} stays: each is copied once"
    if budget.is_resident:
        return f"one expert stays, {budget.num_blocks} blocks of {each}; the other takes its slots block by block"
    return f"an expert does not fit beside the rest: its blocks of {each} stream through {budget.num_slots} slots"


def _file_lines(budget: Budget, reads: FileReads, prediction: Prediction | None) -> Iterator[str]:
    verb = "read" if budget.is_as_stored else "read and made anew"
    again = "" if reads.loads <= reads.blocks else f", {reads.loads - reads.blocks:,} of them again"
    yield f"{reads.loads:,} blocks are {verb}, {gigabytes(reads.num_bytes)}{again}; computed"
    if reads.loads_per_step:
        each = f"{reads.loads_per_step:,.1f} blocks, {gigabytes(round(reads.bytes_per_step))}"
        yield f"{each} in a step that is not an expert's first: host memory has no room for them"
    if budget.is_as_stored and not budget.is_resident and reads.loads > reads.blocks:
        yield "the system may still have some of them in memory"
    if prediction is not None and prediction.reading is not None:
        how = f"at {gigabytes(round(DISK))} per second, which is assumed"
        yield f"{prediction.reading:,.1f} seconds, {how}; what is waited for is in the seconds below"
    if not budget.is_as_stored:
        if prediction is not None:
            yield "rounding what they hold to the dtype that is computed in is not in it"
        yield "`wanfast convert` writes files whose blocks are used as they are"


def _second_lines(plan: Plan, prediction: Prediction) -> Iterator[str]:
    how = "computed, at the peak rates of the card: a bound from below"
    yield f"{prediction.total:,.1f} in all; {how if prediction.source == 'computed' else 'from measured rates'}"
    yield ", ".join(f"{stage} {seconds:,.1f}" for stage, seconds in prediction.seconds.items())
    yield f"{prediction.seconds_per_step:,.2f} per step, {len(plan.steps)} steps"
    if prediction.dense is not None:
        yield f"steps would take {prediction.dense:,.1f} with dense attention"
    if not plan.device.startswith("cuda"):  # blocks are used where they are
        return
    switch = f", {prediction.switch_stall:.2f} at the switch of experts" if len(plan.steps_per_expert) > 1 else ""
    waits = f"waits for copies {prediction.stall:.2f}{switch}"
    yield f"{gigabytes(prediction.copied)} of blocks copied to the card; {waits}"


def budget_to_dict(budget: Budget) -> dict[str, Any]:
    """Return the budget as JSON-able values, in bytes."""
    return {
        "source": "computed",
        "peak": budget.peak.total,
        "peak_stage": budget.peak.name,
        "limit": budget.limit,
        "stages": {stage.name: dict(stage.items) | {"total": stage.total} for stage in budget.stages},
        "slots": budget.num_slots,
        "slot_bytes": budget.slot_bytes,
        "stored": budget.stored,
        "expert_is_resident": budget.is_resident,
        "tokens_at_a_time": budget.chunking.tokens,
        "guidance_in_turn": budget.chunking.in_turn,
        "tiles": {stage: tiling.num_tiles for stage, tiling in budget.tilings.items()},
        "blocks_are_used_in_place": budget.is_in_place,
        "host": dict(budget.host),
        "host_peak": sum(budget.host.values()),
        "host_limit": budget.host_limit,
        "host_missing": budget.host_missing,
    }
