"""`wanfast plan`: what generate would do, on this machine or on another; loads nothing."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from wanfast.budget import gigabytes
from wanfast.command_parts import note, request_for, sources_of
from wanfast.config import MODELS, ModelConfig
from wanfast.errors import MemoryBudgetError, RequestError
from wanfast.forecast import Forecast, forecast_here, make_forecast, sizes_of, with_loras
from wanfast.host_memory import HOST_RESERVE_BYTES
from wanfast.images import load_image
from wanfast.lora import describe_lora, open_loras
from wanfast.machines import Gpu, find_gpu
from wanfast.model import vae_parameters
from wanfast.pipeline import open_loaded, warn_of_preset
from wanfast.plan import Plan, Precision, make_plan, plan_to_dict
from wanfast.plan_text import budget_to_dict, format_plan
from wanfast.predict import prediction_to_dict
from wanfast.residency import parse_bytes
from wanfast.weight_sizes import parse_stored, weight_sizes


def show_plan(arguments: argparse.Namespace) -> None:
    """Print the plan of a parsed line.

    Raises:
        RequestError: an argument breaks a rule.
        MemoryBudgetError: what was asked for does not fit; the message says what would.
        CheckpointError: a file cannot be used.
    """
    row = None if sources_of(arguments).parts else _row_by_name(arguments.model or arguments.task)
    plan, forecast = _of_files(arguments) if row is None else _of_row(arguments, row)
    if not arguments.json:
        print(format_plan(plan, forecast.budget, forecast.prediction))
        return
    shown = plan_to_dict(plan) | {"memory": budget_to_dict(forecast.budget)}
    if forecast.prediction is not None:
        shown["seconds"] = prediction_to_dict(forecast.prediction)
    print(json.dumps(shown, ensure_ascii=False, indent=2))


def _of_row(arguments: argparse.Namespace, row: ModelConfig) -> tuple[Plan, Forecast]:
    """Plan for a model of the table: no file is needed, and any machine can be asked about.

    Its files are taken to be those that are published, which hold fp32.
    """
    precision: Precision = "exact" if arguments.precision == "auto" else arguments.precision
    image = load_image(arguments.image) if arguments.image else None
    request = request_for(arguments, row, image)
    if row.task == "i2v" and image is None:  # what a card would do needs no picture, but for its shape
        size = request.width or row.width, request.height or row.height
        request = replace(request, image_size=size)
        note(arguments, f"image: none is given, one of {size[0]}x{size[1]} is planned for")
    gpu, vram, ram = _limits(arguments)
    device = _device_to_plan_for(arguments.device or "cuda")
    if precision == "fp8" and gpu is not None and not gpu.has_e4m3:
        raise RequestError(f"precision: fp8 needs a GPU of compute capability 8.9 or more, got {gpu.name}; try int8")
    plan = make_plan(row, request, precision=precision, device=device, vae_parameters=vae_parameters(row.vae))
    loras = open_loras(arguments.lora, row, merge=arguments.merge_loras)
    note(arguments, *map(describe_lora, loras))
    sizes = weight_sizes(row, precision, parse_stored(arguments.stored or "fp32"))
    return plan, make_forecast(row, plan, with_loras(sizes, row, plan, loras), gpu=gpu, vram=vram, ram=ram)


def _of_files(arguments: argparse.Namespace) -> tuple[Plan, Forecast]:
    """Plan for files, on this machine; with a card named, on one like it."""
    if arguments.stored is not None:
        raise RequestError(
            f"stored: must not be given for files, which tell it, got {arguments.stored!r}; leave it out, or name a "
            "model without files, such as t2v-a14b"
        )
    image = load_image(arguments.image) if arguments.image else None
    gpu, vram, ram = _limits(arguments)
    model = open_loaded(
        sources_of(arguments),
        precision=arguments.precision,
        vram=arguments.vram,
        ram=arguments.ram,
        device=arguments.device,
    )
    request = request_for(arguments, model.config, image)
    parameters = vae_parameters(model.config.vae)
    device = str(model.device) if gpu is None else "cuda"
    plan = make_plan(model.config, request, precision=model.precision, device=device, vae_parameters=parameters)
    note(arguments, *model.model.notes)
    loras = open_loras(arguments.lora, model.config, model.model.experts, merge=arguments.merge_loras)
    warn_of_preset(model, plan, loras)
    note(arguments, *map(describe_lora, loras))
    sizes = with_loras(sizes_of(model), model.config, plan, loras)
    if gpu is None:
        return plan, forecast_here(model, plan, sizes)
    return plan, make_forecast(model.config, plan, sizes, gpu=gpu, vram=vram, ram=ram)


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
