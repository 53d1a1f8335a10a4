"""From a command line to a case: the model, the picture, the request, the tiers; refused by name what cannot be run."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image

from wanfast.bench.case import PLACEMENTS, Case, Placement, ReferencePrecision, Weights, parse_tiers, plan_of
from wanfast.bench.measure import Peak, peak_dtype
from wanfast.bench.random_model import tiny_of
from wanfast.checkpoint.lookup import Sources
from wanfast.command_parts import request_for, sources_of
from wanfast.config import MODELS, ModelConfig
from wanfast.errors import MemoryBudgetError, RequestError
from wanfast.host_memory import HOST_RESERVE_BYTES
from wanfast.images import load_image
from wanfast.lora import open_loras, parse_lora
from wanfast.pipeline import loras_for, open_loaded
from wanfast.plan import make_plan
from wanfast.request import Request, parse_size
from wanfast.residency import gigabytes, parse_bytes
from wanfast.residency.memory import free_host_memory
from wanfast.text.weights import expected_tensors as text_tensors
from wanfast.weight_sizes import weight_sizes

PROMPT = "a red circle moves left"


def settle_case(arguments: argparse.Namespace) -> Case:
    """Settle what a parsed `bench` line asks for; headers are read, no weights.

    Raises:
        RequestError: an argument breaks a rule.
        CheckpointError: the model's files cannot be used.
    """
    for name, least in (("runs", 1), ("warmup", 0)):
        if getattr(arguments, name) < least:
            raise RequestError(f"{name}: must be at least {least}, got {getattr(arguments, name)}")
    weights = _weights(arguments)
    sources = sources_of(arguments) if weights == "checkpoint" else Sources()
    opened = open_loaded(sources, precision="auto", vram=None, device=arguments.device)
    config = opened.config
    if weights in ("random", "tiny random"):
        row = _row(arguments.model)
        config = row if weights == "random" else tiny_of(row, config)
    named = arguments.lora if "random" in weights else loras_for(opened.model, arguments.lora, arguments.preset)
    loras = tuple(parse_lora(text) for text in named)
    open_loras(loras, config)  # what fits no layer is refused here
    request, picture = _settle_request(arguments, config)
    automatic: ReferencePrecision = "bf16" if opened.device.type == "cuda" else "fp32"
    asked = arguments.reference_precision
    case = Case(
        weights=weights,
        sources=sources,
        config=config,
        request=request,
        picture=picture,
        loras=loras,
        tiers=parse_tiers(arguments.tiers, opened.device),
        reference_precision=automatic if asked == "auto" else cast(ReferencePrecision, asked),
        placement=cast(Placement, arguments.reference_offload),
        device=str(opened.device),
        vram=None if arguments.vram is None else parse_bytes("vram", arguments.vram),
        ram=None if arguments.ram is None else parse_bytes("ram", arguments.ram),
        runs=arguments.runs,
        warmup=arguments.warmup,
        threads=torch.get_num_threads(),
    )
    for tier in (None, *case.tiers):
        plan_of(case, tier)
    return case


def _weights(arguments: argparse.Namespace) -> Weights:
    is_named = sources_of(arguments) != Sources()
    if arguments.random and arguments.tiny:
        raise RequestError("random: must be left out with --tiny, whose weights are random in any case")
    if arguments.random or (arguments.tiny and is_named):
        if sources_of(arguments).parts:
            raise RequestError("model: must be an alias with --random or --tiny, got files; name one with --model")
        _row(arguments.model)
        return "random" if arguments.random else "tiny random"
    if arguments.tiny:
        return "wan-tiny"
    if not is_named:
        raise RequestError("model: must be given, got none; --tiny runs on any machine, --random needs no checkpoint")
    return "checkpoint"


def _row(name: str | None) -> ModelConfig:
    row = next((row for row in MODELS.values() if name is not None and row.name.lower() == name.lower()), None)
    if row is None:
        raise RequestError(f"model: must be one of {', '.join(MODELS)} with --random or --tiny, got {name}")
    return row


def _settle_request(arguments: argparse.Namespace, config: ModelConfig) -> tuple[Request, Image.Image | None]:
    """Settle the request, and bring the picture to the video's size, so that no engine has to, each in its way."""
    image = load_image(arguments.image) if arguments.image else None
    if image is None and config.task == "i2v":
        size = parse_size(arguments.size, config) if arguments.size else (config.width, config.height)
        image = drawn_picture(*size)
    arguments.prompt = PROMPT if arguments.prompt is None else arguments.prompt
    request = request_for(arguments, config, image)
    plan = make_plan(config, request, precision="exact")
    guidance = [expert.guidance for expert in plan.experts]
    if not (all(value > 1 for value in guidance) or all(value == 1 for value in guidance)):
        told = ", ".join(f"{value:g}" for value in guidance)
        raise RequestError(f"guidance: must be above 1 throughout or 1 throughout, as diffusers has it, got {told}")
    request = replace(request, seed=plan.seed)
    if image is None:
        return request, None
    size = plan.width, plan.height
    request = replace(request, width=size[0], height=size[1], image_size=size)
    again = make_plan(config, request, precision="exact")
    if (again.width, again.height) != size:
        raise RequestError(f"size: must stay as it is for a picture of its own size, got {size[0]}x{size[1]}")
    return request, image.resize(size, Image.Resampling.BICUBIC)


