"""Where every byte of a generation lives, stage by stage: settled from sizes alone.

A stage is a pass through the code between two releases of memory: text, picture, the steps, decoding. What is counted
is what torch is asked for, and a fixed share for the driver and its libraries; all of it is computed, none measured.
A GPU has memory of its own, and the host's beside it. A CPU has the host's alone: there all of it is in the stages.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from wanfast.config import ModelConfig
from wanfast.dit.chunking import CHUNKINGS, Chunking
from wanfast.dit.memory import (
    dit_activations,
    dit_activations_8bit,
    dit_activations_8bit_reference,
    kept_text_bytes,
)
from wanfast.host_memory import HOST_RESERVE_BYTES, around_kept, clip_bytes, kept_blocks, passes_of, pixel_bytes
from wanfast.kernels import choosing_bytes
from wanfast.plan import EIGHT_BIT, Plan
from wanfast.residency.residency import MIN_SLOTS
from wanfast.text.memory import text_activations
from wanfast.vae.memory import VAEActivations, decode_activations, encode_activations
from wanfast.vae.tiles import most_tiles
from wanfast.vae.weights import compute_dtype
from wanfast.weight_sizes import WeightSizes

DRIVER_BYTES = 600_000_000  # of a GPU: CUDA's context, loaded kernels, workspaces of cuBLAS
_FP32 = 4
_SOLVER_TENSORS = {1: 1, 2: 5}  # by steps: latents, and from the second step on what a solver goes by
_SOLVER_TENSORS_AT_MOST = 6  # latents, those before the step, velocities and a solver's history


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
    limit: int | None  # bytes of the device, which on a CPU is the host; None: not known
    num_slots: int  # equal slots for blocks of the diffusion transformers, at least 2
    num_blocks: int  # blocks of one expert
    num_experts: int  # that take steps
    slot_bytes: int
    stored: str  # the form of the blocks' projections
    chunking: Chunking  # of the steps
    is_in_place: bool = False  # on a CPU: blocks are used where they were read to, there are no slots
    is_as_stored: bool = True  # blocks are used as they lie in their files
    tilings: Mapping[str, Tiling] = field(default_factory=dict)  # by stage, of those in which a VAE works
    host: Mapping[str, int] = field(default_factory=dict)  # beside a GPU: what -> bytes of host memory
    host_limit: int | None = None
    host_room: int | None = None  # bytes of host memory for blocks, beside slots; None: as much as is useful
    host_missing: int = 0  # bytes of blocks that are used again and for which the host has no room
    clip_bytes: int = 0  # of a clip that waits for others, on the host
    slots_limit: int | None = None  # on a CPU: bytes that slots may take; None: as many as are useful

    @property
    def peak(self) -> Stage:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits_device(self) -> bool:
        """Whether every stage is within the limit."""
        return self.limit is None or self.peak.total <= self.limit

    @property
    def fits_host(self) -> bool:
        """Whether what a GPU needs of the host is there."""
        return self.host_limit is None or sum(self.host.values()) <= self.host_limit

    @property
    def fits_slots(self) -> bool:
        """Whether the fewest slots there can be are within what a CPU may take for them."""
        return self.slots_limit is None or self.num_slots * self.slot_bytes <= self.slots_limit

    @property
    def fits(self) -> bool:
        """Whether all of it is within the limits."""
        return self.fits_device and self.fits_host and self.fits_slots

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
        vram: bytes of the GPU; on a CPU bytes for blocks, in slots where that is less than an expert. None is as much
            as is useful.
        ram: bytes of the host; None is as much as is useful.

    Returns:
        The budget, which may not fit: `fits` says.
    """
    return (_beside_a_gpu if _on_gpu(plan) else _on_the_host)(config, plan, sizes, vram, ram)


def _beside_a_gpu(config: ModelConfig, plan: Plan, sizes: WeightSizes, vram: int | None, ram: int | None) -> Budget:
    experts, num_blocks = _experts(plan), config.dit.num_layers
    other = _standing(plan) | _carried(config, plan) | _around_blocks(plan, sizes, len(experts))
    steps, chunking = _steps_that_fit(config, plan, sizes, other, least=MIN_SLOTS * sizes.slot, limit=vram)
    wanted = num_blocks * len(experts)
    most = wanted if vram is None else slots_that_fit(vram, sum(steps.values()), sizes.slot, wanted)
    num_slots = max(MIN_SLOTS, num_blocks if num_blocks <= most < wanted else most)
    steps = {_slots_label(num_slots, num_blocks, len(experts)): num_slots * sizes.slot} | steps
    stages, tilings = _stages(config, plan, sizes, steps, vram)

    in_strips = tilings["decode"].num_tiles > 1
    host = around_kept(plan, slot=max(sizes.slot, sizes.text_slot), loading=sizes.loading, in_strips=in_strips)
    kept = kept_blocks(passes_of(plan, chunking), num_blocks, num_slots, is_as_stored=sizes.is_as_stored)
    room = None if ram is None else max(0, ram - sum(host.values()))
    most_kept, at_once = kept.most * sizes.slot, kept.at_once * sizes.slot
    host["blocks, kept to be copied"] = most_kept if room is None else min(room, most_kept)
    return Budget(
        stages=_without_zeros(stages),
        limit=vram,
        num_slots=num_slots,
        num_blocks=num_blocks,
        num_experts=len(experts),
        slot_bytes=sizes.slot,
        stored=sizes.stored,
        chunking=chunking,
        is_as_stored=sizes.is_as_stored,
        tilings=tilings,
        host={what: size for what, size in host.items() if size},
        host_limit=ram,
        host_room=room,
        host_missing=0 if room is None else max(0, at_once - room),
        clip_bytes=clip_bytes(plan),
    )


