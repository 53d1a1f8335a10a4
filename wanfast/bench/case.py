"""What a benchmark runs: one request, the weights, the tiers; settled before anything is loaded."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from PIL import Image

from wanfast.bench.random_model import random_model
from wanfast.checkpoint.lookup import Sources
from wanfast.config import ModelConfig
from wanfast.errors import RequestError
from wanfast.loaded import LoadedModel
from wanfast.lora import LoraSpec
from wanfast.pipeline import open_loaded
from wanfast.plan import Plan, Precision, make_plan
from wanfast.precision import usual_precision
from wanfast.presets import PRESETS, apply_preset
from wanfast.request import Request
from wanfast.weight_sizes import dtype_of

Weights = Literal["checkpoint", "wan-tiny", "tiny random", "random"]
ReferencePrecision = Literal["fp32", "bf16"]
Placement = Literal["resident", "model", "group"]

_SAMPLING = ("num_inference_steps", "solver", "shift", "guidance", "guidance_high", "guidance_low")
PLACEMENTS: Mapping[Placement, str] = {
    "resident": "all weights on the device throughout",
    "model": "diffusers' enable_model_cpu_offload: one part of the model on the device at a time",
    "group": "diffusers' group offloading of the transformers, one block ahead on a stream; the rest as by model",
}


@dataclass(frozen=True, slots=True)
class Tier:
    """One way for wanfast to run the case."""

    name: str
    precision: Precision
    preset: str | None = None  # whose steps, solver, shift and guidance stand in place of the case's own
    attention_density: float | None = None  # the case itself has dense attention, as the reference has

    def apply(self, request: Request) -> Request:
        """Give the request as this tier runs it."""
        request = replace(request, attention_density=self.attention_density)
        if self.preset is None:
            return request
        opened: dict[str, Any] = {name: None for name in _SAMPLING}  # a preset fills in what is open
        return apply_preset(replace(request, **opened), self.preset)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Everything that two engines need to know in order to do the same."""

    weights: Weights
    sources: Sources  # empty where the weights are random or wan-tiny's
    config: ModelConfig
    request: Request  # complete, with its seed
    picture: Image.Image | None  # of the video's own size, so that no engine resizes it
    loras: tuple[LoraSpec, ...] = ()  # of every engine
    tiers: tuple[Tier, ...]
    reference_precision: ReferencePrecision
    placement: Placement  # of the reference's weights, where there is a GPU
    device: str
    vram: int | None  # bytes; None is what is free
    ram: int | None
    runs: int
    warmup: int
    threads: int

    @property
    def is_speed_only(self) -> bool:
        """Whether the weights make no picture that a difference could be told of."""
        return self.weights == "random"


def parse_tiers(text: str | None, device: torch.device) -> tuple[Tier, ...]:
    """Read tiers such as "exact,fp32", "lightning4", "density0.5" or "int8+lightning4+density0.5".

    Args:
        text: names of precisions, presets and attention densities; None is the precision of the reference.
        device: whose precision a tier without one has.

    Raises:
        RequestError: one of them is none of these, has two of a kind, or is named twice.
    """
    usual = usual_precision(device.type)
    if text is None:
        return (Tier(usual, usual),)
    tiers = tuple(_tier(name.strip(), usual) for name in text.split(","))
    names = [tier.name for tier in tiers]
    if len(set(names)) < len(names):
        raise RequestError(f"tiers: must name each tier once, got {text!r}")
    return tiers


def _tier(name: str, usual: Precision) -> Tier:
    precisions, presets = "|".join(get_args(Precision)), "|".join(PRESETS)
    rule = rf"(?P<precision>{precisions})?(?P<preset>\+(?:{presets}))?(?P<density>\+density(?:0?\.\d+|1))?"
    match = re.fullmatch(rule, name if name.partition("+")[0] in get_args(Precision) else f"+{name}")
    density = float(match["density"].removeprefix("+density")) if match and match["density"] else None
    if match is None or density == 0:
        raise RequestError(
            f"tiers: each must be a precision ({', '.join(get_args(Precision))}), a preset ({', '.join(PRESETS)}), an"
            " attention density (density0.5, above 0, up to 1), or a sum of them in this order, like int8+density0.5,"
            f" got {name!r}"
        )
    preset = match["preset"] and match["preset"].removeprefix("+")
    return Tier(name, cast(Precision, match["precision"] or usual), preset, density)


def plan_of(case: Case, tier: Tier | None = None) -> Plan:
    """Settle the case as a tier runs it, or as the reference does where there is none."""
    if tier is None:
        precision: Precision = "fp32" if case.reference_precision == "fp32" else "exact"
        return make_plan(case.config, case.request, precision=precision, device=case.device)
    return make_plan(case.config, tier.apply(case.request), precision=tier.precision, device=case.device)


def open_case(case: Case, precision: Precision) -> LoadedModel:
    """Open the case's weights; nothing is read yet, and nothing random drawn."""
    if case.weights in ("checkpoint", "wan-tiny"):
        return open_loaded(case.sources, precision=precision, vram=case.vram, device=case.device, ram=case.ram)
    dtype = dtype_of(precision)
    model = random_model(case.config, dtype, is_shared=case.weights == "random")
    return LoadedModel(model, precision=precision, device=torch.device(case.device), vram=case.vram, ram=case.ram)
