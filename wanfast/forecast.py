"""What a generation will need on a machine: one place that puts plan, weights, card and limits together."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from wanfast.block_sizes import GGUF_BLOCKS
from wanfast.budget import DRIVER_BYTES, Budget, make_budget
from wanfast.checkpoint.reader import Reader
from wanfast.config import ModelConfig
from wanfast.fitting import refuse_what_cannot_fit
from wanfast.loaded import LoadedModel
from wanfast.lora import Lora
from wanfast.machines import DISK, Gpu, known_gpu
from wanfast.plan import EIGHT_BIT, Plan, Precision, Wish
from wanfast.precision import plan_within
from wanfast.predict import FileReads, Prediction, Rates, count_reads, datasheet_rates, predict
from wanfast.rates import measured_rates
from wanfast.residency import free_memory
from wanfast.residency.memory import free_host_memory
from wanfast.weight_sizes import (
    WeightSizes,
    dtype_of,
    largest_block,
    largest_in_file,
    loading_bytes,
    weight_sizes,
)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Memory, and seconds where the card is known."""

    budget: Budget
    prediction: Prediction | None
    reads: FileReads


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
        vram: bytes of the card that may be used, None is all of it; on a CPU those for blocks, as in `make_budget`.
        ram: bytes of the host that may be used; None is as much as is useful.
        rates: that were measured; the card's data sheet where there are none.

    Raises:
        MemoryBudgetError: the plan does not fit; the message says what would.
    """
    on_gpu = plan.device.startswith("cuda")
    if vram is None and gpu is not None:
        vram = gpu.memory
    budget = refuse_what_cannot_fit(config, plan, sizes, vram=vram, ram=ram)
    if rates is None and on_gpu and gpu is not None:
        rates = replace(datasheet_rates(gpu, plan), disk=DISK)
    prediction = None if rates is None else predict(config, plan, sizes, budget, rates)
    return Forecast(budget, prediction, count_reads(plan, sizes, budget))


def forecast_here(model: LoadedModel, plan: Plan, sizes: WeightSizes) -> Forecast:
    """Settle memory and seconds of a plan on this machine; errors as in `make_forecast`."""
    vram, ram = _limits_here(model)
    gpu = known_gpu(torch.cuda.get_device_name(model.device)) if model.device.type == "cuda" else None
    link = gpu.link if gpu is not None else math.inf  # on a CPU blocks are used where they are
    is_known = gpu is not None or model.device.type == "cpu"
    rates = measured_rates(model.config, plan.device, plan.precision, link) if is_known else None
    return make_forecast(model.config, plan, sizes, gpu=gpu, vram=vram, ram=ram, rates=rates)


def plan_here(model: LoadedModel, plan: Plan, wish: Wish, loras: Sequence[Lora] = ()) -> tuple[Plan, str | None]:
    """Settle a plan's precision by the memory of this machine, as `plan_within` does."""
    vram, ram = _limits_here(model)
    return plan_within(model.config, plan, wish, sizes_in(model, loras), vram=vram, ram=ram)


def sizes_in(model: LoadedModel, loras: Sequence[Lora] = ()) -> Callable[[Plan], WeightSizes]:
    """Give what tells the sizes of a model's weights in the precision of a plan, with what LoRAs add."""
    return lambda plan: with_loras(sizes_of(model, plan.precision), model.config, plan, loras)


def budget_here(model: LoadedModel, plan: Plan, loras: Sequence[Lora] = ()) -> Budget:
    """Settle the memory of a plan, and of what LoRAs add to it, on this machine; errors as in `make_forecast`."""
    vram, ram = _limits_here(model)
    return refuse_what_cannot_fit(model.config, plan, sizes_in(model, loras)(plan), vram=vram, ram=ram)


def bound_blocks(model: LoadedModel, budgets: Sequence[Budget]) -> None:
    """Leave blocks no more memory than each of the generations, made one after another, has for them."""
    if model.device.type == "cuda":  # on a CPU `vram` bounds slots by itself, without it there are none
        model.allow_blocks(min(budget.num_slots * budget.slot_bytes for budget in budgets))
    waiting = sum(budget.clip_bytes for budget in budgets)
    rooms = [room - waiting + one.clip_bytes for one in budgets if (room := one.host_room) is not None]
    if rooms:
        model.allow_host(max(0, min(rooms)))


