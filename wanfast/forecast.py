"""What a generation will need on a machine: one place that puts plan, weights, card and limits together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from wanfast.block_sizes import GGUF_BLOCKS
from wanfast.budget import DRIVER_BYTES, Budget, make_budget, refuse_what_cannot_fit
from wanfast.checkpoint.reader import Reader
from wanfast.config import ModelConfig
from wanfast.dit.chunking import Chunking, leanest
from wanfast.loaded import LoadedModel
from wanfast.lora import Lora
from wanfast.machines import Gpu, known_gpu
from wanfast.plan import EIGHT_BIT, Plan
from wanfast.predict import Prediction, Rates, datasheet_rates, predict
from wanfast.rates import measured_rates
from wanfast.residency import free_memory
from wanfast.residency.memory import free_host_memory
from wanfast.weight_sizes import WeightSizes, largest_block, weight_sizes


@dataclass(frozen=True, slots=True)
class Forecast:
    """Memory, and seconds where the card is known."""

    budget: Budget
    prediction: Prediction | None


def make_forecast(
    config: ModelConfig,
    plan: Plan,
    sizes: WeightSizes,
    *,
    gpu: Gpu | None = None,
    vram: int | None = None,
    ram: int | None = None,
    rates: Rates | None = None,
) -> Forecast:
    """Settle memory and seconds of a plan.

    Args:
        config: the model.
        plan: made for it.
        sizes: of its weights.
        gpu: the card, if it is known.
        vram: bytes of the card that may be used; None is all of it.
        ram: bytes of the host that may be used; None is as much as is useful.
        rates: that were measured; the card's data sheet where there are none.

    Raises:
        MemoryBudgetError: the plan does not fit; the message says what would.
    """
    on_gpu = plan.device.startswith("cuda")
    limit = ram if not on_gpu else vram if vram is not None or gpu is None else gpu.memory
    budget = refuse_what_cannot_fit(config, plan, sizes, vram=limit, ram=ram)
    if rates is None and on_gpu and gpu is not None:
        rates = datasheet_rates(gpu, plan)
    return Forecast(budget, None if rates is None else predict(config, plan, sizes, budget, rates))


def forecast_here(model: LoadedModel, plan: Plan, sizes: WeightSizes) -> Forecast:
    """Settle memory and seconds of a plan on this machine; errors as in `make_forecast`."""
    vram, ram = _limits_here(model)
    gpu = known_gpu(torch.cuda.get_device_name(model.device)) if model.device.type == "cuda" else None
    link = gpu.link if gpu is not None else math.inf  # on a CPU blocks are used where they are
    rates = measured_rates(model.config, plan.device, plan.precision, link) if gpu is not None or vram is None else None
    return make_forecast(model.config, plan, sizes, gpu=gpu, vram=vram, ram=ram, rates=rates)


def budget_here(model: LoadedModel, plan: Plan, loras: Sequence[Lora] = ()) -> Budget:
    """Settle the memory of a plan, and of what LoRAs add to it, on this machine; errors as in `make_forecast`."""
    vram, ram = _limits_here(model)
    limit = vram if model.device.type == "cuda" else ram
    sizes = with_loras(sizes_of(model), model.config, plan, loras)
    return refuse_what_cannot_fit(model.config, plan, sizes, vram=limit, ram=ram)


def bound_blocks(model: LoadedModel, plans: Sequence[Plan], loras: Sequence[Lora] = ()) -> Chunking:
    """Leave a GPU's blocks no more memory than the plans, made one after another, have for them.

    Returns:
        How the steps of each of them are cut.

    Raises:
        MemoryBudgetError: a plan does not fit; the message says what would.
    """
    budgets = [budget_here(model, plan, loras) for plan in plans]
    if model.device.type == "cuda":  # on a CPU blocks are used where they were loaded, which are mostly mapped files
        model.allow_blocks(min(budget.num_slots * budget.slot_bytes for budget in budgets))
    return leanest([budget.chunking for budget in budgets])


def tiles_here(model: LoadedModel, plan: Plan, stage: str) -> int:
    """Settle in how many strips a VAE shall take the picture, with the memory that is free by now.

    Args:
        model: that works.
        plan: of the video.
        stage: "picture" or "decode".

    Returns:
        The fewest that fit; as many as are worth cutting where even those may not.
    """
    vram, ram = _limits_here(model)
    limit = vram if model.device.type == "cuda" else ram
    return make_budget(model.config, plan, sizes_of(model), vram=limit, ram=ram).tilings[stage].num_tiles


def _limits_here(model: LoadedModel) -> tuple[int | None, int]:
    """Bytes of the device and of the host: what is free, or less where the user wants it."""
    free_ram = free_host_memory()
    ram = free_ram if model.ram is None else min(model.ram, free_ram)
    if model.device.type != "cuda":
        return None, ram
    # What this process holds is the model's own and makes room; the driver's share is taken already.
    free = free_memory(model.device) + torch.cuda.memory_allocated(model.device) + DRIVER_BYTES
    return (free if model.vram is None else min(model.vram, free)), ram


def sizes_of(model: LoadedModel) -> WeightSizes:
    """Read the sizes of an open model's weights from the headers of its files."""
    by_rule = weight_sizes(model.config, model.precision)
    readers = model.model.experts.values()
    forms = {form for reader in readers for form in _stored_forms(reader)}
    if model.precision in EIGHT_BIT:  # others are rounded to it when they are loaded
        forms = {form for form in forms if form in GGUF_BLOCKS}
    return WeightSizes(
        slot=max(
            largest_block(reader, model.compute_dtype, in_8_bits=model.precision in EIGHT_BIT) for reader in readers
        ),
        outer=by_rule.outer,
        text_slot=largest_block(model.model.text, model.compute_dtype),
        vae_encoder=by_rule.vae_encoder,
        vae_decoder=by_rule.vae_decoder,
        stored=", ".join(sorted(forms)) or (model.precision if model.precision in EIGHT_BIT else "16 or 32 bits"),
        is_expanded=bool(forms),
    )


def with_loras(sizes: WeightSizes, config: ModelConfig, plan: Plan, loras: Sequence[Lora]) -> WeightSizes:
    """Add what LoRAs take beside an expert's weights: their factors, and where they are merged the copy of a block."""
    itemsize = 4 if plan.precision == "fp32" else 2
    by_expert: dict[str, int] = {}
    for lora in loras:
        for expert, layers in lora.layers.items():
            keys = [key for layer in layers.values() for key in layer.keys.values()]
            size = sum(math.prod(lora.reader.shape(key)) for key in keys) * itemsize
            by_expert[expert] = by_expert.get(expert, 0) + size
    total = max(by_expert.values(), default=0)
    if any(lora.spec.is_merged for lora in loras):
        dim, ffn_dim = config.dit.dim, config.dit.ffn_dim
        total += (8 * dim + 2 * ffn_dim) * dim * itemsize + dim * ffn_dim * 4  # the block, and a matrix in fp32
    return replace(sizes, loras=total)


def _stored_forms(reader: Reader) -> set[str]:
    names = [name for name in reader.names() if name.startswith("blocks.")]
    return {form for name in names if (form := reader.ref(name).stored_as) is not None}
