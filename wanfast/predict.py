"""How long a generation takes on a machine: its work at the machine's rates, its copies in the schedule that runs.

Computed rates are those of the card's datasheet, so the seconds are a bound from below: no kernel reaches the peak.
Rates that were measured give what was measured. Which of the two a prediction rests on, it says.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any, Literal

from wanfast.budget import Budget
from wanfast.config import ModelConfig
from wanfast.host_memory import Read, passes_of, reads_in_place, reads_of_moves
from wanfast.machines import Gpu
from wanfast.plan import Plan
from wanfast.residency.moves import Schedule, plan_moves
from wanfast.residency.timeline import Reading, simulate
from wanfast.vae.memory import VAEActivations, decode_activations, encode_activations
from wanfast.weight_sizes import WeightSizes

Source = Literal["computed", "measured"]


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does in a second."""

    dit_flops: float
    vae_flops: float
    link: float  # bytes from the host
    source: Source
    disk: float = math.inf  # bytes from files; infinite leaves reading out


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds and copies of one generation."""

    seconds: Mapping[str, float]  # by stage, in the order they run
    seconds_per_step: float  # of the steps but the first of each expert, on average
    stall: float  # seconds of the steps in which the device waits for a copy; part of them
    copied: int  # bytes of blocks of the diffusion transformers, host to device
    reading: float | None  # seconds of reading files, part of the others as far as it is waited for; None: left out
    switch_stall: float  # seconds the first step of the second expert waits
    source: Source
    dense: float | None  # seconds of the steps with dense attention, where it is sparse

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())


def datasheet_rates(gpu: Gpu, plan: Plan) -> Rates:
    """Take the rates of a card for a plan's precision; the VAE computes in 16 bits in all but fp32."""
    dit = {"fp32": gpu.flops_32, "exact": gpu.flops_16}.get(plan.precision, gpu.flops_8)
    vae = gpu.flops_32 if plan.precision == "fp32" else gpu.flops_16
    return Rates(dit, vae, gpu.link, "computed")


def predict(config: ModelConfig, plan: Plan, sizes: WeightSizes, budget: Budget, rates: Rates) -> Prediction:
    """Run a plan in time, with the moves that the residency makes and what its store reads for them.

    Args:
        config: the model.
        plan: of the generation.
        sizes: of the model's weights.
        budget: of the plan; it settles how many slots there are, and the room for blocks on the host.
        rates: of the machine.

    Returns:
        The prediction, of a run that begins with nothing in memory. Reading is in its seconds where `rates` has a rate
        for it; rounding what files hold to another dtype is not.
    """
    blocks = config.dit.num_layers
    passes = [(step.num_forwards if budget.chunking.in_turn else 1) for step in plan.steps]
    compute: list[float] = []
    lasts: list[int] = []  # the last access of each step
    for step, count in zip(plan.steps, passes, strict=True):
        seconds_each = plan.flops_of(step) / count / blocks / rates.dit_flops
        compute += [seconds_each] * (count * blocks)
        lasts.append(len(compute) - 1)
    schedule = _schedule(plan, budget)
    reads = _reads(plan, sizes, budget)
    waiting = [Reading(read.num_bytes / rates.disk, read.is_kept) for read in reads]
    if budget.is_in_place:  # each is read where it is used, and nothing is computed meanwhile
        compute = [seconds + reading.seconds for seconds, reading in zip(compute, waiting, strict=True)]
        waiting = []
    timeline = simulate(schedule, compute, [sizes.slot / rates.link] * len(schedule.moves), waiting)
    ends = [timeline.accesses[last].end for last in lasts]
    lasting = [end - start for start, end in zip([0.0, *ends], ends, strict=False)]
    firsts = _first_steps(plan)
    later = [seconds for index, seconds in enumerate(lasting) if index not in firsts] or lasting
    switch = max(firsts)
    seconds = {
        "text": config.text.num_layers * sizes.text_slot / rates.link,
        **({"picture": _encode_flops(config, plan, budget) / rates.vae_flops} if plan.image_size is not None else {}),
        "steps": timeline.seconds,
        "decode": _decode_flops(config, plan, budget) / rates.vae_flops,
    }
    return Prediction(
        seconds=seconds,
        seconds_per_step=sum(later) / len(later),
        stall=sum(timeline.stalls),
        copied=len(schedule.moves) * sizes.slot,
        reading=None if math.isinf(rates.disk) else sum(read.num_bytes for read in reads) / rates.disk,
        switch_stall=sum(timeline.stalls[lasts[switch - 1] + 1 : lasts[switch] + 1]) if switch else 0.0,
        source=rates.source,
        dense=None if plan.attention_density == 1 else _dense_seconds(config, plan, sizes, budget, rates),
    )


def _dense_seconds(config: ModelConfig, plan: Plan, sizes: WeightSizes, budget: Budget, rates: Rates) -> float:
    return predict(config, replace(plan, attention_density=1.0), sizes, budget, rates).seconds["steps"]


