"""Where every byte of a generation lives, stage by stage: settled from sizes alone, and refused where it cannot fit.

A stage is a pass through the code between two releases of memory: text, picture, the steps, decoding. What is counted
is what torch is asked for, and a fixed share for the driver and its libraries; all of it is computed, none measured.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from wanfast.config import ModelConfig
from wanfast.dit.chunking import CHUNKINGS, Chunking
from wanfast.dit.memory import dit_activations, dit_activations_8bit, kept_text_bytes
from wanfast.errors import MemoryBudgetError, RequestError
from wanfast.plan import EIGHT_BIT, Plan, make_plan, request_of
from wanfast.residency.residency import MIN_SLOTS
from wanfast.text.memory import text_activations
from wanfast.vae.memory import VAEActivations, decode_activations, encode_activations
from wanfast.vae.tiles import most_tiles
from wanfast.weight_sizes import WeightSizes

DRIVER_BYTES = 600_000_000  # of a GPU: CUDA's context, loaded kernels, workspaces of cuBLAS
HOST_RESERVE_BYTES = 2 * 2**30  # what the residency leaves to the system
_FP32 = 4
_SOLVER_TENSORS = 6  # latents, noise, velocities and a solver's history, of the latents' size


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage and what it holds on the device at its peak."""

    name: str
    items: Mapping[str, int]  # what -> bytes, none 0

    @property
    def total(self) -> int:
        """The stage's peak."""
        return sum(self.items.values())


@dataclass(frozen=True, slots=True)
class Tiling:
    """In how many strips a VAE takes the picture."""

    num_tiles: int
    whole: int  # bytes the stage would take with the picture whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The memory of one generation."""

    stages: tuple[Stage, ...]  # in the order they run
    limit: int | None  # bytes of the device; None: not known
    num_slots: int  # equal slots for blocks of the diffusion transformers, at least 2
    num_blocks: int  # blocks of one expert
    num_experts: int  # that take steps
    slot_bytes: int
    stored: str  # the form of the blocks' projections
    chunking: Chunking  # of the steps
    tilings: Mapping[str, Tiling] = field(default_factory=dict)  # by stage, of those in which a VAE works
    host: Mapping[str, int] = field(default_factory=dict)  # what -> bytes of host memory
    host_missing: int = 0  # bytes of blocks that are copied again and for which the host has no room
    host_limit: int | None = None

    @property
    def peak(self) -> Stage:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        """Whether every stage is within the limit."""
        return self.limit is None or self.peak.total <= self.limit

    @property
    def is_resident(self) -> bool:
        """Whether a whole expert stays on the device."""
        return self.num_slots >= self.num_blocks


