"""`wanfast plan`: what generate would do, on this machine or on another; loads nothing."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from wanfast.checkpoint.lookup import Sources
from wanfast.command_parts import note, request_for, sources_of, usual_sources
from wanfast.config import MODELS, ModelConfig
from wanfast.errors import MemoryBudgetError, RequestError
from wanfast.forecast import Forecast, forecast_here, make_forecast, plan_here, sizes_in, with_loras
from wanfast.host_memory import HOST_RESERVE_BYTES
from wanfast.images import load_image
from wanfast.lora import describe_lora, open_loras
from wanfast.machines import Gpu, find_gpu
from wanfast.model import vae_parameters
from wanfast.pipeline import open_loaded, open_loras_for, warn_of_preset
from wanfast.plan import Plan, Precision, Wish, make_plan, plan_to_dict
from wanfast.plan_text import budget_to_dict, format_plan
from wanfast.precision import auto_without_files, can_round, in_precision, plan_within, wish_of_auto
from wanfast.predict import prediction_to_dict, reads_to_dict
from wanfast.residency import gigabytes, parse_bytes
from wanfast.weight_sizes import WeightSizes, parse_stored, weight_sizes

BUILT_IN = """\
{name}, the small model that comes with wanfast and needs no download, as no --model is given.
The large one: wanfast plan --model t2v-a14b, with --gpu 4090 for a card that is not here.
"""


@dataclass(frozen=True, slots=True)
class _Shown:
    """What there is to print."""

    plan: Plan
    forecast: Forecast
    reason: str | None  # for the precision, where it does not go without saying
    instead: Forecast | None  # of the same in int8, beside the exact precision on a GPU


def show_plan(arguments: argparse.Namespace) -> None:
    """Print the plan of a parsed line.

    Raises:
        RequestError: an argument breaks a rule.
        MemoryBudgetError: what was asked for does not fit; the message says what would.
        CheckpointError: a file cannot be used.
    """
    sources = sources_of(arguments)
    row = None if sources.parts else _row_by_name(arguments.model or arguments.task)
    shown = _of_files(arguments) if row is None else _of_row(arguments, row)
    is_built_in = row is None and sources == Sources()
    forecast, instead = shown.forecast, shown.instead
    if not arguments.json:
        page = format_plan(
            shown.plan,
            forecast.budget,
            forecast.prediction,
            reason=shown.reason,
            reads=forecast.reads,
            instead=None if instead is None else (instead.budget, instead.prediction),
        )
        print(f"{BUILT_IN.format(name=shown.plan.model)}\n{page}" if is_built_in else page)
        return
    told = plan_to_dict(shown.plan) | {"precision_reason": shown.reason, "memory": budget_to_dict(forecast.budget)}
    told["files"] = reads_to_dict(forecast.reads)
    if forecast.prediction is not None:
        told["seconds"] = prediction_to_dict(forecast.prediction)
    if instead is not None:
        told["instead"] = {"precision": "int8", "memory": budget_to_dict(instead.budget)}
        if instead.prediction is not None:
            told["instead"]["seconds"] = prediction_to_dict(instead.prediction)
    print(json.dumps(told, ensure_ascii=False, indent=2))


def _of_row(arguments: argparse.Namespace, row: ModelConfig) -> _Shown:
    """Plan for a model of the table: no file is needed, and any machine can be asked about.

    Its files are taken to be those that are published, which hold fp32.
    """
    device = _device_to_plan_for(arguments.device or "cuda")
    wish = auto_without_files(device) if arguments.precision == "auto" else Wish(arguments.precision)
    image = load_image(arguments.image) if arguments.image else None
    request = request_for(arguments, row, image)
    if row.task == "i2v" and image is None:  # what a card would do needs no picture, but for its shape
        size = request.width or row.width, request.height or row.height
        request = replace(request, image_size=size)
        note(arguments, f"image: none is given, one of {size[0]}x{size[1]} is planned for")
    gpu, vram, ram = _limits(arguments)
    _refuse_unfit(wish.precision, gpu)
    wished = make_plan(row, request, precision=wish.precision, device=device, vae_parameters=vae_parameters(row.vae))
    loras = open_loras(arguments.lora, row, merge=arguments.merge_loras)
    note(arguments, *map(describe_lora, loras))
    stored = parse_stored(arguments.stored or "fp32")

    def sizes_in(plan: Plan) -> WeightSizes:
        return with_loras(weight_sizes(row, plan.precision, stored), row, plan, loras)

    return _settled(row, wished, wish, sizes_in, gpu=gpu, vram=vram, ram=ram)


def _of_files(arguments: argparse.Namespace) -> _Shown:
    """Plan for files, on this machine; with a card named, on one like it."""
    if arguments.stored is not None:
        raise RequestError(
            f"stored: must not be given for files, which tell it, got {arguments.stored!r}; leave it out, or name a "
            "model without files, such as t2v-a14b"
        )
    image = load_image(arguments.image) if arguments.image else None
    gpu, vram, ram = _limits(arguments)
    model = open_loaded(
        usual_sources(arguments, has_image=image is not None),
        precision=arguments.precision,
        vram=arguments.vram,
        ram=arguments.ram,
        device=arguments.device,
    )
    request = request_for(arguments, model.config, image)
    wish, device = model.wish, str(model.device)
    if gpu is not None:
        device = "cuda"
        if arguments.precision == "auto":
            wish = wish_of_auto(model.model, device, has_e4m3=gpu.has_e4m3)
        _refuse_unfit(wish.precision, gpu)
    parameters = vae_parameters(model.config.vae)
    wished = make_plan(model.config, request, precision=wish.precision, device=device, vae_parameters=parameters)
    note(arguments, *model.model.notes)
    loras = open_loras_for(model.model, arguments.lora, arguments.preset, merge=arguments.merge_loras)
    warn_of_preset(model, wished, loras)
    note(arguments, *map(describe_lora, loras))
    sizes = sizes_in(model, loras)
    if gpu is not None:
        return _settled(model.config, wished, wish, sizes, gpu=gpu, vram=vram, ram=ram)
    plan, reason = plan_here(model, wished, wish, loras)
    instead = _rounded(model.config, plan)
    return _Shown(
        plan,
        forecast_here(model, plan, sizes(plan)),
        reason,
        None if instead is None else _if_it_fits(partial(forecast_here, model, instead, sizes(instead))),
    )


def _settled(
    config: ModelConfig,
    wished: Plan,
    wish: Wish,
    sizes_in: Callable[[Plan], WeightSizes],
    *,
    gpu: Gpu | None,
    vram: int | None,
    ram: int | None,
) -> _Shown:
    """Settle precision, memory and seconds on a machine that is given by numbers."""
    room = gpu.memory if vram is None and gpu is not None else vram
    plan, reason = plan_within(config, wished, wish, sizes_in, vram=room, ram=ram)
    make = partial(make_forecast, config, gpu=gpu, vram=vram, ram=ram)
    instead = _rounded(config, plan)
    return _Shown(
        plan,
        make(plan, sizes_in(plan)),
        reason,
        None if instead is None else _if_it_fits(partial(make, instead, sizes_in(instead))),
    )


def _rounded(config: ModelConfig, plan: Plan) -> Plan | None:
    """The same in int8, beside which the exact precision on a GPU stands; None beside others."""
    is_beside = plan.device.startswith("cuda") and plan.precision == "exact" and can_round(config)
    return in_precision(config, plan, "int8") if is_beside else None


def _if_it_fits(make: Callable[[], Forecast]) -> Forecast | None:
    try:
        return make()
    except MemoryBudgetError:  # with little host memory: rounding takes some
        return None


def _refuse_unfit(precision: Precision, gpu: Gpu | None) -> None:
    if precision == "fp8" and gpu is not None and not gpu.has_e4m3:
        raise RequestError(f"precision: fp8 needs a GPU of compute capability 8.9 or more, got {gpu.name}; try int8")


def _limits(arguments: argparse.Namespace) -> tuple[Gpu | None, int | None, int | None]:
    """Read the card and the bytes of it and of the host that may be used, and hold them to one another."""
    gpu = None if arguments.gpu is None else find_gpu(arguments.gpu)
    vram = None if arguments.vram is None else parse_bytes("vram", arguments.vram)
    ram = None if arguments.ram is None else parse_bytes("ram", arguments.ram)
    if gpu is not None and (arguments.device or "cuda").startswith("cpu"):
        raise RequestError(f"gpu: must be left out for device cpu, got {gpu.name}; leave --device out")
    if gpu is not None and vram is not None and vram > gpu.memory:
        raise RequestError(f"vram: must be at most the {gigabytes(gpu.memory)} of a {gpu.name}, got {gigabytes(vram)}")
    if ram is not None and ram < HOST_RESERVE_BYTES:
        raise MemoryBudgetError(
            f"ram: must be at least the {gigabytes(HOST_RESERVE_BYTES)} left to the system, got {gigabytes(ram)}"
        )
    return gpu, vram, ram


def _device_to_plan_for(name: str) -> str:
    """Check a device's name; the plan may be for another machine, so it need not be here."""
    try:
        is_known = torch.device(name).type in ("cpu", "cuda")
    except RuntimeError:
        is_known = False
    if not is_known:
        raise RequestError(f"device: must be cpu, cuda or cuda:N, got {name!r}")
    return name


def _row_by_name(name: str | None) -> ModelConfig | None:
    """Find a model of the table by its name, unless a folder of that name is there."""
    if name is None or Path(name).is_dir():
        return None
    return next((row for row in MODELS.values() if row.name.lower() == name.lower()), None)