@dataclass(frozen=True, slots=True)
class FileReads:
    """How often blocks of the diffusion transformers are read from their files, in a run that begins with none."""

    loads: int
    num_bytes: int
    blocks: int  # there are; each of them once is the least
    loads_per_step: float  # of the steps but the first of each expert, on average
    bytes_per_step: float


def count_reads(plan: Plan, sizes: WeightSizes, budget: Budget) -> FileReads:
    """Count what a run reads from files, by its own order of uses, moves and host store."""
    reads = _reads(plan, sizes, budget)
    accesses = budget.num_blocks * sum(count for _, count in passes_of(plan, budget.chunking))
    uses: Sequence[int] = range(accesses)
    if not budget.is_in_place:
        uses = [move.first_use for move in _schedule(plan, budget).moves]
    passes = [(step.num_forwards if budget.chunking.in_turn else 1) for step in plan.steps]
    ends = list(accumulate(count * budget.num_blocks for count in passes))
    by_step = Counter(bisect_right(ends, use) for read, use in zip(reads, uses, strict=True) if read.num_bytes)
    later = [index for index in range(len(ends)) if index not in _first_steps(plan)] or [0]
    per_step = sum(by_step[index] for index in later) / len(later)
    return FileReads(
        loads=sum(by_step.values()),
        num_bytes=sum(read.num_bytes for read in reads),
        blocks=budget.num_experts * budget.num_blocks,
        loads_per_step=per_step,
        bytes_per_step=per_step * sizes.file_block,
    )


def reads_to_dict(reads: FileReads) -> dict[str, Any]:
    """Return the count as JSON-able values."""
    return asdict(reads) | {"source": "computed"}


def _first_steps(plan: Plan) -> set[int]:
    """The first step of each expert, which waits for its weights."""
    return {next(step.index for step in plan.steps if step.expert == name) for name in plan.steps_per_expert}


def _schedule(plan: Plan, budget: Budget) -> Schedule:
    accesses = [
        (expert, index)
        for expert, count in passes_of(plan, budget.chunking)
        for _ in range(count)
        for index in range(budget.num_blocks)
    ]
    return plan_moves(accesses, budget.num_slots)


def _reads(plan: Plan, sizes: WeightSizes, budget: Budget) -> tuple[Read, ...]:
    """What each move reads from files, or each use where blocks are used in place."""
    runs, blocks = passes_of(plan, budget.chunking), budget.num_blocks
    if budget.is_in_place:
        return reads_in_place(runs, blocks, block_bytes=sizes.slot, file_bytes=sizes.file_block, room=budget.host_room)
    return reads_of_moves(
        runs,
        blocks,
        budget.num_slots,
        block_bytes=sizes.slot,
        is_as_stored=sizes.is_as_stored,
        is_pinned=plan.device.startswith("cuda"),
        file_bytes=sizes.file_block,
        room=budget.host_room,
    )


def prediction_to_dict(prediction: Prediction) -> dict[str, Any]:
    """Return the prediction as JSON-able values, in seconds and bytes."""
    return {
        "source": prediction.source,
        "stages": dict(prediction.seconds),
        "per_step": prediction.seconds_per_step,
        "stall": prediction.stall,
        "switch_stall": prediction.switch_stall,
        "total": prediction.total,
        "steps_with_dense_attention": prediction.dense,
        "bytes_copied": prediction.copied,
        "reading": prediction.reading,
        "reading_source": "assumed",
    }


def decode_chunk_flops(config: ModelConfig, plan: Plan) -> int:
    """Count the FLOPs of decoding one latent frame after the first, the picture whole."""
    rows, columns = plan.latent_shape[2:]
    return decode_activations(config.vae, rows=rows, columns=columns, num_frames=2).chunk_flops


def _decode_flops(config: ModelConfig, plan: Plan, budget: Budget) -> int:
    frames, rows, columns = plan.latent_shape[1:]
    num_tiles = budget.tilings["decode"].num_tiles
    first, later = (
        decode_activations(config.vae, rows=rows, columns=columns, num_frames=count, num_tiles=num_tiles)
        for count in (1, 2)
    )
    return _chunks_flops(first, later, frames)


def _encode_flops(config: ModelConfig, plan: Plan, budget: Budget) -> int:
    frames = plan.latent_shape[1] if plan.task == "i2v" else 1
    num_tiles = budget.tilings["picture"].num_tiles
    first, later = (
        encode_activations(config.vae, height=plan.height, width=plan.width, num_frames=count, num_tiles=num_tiles)
        for count in (1, 2)
    )
    return _chunks_flops(first, later, frames)


def _chunks_flops(first: VAEActivations, later: VAEActivations, num_frames: int) -> int:
    return first.chunk_flops + (num_frames - 1) * later.chunk_flops