def _on_the_host(config: ModelConfig, plan: Plan, sizes: WeightSizes, vram: int | None, ram: int | None) -> Budget:
    """Place everything in the one memory that a CPU has."""
    experts, num_blocks = _experts(plan), config.dit.num_layers
    expert = num_blocks * sizes.slot
    is_in_place = vram is None or vram >= expert
    num_slots = num_blocks if vram is None or is_in_place else max(MIN_SLOTS, vram // sizes.slot)
    slots = 0 if is_in_place else num_slots * sizes.slot
    made = MIN_SLOTS * sizes.slot  # the block in use, and the next one while it is read or made
    if sizes.is_as_stored and not is_in_place:
        made = sizes.slot  # while it is checked, before its first copy
    other = _standing(plan) | _carried(config, plan) | _around_blocks(plan, sizes, 1)
    steps, chunking = _steps_that_fit(config, plan, sizes, other, least=slots + made, limit=ram)
    stages, tilings = _stages(config, plan, sizes, steps, None if ram is None else ram - slots)

    kept = kept_blocks(passes_of(plan, chunking), num_blocks, num_slots, is_as_stored=sizes.is_as_stored)
    useful = expert if is_in_place else kept.most * sizes.slot
    needed = expert if is_in_place else kept.at_once * sizes.slot
    if sizes.is_as_stored and not is_in_place:  # read into the slots, again for each copy
        useful = needed = 0
    room = None if ram is None else max(0, ram - slots - max(stage.total for stage in stages))
    if useful and (room is None or room >= useful):
        held, made = useful, 0
    else:  # what is not kept is read, or made, for each use
        room = None if room is None else max(0, min(room, (ram or 0) - slots - made - sum(steps.values())))
        held = 0 if not useful or room is None else room // sizes.slot * sizes.slot
    what = "blocks of an expert" if is_in_place else "blocks, kept to be copied"
    in_steps = {"blocks that are being read or made": made}
    staying = {what: held, _slots_label(num_slots, num_blocks, len(experts)): slots}
    placed = [
        Stage(stage.name, dict(stage.items) | staying | (in_steps if stage.name.startswith("steps") else {}))
        for stage in stages
    ]
    return Budget(
        stages=_without_zeros(placed),
        limit=ram,
        num_slots=num_slots,
        num_blocks=num_blocks,
        num_experts=len(experts),
        slot_bytes=sizes.slot,
        stored=sizes.stored,
        chunking=chunking,
        is_in_place=is_in_place,
        is_as_stored=sizes.is_as_stored,
        tilings=tilings,
        host_room=room,
        host_missing=max(0, needed - held),
        clip_bytes=clip_bytes(plan),
        slots_limit=None if is_in_place else vram,
    )


def _stages(
    config: ModelConfig, plan: Plan, sizes: WeightSizes, steps: Mapping[str, int], limit: int | None
) -> tuple[list[Stage], dict[str, Tiling]]:
    """List the stages in their order; a VAE takes the picture in as few strips as fit."""
    carried = _standing(plan) | _carried(config, plan)
    stages, tilings = [Stage("text", _text_items(config, plan, sizes))], {}
    if plan.image_size is not None:
        items, tilings["picture"] = _fewest_tiles(
            plan, lambda n: carried | _picture_items(config, plan, sizes, n), limit
        )
        stages.append(Stage("picture", items))
    stages.append(Stage(f"steps ({', '.join(_experts(plan))})", steps))
    items, tilings["decode"] = _fewest_tiles(plan, lambda n: _decode_items(config, plan, sizes, n), limit)
    stages.append(Stage("decode", items))
    return stages, tilings


def _without_zeros(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    return tuple(Stage(stage.name, {what: size for what, size in stage.items.items() if size}) for stage in stages)


def _experts(plan: Plan) -> tuple[str, ...]:
    return tuple(dict.fromkeys(step.expert for step in plan.steps))


def _steps_that_fit(
    config: ModelConfig, plan: Plan, sizes: WeightSizes, other: Mapping[str, int], *, least: int, limit: int | None
) -> tuple[dict[str, int], Chunking]:
    """Cut the steps as little as leaves `least` bytes for blocks, or as finely as they can be cut."""
    for chunking in CHUNKINGS:
        items = dict(other) | _step_items(config, plan, chunking, sizes)
        if limit is None or sum(items.values()) + least <= limit:
            break
    return items, chunking


def _on_gpu(plan: Plan) -> bool:
    return plan.device.startswith("cuda")


def _itemsize(plan: Plan) -> int:
    return 4 if plan.precision == "fp32" else 2


def _standing(plan: Plan) -> dict[str, int]:
    """What is not this generation's, in every stage."""
    return {"driver and libraries": DRIVER_BYTES} if _on_gpu(plan) else {"left to the system": HOST_RESERVE_BYTES}


def _text_items(config: ModelConfig, plan: Plan, sizes: WeightSizes) -> dict[str, int]:
    num_tokens = config.dit.text_len
    activations = text_activations(config.text, num_tokens=num_tokens, num_prompts=2, itemsize=_itemsize(plan))
    blocks = {"two blocks of the encoder": MIN_SLOTS * sizes.text_slot}
    return _standing(plan) | blocks | {"activations": activations}


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


def _picture_items(config: ModelConfig, plan: Plan, sizes: WeightSizes, num_tiles: int) -> dict[str, int]:
    itemsize = _vae_itemsize(plan)
    activations = encode_activations(
        config.vae,
        height=plan.height,
        width=plan.width,
        num_frames=_encoded(plan),
        is_joined=_on_gpu(plan) and itemsize == _FP32,
        num_tiles=num_tiles,
        itemsize=itemsize,
    )
    return {"VAE encoder": sizes.vae_encoder * itemsize // _FP32} | _vae_items(activations)


def _vae_itemsize(plan: Plan) -> int:
    return compute_dtype(plan.precision, plan.device).itemsize


def _around_blocks(plan: Plan, sizes: WeightSizes, num_experts: int) -> dict[str, int]:
    """What stands around the blocks; a GPU has it of every expert, so that the swap waits for nothing."""
    return {"weights around the blocks": sizes.outer * (num_experts if _on_gpu(plan) else 1), "LoRAs": sizes.loras}


def _decode_items(config: ModelConfig, plan: Plan, sizes: WeightSizes, num_tiles: int) -> dict[str, int]:
    _, num_frames, rows, columns = plan.latent_shape
    itemsize = _vae_itemsize(plan)
    size = {"rows": rows, "columns": columns, "num_frames": num_frames, "num_tiles": num_tiles, "itemsize": itemsize}
    activations = decode_activations(config.vae, is_joined=_on_gpu(plan) and itemsize == _FP32, **size)
    weights = {"latents": _latent_bytes(plan), "VAE decoder": sizes.vae_decoder * itemsize // _FP32}
    waiting = {} if _on_gpu(plan) or num_tiles == 1 else {"pixels of strips": pixel_bytes(plan)}
    return _standing(plan) | weights | _vae_items(activations) | waiting


def _carried(config: ModelConfig, plan: Plan) -> dict[str, int]:
    """What stays from one stage to the next."""
    contexts = 2 * config.dit.text_len * config.dit.text_dim * _itemsize(plan)
    latents = _latent_bytes(plan)
    condition = 0
    if plan.image_size is not None:
        per_channel = latents // plan.latent_shape[0]
        is_whole = plan.task == "i2v"
        condition = (config.dit.in_channels - config.dit.out_channels) * per_channel if is_whole else latents
    tensors = _SOLVER_TENSORS.get(len(plan.steps), _SOLVER_TENSORS_AT_MOST)
    return {"encoded prompts": contexts, "latents and solver": tensors * latents, "picture": condition}


def _step_items(config: ModelConfig, plan: Plan, chunking: Chunking, sizes: WeightSizes) -> dict[str, int]:
    num_contexts, itemsize = max(step.num_forwards for step in plan.steps), _itemsize(plan)
    kept = kept_text_bytes(config.dit, num_contexts=num_contexts, itemsize=itemsize, limit=chunking.text_bytes)
    count: Callable[..., dict[str, int]] = partial(dit_activations, itemsize=itemsize)
    if plan.precision in EIGHT_BIT:
        on_a_cpu = partial(dit_activations_8bit_reference, is_int8=plan.precision == "int8")
        count = partial(dit_activations_8bit, device=plan.device) if _on_gpu(plan) else on_a_cpu
    items = {"keys and values of the text": kept}
    if plan.attention_density < 1:
        sizes_of_heads = {"heads": config.dit.num_heads, "head_dim": config.dit.head_dim}
        items["lists of blocks"] = choosing_bytes(
            **sizes_of_heads, tokens=plan.num_tokens, density=plan.attention_density
        )
    return items | count(
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


def _slots_label(num_slots: int, num_blocks: int, num_experts: int) -> str:
    if num_slots >= num_blocks * num_experts and num_experts > 1:
        return "blocks of both experts"
    if num_slots >= num_blocks:
        return f"all {num_blocks} blocks of an expert"
    return f"{num_slots} slots for {num_blocks} blocks"