def decodes_beside_blocks(model: LoadedModel, plan: Plan, loras: Sequence[Lora] = ()) -> bool:
    """Whether a GPU has room for decoding the whole picture with the experts' weights where they are."""
    vram, ram = _limits_here(model)
    sizes = sizes_in(model, loras)(plan)
    budget = make_budget(model.config, plan, sizes, vram=vram, ram=ram)
    decode = next(stage for stage in budget.stages if stage.name == "decode")
    held = budget.num_slots * budget.slot_bytes + budget.num_experts * sizes.outer + sizes.loras
    return budget.limit is None or decode.total + held <= budget.limit


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
    if model.device.type == "cpu" and ram is not None:
        ram -= model.host_bytes  # blocks stay where they are meanwhile
    return make_budget(model.config, plan, sizes_in(model)(plan), vram=vram, ram=ram).tilings[stage].num_tiles


def _limits_here(model: LoadedModel) -> tuple[int | None, int | None]:
    """Bytes of the device and of the host: what is free, or less where the user wants it."""
    free_ram = free_host_memory()
    ram: int | None = free_ram + model.host_bytes  # what blocks take is the model's own and makes room
    if model.ram is not None:
        ram = min(model.ram, free_ram + model.host_bytes)
    elif free_ram == sys.maxsize:  # the system does not tell
        ram = None
    if model.device.type != "cuda":
        return model.vram, ram
    # What this process holds is the model's own and makes room; the driver's share is taken already.
    free = free_memory(model.device) + torch.cuda.memory_allocated(model.device) + DRIVER_BYTES
    return (free if model.vram is None else min(model.vram, free)), ram


def sizes_of(model: LoadedModel, precision: Precision) -> WeightSizes:
    """Read the sizes that an open model's weights have in a precision from the headers of its files."""
    by_rule, dtype, in_8_bits = weight_sizes(model.config, precision), dtype_of(precision), precision in EIGHT_BIT
    readers = model.model.experts.values()
    forms = {form for reader in readers for form in _stored_forms(reader)}
    if in_8_bits:  # others are rounded to it when they are loaded
        forms = {form for form in forms if form in GGUF_BLOCKS}
    slot = max(largest_block(reader, dtype, in_8_bits=in_8_bits) for reader in readers)
    is_as_stored = all(_is_as_stored(reader, precision) for reader in readers)
    return WeightSizes(
        slot=slot,
        outer=by_rule.outer,
        text_slot=largest_block(model.model.text, dtype),
        vae_encoder=by_rule.vae_encoder,
        vae_decoder=by_rule.vae_decoder,
        stored=", ".join(sorted(forms)) or (precision if in_8_bits else "16 or 32 bits"),
        is_expanded=bool(forms),
        is_as_stored=is_as_stored,
        file_block=max(map(largest_in_file, readers)),
        loading=loading_bytes(model.config, precision, slot, is_as_stored=is_as_stored),
    )


def _is_as_stored(reader: Reader, precision: Precision) -> bool:
    """Whether an expert's projections lie in their files as they are computed with."""
    names = [name for name in reader.names() if name.startswith("blocks.") and len(reader.ref(name).shape) == 2]
    refs = [reader.ref(name) for name in names if name.endswith(".weight")]
    if precision not in EIGHT_BIT:
        return all(ref.stored_as is not None or ref.dtype == dtype_of(precision) for ref in refs)
    if precision == "int8":  # from anywhere
        return all(ref.stored_as in (*GGUF_BLOCKS, "int8") for ref in refs)
    return all(ref.stored_as in GGUF_BLOCKS or (ref.stored_as == "float8_e4m3fn" and ref.is_ready) for ref in refs)


def with_loras(sizes: WeightSizes, config: ModelConfig, plan: Plan, loras: Sequence[Lora]) -> WeightSizes:
    """Add what LoRAs take beside an expert's weights: their factors, and where they are merged the copy of a block."""
    itemsize = dtype_of(plan.precision).itemsize
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
