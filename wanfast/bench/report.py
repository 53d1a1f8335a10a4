"""What a benchmark found, as JSON values: `report.schema.json` says what stands where."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from wanfast.bench.case import PLACEMENTS, Case, plan_of
from wanfast.bench.difference import Difference, compare_videos
from wanfast.bench.engine import Run
from wanfast.bench.measure import Peak, peak_dtype
from wanfast.bench.rounds import Result
from wanfast.lora import LoraSpec
from wanfast.plan import Plan

FORMAT = 1  # raised when a reader of the old one would misread the new one

COLD = (
    "the first run of an engine's own process, which has imported its libraries and nothing else: weights are read and"
    " kernels compiled in it; what the system's file cache and Triton's cache held before is not cleared"
)
WARM = (
    "a later run of the same process, in turn with the other engines; on a GPU an engine lets the device's memory go"
    " after each run, but for what its placement keeps there"
)
STAGES = {
    "load": "opening the weights; only before the cold run",
    "text": "encoding both prompts, by the engine's own encoder and from no cache",
    "image": "encoding the picture",
    "denoise": "all denoising steps",
    "step": "the median step, without the first one of each expert",
    "switch": "what the second expert's first step takes beyond its median step",
    "decode": "waiting for frames that are decoded",
    "write": "frames to an mp4, by wanfast's encoder for every engine, as far as decoding does not hide it",
    "generate": "all of the official code's generate, which tells no stages",
    "other": "the total, less the stages",
    "total": "prompts to mp4, without load",
}
# What a tier gives up for its speed; none of wanfast's defaults gives up anything.
TIERS = {
    "exact": "fp32, or exact = 16 bits where the reference has 16 bits; every forward of every step",
    "8-bit": "fp8 or int8: the blocks multiply in 8 bits; every forward of every step",
    "cached": "none: wanfast has no tier that skips forwards or blocks for being like the last ones",
    "few-step": "a preset: fewer steps, for weights or LoRAs that were distilled to them; the reference does the same"
    " work only where the case has the preset too (--preset)",
}
_PARTS = ("text", "image", "denoise", "decode", "write", "generate")  # of a total

# What a video may differ by before it is called wrong. These are chosen, not measured, but for the first: where both
# engines compute in fp32, frames equal the reference's within one step of 8 bits.
_FP32_WORST_PIXEL = 1
_LOWEST_PSNR = {"fp32": 30.0, "exact": 30.0}
_LOWEST_PSNR_8_BIT = 20.0


def make_report(
    case: Case, results: Sequence[Result], peaks: Mapping[torch.dtype, Peak], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Put everything together.

    Args:
        case: that was run.
        results: in the order of a round.
        peaks: of the device, by dtype, for each that an engine computed in.
        about: what is known of machine, versions and command; goes into the report as it is.
    """
    references = [result for result in results if result.contender.role == "reference"]
    return {
        "format": FORMAT,
        **about,
        "definitions": {"cold": COLD, "warm": WARM, "stages": STAGES, "tiers": TIERS},
        "case": case_of(case, [result.contender.name for result in results]),
        "engines": [_engine(case, result, references, peaks) for result in results],
        "findings": [],
        "compared_with": None,
    }


def judge(report: dict[str, Any], case: Case, results: Sequence[Result]) -> list[dict[str, Any]]:
    """List what is wrong with a report's runs: videos that differ too much, runs that differ from one another."""
    findings = []
    for result, engine in zip(results, report["engines"], strict=True):
        if result.error is not None:
            findings.append(_finding("failed", engine["name"], result.error))
        for said in dict.fromkeys(said for run in result.runs for said in run.notes):
            findings.append(_finding("note", engine["name"], said))
        if len({run.digest for run in result.warm}) > 1:
            says = "its runs gave different videos from the same noise and prompts"
            findings.append(_finding("unsteady", engine["name"], says))
        for difference in engine["differences"]:
            if (wrong := _wrong(case, result, difference)) is not None:
                findings.append(_finding("different", engine["name"], wrong))
    return findings


def _finding(kind: str, engine: str, says: str, stage: str | None = None) -> dict[str, Any]:
    return {"kind": kind, "engine": engine, "stage": stage, "says": says}