def drawn_picture(width: int, height: int) -> Image.Image:
    """Draw a picture with soft slopes and some grain, the same each time."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(columns / width * 5 + shift) + np.cos(rows / height * 4 - shift) for shift in (0.0, 1.0, 2.0)]
    grain = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    return Image.fromarray((128 + 50 * np.stack(waves, 2) + grain).clip(0, 255).astype(np.uint8))


def check_memory(case: Case) -> None:
    """Refuse a case whose weights the host cannot hold, before the system would have to.

    Raises:
        MemoryBudgetError: the message has the numbers, and what would fit.
    """
    if case.weights in ("wan-tiny", "tiny random"):
        return
    plan, ram = plan_of(case), free_host_memory()
    room = (ram if case.ram is None else min(ram, case.ram)) - HOST_RESERVE_BYTES
    needs = {}
    if _copies_reference(case):
        needs["diffusers' weights"] = sum(part.bytes for part in plan.parts)
    if case.weights == "random":
        for name, precision in [("diffusers", plan.precision), *((tier.name, tier.precision) for tier in case.tiers)]:
            sizes = weight_sizes(case.config, precision)
            drawn = sizes.slot + sizes.outer + sizes.text_slot + sizes.vae_encoder + sizes.vae_decoder
            needs[f"random weights of {name}"] = drawn
    if (total := sum(needs.values())) > room:
        listed = ", ".join(f"{what} {gigabytes(size)}" for what, size in needs.items())
        raise MemoryBudgetError(
            f"ram: the case needs {gigabytes(total)} of host memory for weights ({listed}), got {gigabytes(room)};"
            " fewer --tiers or a smaller model would fit, or --reference-offload resident on a card that holds it all"
        )


def _copies_reference(case: Case) -> bool:
    """Whether the reference's weights take host memory of their own; those drawn at random are shared else."""
    is_moved = torch.device(case.device).type == "cuda" and case.placement != "resident"
    return case.weights == "checkpoint" or is_moved


def least_seconds(case: Case, peaks: Mapping[torch.dtype, Peak]) -> float:
    """Compute what all runs take at the least: their largest products, at the best rate of the device.

    Counted are the transformer's operations of every engine, and what diffusers' text encoder makes of prompts that it
    pads to their full length. Not counted: the VAE, wanfast's shorter prompts, loading and drawing weights.

    Args:
        case: settled.
        peaks: of the device, by the dtype that `peak_dtype` gives.
    """
    reference = plan_of(case)
    layers = text_tensors(case.config.text)
    text = sum(math.prod(shape) for name, shape in layers.items() if name.startswith("blocks."))
    prompts = 2 if reference.num_forwards > len(reference.steps) else 1
    seconds = 2 * text * case.config.dit.text_len * prompts / peaks[peak_dtype(reference.precision)].flops
    for plan in (reference, *(plan_of(case, tier) for tier in case.tiers)):
        seconds += plan.flops / peaks[peak_dtype(plan.precision)].flops
    return (1 + case.warmup + case.runs) * seconds


def duration(seconds: float) -> str:
    """Say a time as one reads it: 40 s, 12 min, 3.5 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def notes(case: Case) -> list[str]:
    """Say what is about to run, for the terminal."""
    plan = plan_of(case)
    lines = [
        f"{plan.model}, {case.weights} weights: {plan.width}x{plan.height}, {plan.num_frames} frames,"
        f" {len(plan.steps)} steps on {case.device}; {', '.join(tier.name for tier in case.tiers)} beside diffusers in"
        f" {case.reference_precision}"
    ]
    if case.loras:
        lines.append(f"LoRAs of every engine: {', '.join(Path(spec.path).name for spec in case.loras)}")
    if case.is_speed_only:
        lines.append("random weights: speed alone is told, no difference of the videos")
    if case.device != "cpu":
        lines.append(f"weights of the reference: {PLACEMENTS[case.placement]}")
    return lines