def slots_that_fit(free: int, other: int, slot_bytes: int, num_blocks: int) -> int:
    """Count the slots that a device has room for.

    Args:
        free: bytes of the device for everything.
        other: bytes that are no slots: activations, and weights around the blocks.
        slot_bytes: of one slot.
        num_blocks: beyond which another slot would stay empty.

    Returns:
        At most num_blocks; fewer than two, even below zero, where it does not fit.
    """
    return min((free - other) // slot_bytes, num_blocks)


def make_budget(
    config: ModelConfig,
    plan: Plan,
    sizes: WeightSizes,
    *,
    vram: int | None,
    ram: int | None = None,
) -> Budget:
    """Place every byte of a planned generation.

    Args:
        config: the model.
        plan: made for it.
        sizes: of its weights.
        vram: bytes of the device; None is as much as is useful.
        ram: bytes of the host; None is as much as is useful.

    Returns:
        The budget, which may not fit: `fits` says, `refuse_what_cannot_fit` raises.
    """
    experts = tuple(dict.fromkeys(step.expert for step in plan.steps))
    carried = _driver(plan) | _carried(config, plan)
    steps, chunking = _steps_that_fit(
        config, plan, sizes, carried | _around_blocks(plan, sizes, len(experts)), vram=vram
    )
    num_blocks = config.dit.num_layers
    wanted = num_blocks * len(experts)
    most = wanted if vram is None else slots_that_fit(vram, sum(steps.values()), sizes.slot, wanted)
    num_slots = max(MIN_SLOTS, num_blocks if num_blocks <= most < wanted else most)
    steps = {_slots_label(num_slots, num_blocks): num_slots * sizes.slot} | steps

    stages = [Stage("text", _text_items(config, plan, sizes))]
    tilings = {}
    if plan.image_size is not None:
        items, tilings["picture"] = _fewest_tiles(
            plan, lambda n: carried | _picture_items(config, plan, sizes, n), vram
        )
        stages.append(Stage("picture", items))
    stages.append(Stage(f"steps ({', '.join(experts)})", steps))
    items, tilings["decode"] = _fewest_tiles(plan, lambda n: _decode_items(config, plan, sizes, n), vram)
    stages.append(Stage("decode", items))
    budget = Budget(
        stages=tuple(Stage(stage.name, {what: size for what, size in stage.items.items() if size}) for stage in stages),
        limit=vram,
        num_slots=num_slots,
        num_blocks=num_blocks,
        num_experts=len(experts),
        slot_bytes=sizes.slot,
        stored=sizes.stored,
        chunking=chunking,
        tilings=tilings,
        host_limit=ram,
    )
    again, waiting = _copied_again(budget), _waiting_pixels(plan, budget)
    kept = again if ram is None else max(0, min(again, ram - HOST_RESERVE_BYTES - sum(waiting.values())))
    host = {"left to the system": HOST_RESERVE_BYTES, "blocks that are copied again": kept} | waiting
    return replace(budget, host=host, host_missing=again - kept)


def _steps_that_fit(
    config: ModelConfig, plan: Plan, sizes: WeightSizes, other: Mapping[str, int], *, vram: int | None
) -> tuple[dict[str, int], Chunking]:
    """Cut the steps as little as leaves room for two blocks, or as finely as they can be cut."""
    for chunking in CHUNKINGS:
        items = dict(other) | _step_items(config, plan, chunking, sizes)
        if vram is None or sum(items.values()) + MIN_SLOTS * sizes.slot <= vram:
            break
    return items, chunking


def _on_gpu(plan: Plan) -> bool:
    return plan.device.startswith("cuda")


def _itemsize(plan: Plan) -> int:
    return 4 if plan.precision == "fp32" else 2


def _driver(plan: Plan) -> dict[str, int]:
    return {"driver and libraries": DRIVER_BYTES} if _on_gpu(plan) else {}


def _text_items(config: ModelConfig, plan: Plan, sizes: WeightSizes) -> dict[str, int]:
    num_tokens = config.dit.text_len
    activations = text_activations(config.text, num_tokens=num_tokens, num_prompts=2, itemsize=_itemsize(plan))
    blocks = {"two blocks of the encoder": MIN_SLOTS * sizes.text_slot}
    return _driver(plan) | blocks | {"activations": activations}


def _fewest_tiles(
    plan: Plan, items_of: Callable[[int], dict[str, int]], limit: int | None
) -> tuple[dict[str, int], Tiling]:
    """Cut the picture into as few strips as fit, or into as many as are worth cutting."""
    items = items_of(1)
    whole = sum(items.values())
    if limit is None or whole <= limit:
        return items, Tiling(1, whole)
    for num_tiles in range(2, most_tiles(*plan.latent_shape[2:]) + 1):
        items = items_of(num_tiles)
        if sum(items.values()) <= limit:
            return items, Tiling(num_tiles, whole)
    return items, Tiling(most_tiles(*plan.latent_shape[2:]), whole)


def _waiting_pixels(plan: Plan, budget: Budget) -> dict[str, int]:
    """Frames that wait on the host until their last strip is decoded."""
    if budget.tilings["decode"].num_tiles == 1:
        return {}
    return {"pixels of strips": plan.num_frames * plan.height * plan.width * 3}


def _picture_items(config: ModelConfig, plan: Plan, sizes: WeightSizes, num_tiles: int) -> dict[str, int]:
    activations = encode_activations(
        config.vae,
        height=plan.height,
        width=plan.width,
        num_frames=_encoded(plan),
        is_joined=_on_gpu(plan),
        num_tiles=num_tiles,
    )
    return {"VAE encoder": sizes.vae_encoder} | _vae_items(activations)


def _around_blocks(plan: Plan, sizes: WeightSizes, num_experts: int) -> dict[str, int]:
    """What stands around the blocks; a GPU has it of every expert, so that the swap waits for nothing."""
    return {"weights around the blocks": sizes.outer * (num_experts if _on_gpu(plan) else 1), "LoRAs": sizes.loras}


def _decode_items(config: ModelConfig, plan: Plan, sizes: WeightSizes, num_tiles: int) -> dict[str, int]:
    _, num_frames, rows, columns = plan.latent_shape
    activations = decode_activations(
        config.vae, rows=rows, columns=columns, num_frames=num_frames, is_joined=_on_gpu(plan), num_tiles=num_tiles
    )
    weights = {"latents": _latent_bytes(plan), "VAE decoder": sizes.vae_decoder}
    return _driver(plan) | weights | _vae_items(activations)


def refuse_what_cannot_fit(
    config: ModelConfig, plan: Plan, sizes: WeightSizes, *, vram: int | None, ram: int | None = None
) -> Budget:
    """Make the budget, and refuse a generation that does not fit.

    Raises:
        MemoryBudgetError: it does not fit; the message has the numbers, and the nearest requests that fit.
    """
    budget = make_budget(config, plan, sizes, vram=vram, ram=ram)
    if budget.fits:
        return budget
    assert vram is not None
    peak = budget.peak
    largest = sorted(peak.items.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{what} {gigabytes(size)}" for what, size in largest)
    near = nearest_that_fit(config, plan, sizes, vram=vram)
    remedy = " or ".join(near) + (" fits" if len(near) == 1 else " fit") if near else "no size of this model fits"
    raise MemoryBudgetError(
        f"{'vram' if plan.device.startswith('cuda') else 'ram'}: {plan.width}x{plan.height} with {plan.num_frames}"
        f" frames needs {gigabytes(peak.total)} at its peak, {peak.name} ({parts}), got {gigabytes(vram)}; {remedy}"
    )


def nearest_that_fit(config: ModelConfig, plan: Plan, sizes: WeightSizes, *, vram: int) -> list[str]:
    """Search the model's sizes and frame counts for what fits: the most frames at this size, the next size below.

    Returns:
        At most two, as text; none where even the smallest does not fit.
    """
    found = []
    width, height = plan.asked_size
    if (frames := _most_frames(config, plan, sizes, width, height, vram)) is not None:
        found.append(f"{width}x{height} with {frames} frames")
    smaller = sorted((size for size in _sizes_below(config, width, height)), key=lambda size: -size[0] * size[1])
    for width, height in smaller:
        frames = _most_frames(config, plan, sizes, width, height, vram)
        if frames is not None:
            found.append(f"{width}x{height} with {frames} frames")
            break
    return found


def gigabytes(size: int) -> str:
    """Write an amount of memory as people read it."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


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
        "host": dict(budget.host),
        "host_peak": sum(budget.host.values()),
    }


def _sizes_below(config: ModelConfig, width: int, height: int) -> list[tuple[int, int]]:
    """The model's sizes of less area, of the same orientation where there is a choice."""
    below = [size for size in config.sizes if size[0] * size[1] < width * height]
    alike = [size for size in below if (size[0] >= size[1]) == (width >= height)]
    return alike or below


def _most_frames(config: ModelConfig, plan: Plan, sizes: WeightSizes, width: int, height: int, vram: int) -> int | None:
    """The largest number of frames, at most the plan's, that fits; None where one frame does not."""
    stride = config.vae.temporal_stride

    def fits(latent_frames: int) -> bool:
        num_frames = (latent_frames - 1) * stride + 1
        request = replace(request_of(plan), width=width, height=height, num_frames=num_frames)
        try:
            smaller = make_plan(config, request, precision=plan.precision, device=plan.device)
        except RequestError:  # an image too thin for so small an area
            return False
        return make_budget(config, smaller, sizes, vram=vram).fits

    low, high = 0, plan.latent_shape[1]
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return None if low == 0 else (low - 1) * stride + 1


def _carried(config: ModelConfig, plan: Plan) -> dict[str, int]:
    """What stays from one stage to the next."""
    contexts = 2 * config.dit.text_len * config.dit.text_dim * _itemsize(plan)
    latents = _latent_bytes(plan)
    condition = 0
    if plan.image_size is not None:
        per_channel = latents // plan.latent_shape[0]
        is_whole = plan.task == "i2v"
        condition = (config.dit.in_channels - config.dit.out_channels) * per_channel if is_whole else latents
    return {"encoded prompts": contexts, "latents and solver": _SOLVER_TENSORS * latents, "picture": condition}


def _step_items(config: ModelConfig, plan: Plan, chunking: Chunking, sizes: WeightSizes) -> dict[str, int]:
    num_contexts, itemsize = max(step.num_forwards for step in plan.steps), _itemsize(plan)
    kept = kept_text_bytes(config.dit, num_contexts=num_contexts, itemsize=itemsize, limit=chunking.text_bytes)
    in_8_bits = plan.precision in EIGHT_BIT and _on_gpu(plan)
    count = dit_activations_8bit if in_8_bits else partial(dit_activations, itemsize=itemsize)
    return {"keys and values of the text": kept} | count(
        config.dit,
        num_tokens=plan.num_tokens,
        num_contexts=1 if chunking.in_turn else num_contexts,
        chunk_tokens=chunking.tokens,
        is_expanded=sizes.is_expanded,
        timestep_rows=2 if plan.task == "ti2v" and plan.image_size is not None else 1,
    )


def _encoded(plan: Plan) -> int:
    """Latent frames that the picture is encoded to: with grey ones behind it, or alone."""
    return plan.latent_shape[1] if plan.task == "i2v" else 1


def _vae_items(activations: VAEActivations) -> dict[str, int]:
    return {
        "frames remembered": activations.histories,
        "one chunk of frames": activations.moment,
        "features of all strips": activations.features,
    }


def _latent_bytes(plan: Plan) -> int:
    channels, frames, rows, columns = plan.latent_shape
    return channels * frames * rows * columns * _FP32


def _slots_label(num_slots: int, num_blocks: int) -> str:
    if num_slots >= 2 * num_blocks:
        return "blocks of both experts"
    if num_slots >= num_blocks:
        return f"all {num_blocks} blocks of an expert"
    return f"{num_slots} slots for {num_blocks} blocks"


def _copied_again(budget: Budget) -> int:
    """Bytes of the blocks that are copied more than once; the others only pass through the pages of their files."""
    if budget.is_resident:
        return 0
    return min(budget.num_blocks, budget.num_blocks - budget.num_slots + 1) * budget.num_experts * budget.slot_bytes