def _wrong(case: Case, result: Result, difference: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a video, if it is; another schedule or density makes another one, which may be right."""
    tier = result.contender.tier
    if tier is None or tier.preset is not None or plan_of(case, tier).attention_density < 1:
        return None
    worst, psnr, to = difference["worst_pixel"], difference["psnr"], difference["to"]
    if to == "diffusers" and tier.precision == case.reference_precision == "fp32":
        if worst > _FP32_WORST_PIXEL:
            return (
                f"its worst pixel is {worst}/255 from {to}'s; both compute in fp32, where {_FP32_WORST_PIXEL} is right"
            )
        return None
    lowest = _LOWEST_PSNR.get(tier.precision, _LOWEST_PSNR_8_BIT)
    if psnr is not None and psnr < lowest:
        return f"its video has a PSNR of {psnr:.1f} dB to {to}'s, below {lowest:g}"
    return None


def case_of(case: Case, order: Sequence[str]) -> dict[str, Any]:
    """Describe a case; `order` is of the engines in a round."""
    plan = plan_of(case)
    return {
        "model": case.config.name,
        "task": plan.task,
        "weights": case.weights,
        "speed_only": case.is_speed_only,
        "prompt": plan.prompt,
        "negative_prompt": plan.negative_prompt,
        "has_picture": case.picture is not None,
        "width": plan.width,
        "height": plan.height,
        "num_frames": plan.num_frames,
        "steps": len(plan.steps),
        "forwards": plan.num_forwards,
        "solver": plan.solver,
        "shift": plan.shift,
        "guidance": {expert.name: expert.guidance for expert in plan.experts},
        "loras": [_lora_of(spec) for spec in case.loras],
        "seed": plan.seed,
        "tokens": plan.num_tokens,
        "flops_per_forward": plan.flops_per_forward,
        "device": case.device,
        "threads": case.threads,
        "runs": case.runs,
        "warmup": case.warmup,
        "order": list(order),
    }


def _lora_of(spec: LoraSpec) -> dict[str, Any]:
    return {"file": Path(spec.path).name, "strength": spec.strength, "target": spec.target}


def _engine(
    case: Case, result: Result, references: Sequence[Result], peaks: Mapping[torch.dtype, Peak]
) -> dict[str, Any]:
    contender = result.contender
    plan = plan_of(case, contender.tier)
    is_ours = contender.role == "wanfast"
    per_forward = [value for run in result.warm if (value := _seconds_per_forward(run, plan)) is not None]
    peak = peaks[peak_dtype(plan.precision)]
    rate = plan.flops / plan.num_forwards / statistics.median(per_forward) if per_forward else None
    warm = [stage_seconds(run, plan) for run in result.warm]
    return {
        "name": contender.name,
        "role": contender.role,
        "precision": plan.precision if is_ours else case.reference_precision,
        "preset": contender.tier.preset if contender.tier is not None else None,
        "placement": None if is_ours or case.device == "cpu" else PLACEMENTS[case.placement],
        "steps": len(plan.steps),
        "forwards": plan.num_forwards,
        "error": result.error,
        "cold": _cold(result, plan),
        "warm": {stage: _spread([run[stage] for run in warm]) for stage in (warm[0] if warm else ())},
        "step_seconds": [_spread(values)["median"] for values in zip(*(run.steps for run in result.warm), strict=True)],
        "seconds_per_forward": _spread(per_forward) if per_forward else None,
        "tflops": None if rate is None else rate / 1e12,
        "peak": asdict(peak),
        "share_of_peak": None if rate is None else rate / peak.flops,
        "copied_bytes": _median([run.copied_bytes for run in result.warm]),
        "stall_seconds": _median([run.stall_seconds for run in result.warm]),
        "memory": _memory(case, result),
        "power": _power(result.warm),
        "differences": [] if case.is_speed_only else _differences(result, references),
    }


def _cold(result: Result, plan: Plan) -> dict[str, float] | None:
    if result.cold is None or result.loaded is None:
        return None
    return {"load": result.loaded.seconds} | stage_seconds(result.cold, plan)


def stage_seconds(run: Run, plan: Plan) -> dict[str, float]:
    """Split a run's total into its stages, in the order they run."""
    seconds = dict(run.seconds)
    if run.steps:
        seconds["denoise"] = sum(run.steps)
        seconds["step"] = statistics.median(_later_steps(run, plan))
        if (switch := _switch(run, plan)) is not None:
            seconds["switch"] = switch
    seconds["other"] = seconds["total"] - sum(seconds.get(stage, 0.0) for stage in _PARTS)
    return {stage: seconds[stage] for stage in STAGES if stage in seconds}


def _first_steps(plan: Plan) -> list[int]:
    """The first step of each expert, in order."""
    return [next(step.index for step in plan.steps if step.expert == expert) for expert in plan.steps_per_expert]


def _later_steps(run: Run, plan: Plan) -> list[float]:
    firsts = _first_steps(plan)
    return [seconds for index, seconds in enumerate(run.steps) if index not in firsts] or list(run.steps)


def _switch(run: Run, plan: Plan) -> float | None:
    firsts = _first_steps(plan)
    if len(firsts) < 2 or len(run.steps) <= firsts[1] + 1:
        return None
    return run.steps[firsts[1]] - statistics.median(run.steps[firsts[1] + 1 :])


def _seconds_per_forward(run: Run, plan: Plan) -> float | None:
    if len(run.steps) != len(plan.steps):
        return None
    firsts = _first_steps(plan)
    steps = [step for step in plan.steps if step.index not in firsts] or list(plan.steps)
    return statistics.median(run.steps[step.index] / step.num_forwards for step in steps)


def _memory(case: Case, result: Result) -> dict[str, int | None]:
    """Peaks over all runs; with shared random weights host memory would be too little to be true."""
    kinds = ("ram", "vram_allocated", "vram_reserved", "vram_device")
    found = {kind: [getattr(run.footprint, kind) for run in result.runs] for kind in kinds}
    peaks = {
        kind: max((value for value in values if value is not None), default=None) for kind, values in found.items()
    }
    before = None if result.loaded is None else result.loaded.ram_before
    return {"ram_before": before} | peaks | ({"ram": None} if case.is_speed_only else {})


def _power(runs: Sequence[Run]) -> dict[str, Any] | None:
    read = [run.footprint for run in runs if run.footprint.watts_mean is not None]
    if not read:
        return None
    return {
        "mean_watts": statistics.median(footprint.watts_mean or 0.0 for footprint in read),
        "max_watts": max(footprint.watts_max or 0.0 for footprint in read),
        "source": read[0].power_source,
    }


def _differences(result: Result, references: Sequence[Result]) -> list[dict[str, Any]]:
    ours = next((run.frames for run in result.warm if run.frames is not None), None)
    found = []
    for reference in references:
        theirs = next((run.frames for run in reference.warm if run.frames is not None), None)
        if reference is result or ours is None or theirs is None:
            continue
        difference: Difference = compare_videos(ours, theirs)
        found.append({"to": reference.contender.name, "identical": difference.is_identical} | asdict(difference))
    return found


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": list(values)}


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
