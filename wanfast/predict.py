"""How long a generation takes on a machine: its work at the machine's rates, its copies in the schedule that runs.

Computed rates are those of the card's datasheet, so the seconds are a bound from below: no kernel reaches the peak.
Rates that were measured give what was measured. Which of the two a prediction rests on, it says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from wanfast.budget import Budget
from wanfast.config import ModelConfig
from wanfast.machines import Gpu
from wanfast.plan import Plan
from wanfast.residency.moves import Key, plan_moves
from wanfast.residency.timeline import simulate
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds and copies of one generation."""

    seconds: Mapping[str, float]  # by stage, in the order they run
    seconds_per_step: float  # of the steps but the first of each expert, on average
    stall: float  # seconds of the steps in which the device waits for a copy; part of them
    copied: int  # bytes of blocks of the diffusion transformers, host to device
    switch_stall: float  # seconds the first step of the second expert waits
    source: Source

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
    """Run a plan in time, with the moves that the residency makes.

    Args:
        config: the model.
        plan: of the generation.
        sizes: of the model's weights.
        budget: of the plan; it settles how many slots there are.
        rates: of the machine.

    Returns:
        The prediction. Reading files is not in it: blocks are taken to be in host memory.
    """
    blocks = config.dit.num_layers
    passes = [(step.num_forwards if budget.chunking.in_turn else 1) for step in plan.steps]
    accesses: list[Key] = []
    compute: list[float] = []
    lasts: list[int] = []  # the last access of each step
    for step, count in zip(plan.steps, passes, strict=True):
        seconds_each = step.num_forwards * plan.flops_per_forward / count / blocks / rates.dit_flops
        accesses += [(step.expert, index) for _ in range(count) for index in range(blocks)]
        compute += [seconds_each] * (count * blocks)
        lasts.append(len(accesses) - 1)
    schedule = plan_moves(accesses, budget.num_slots)
    timeline = simulate(schedule, compute, [sizes.slot / rates.link] * len(schedule.moves))
    ends = [timeline.accesses[last].end for last in lasts]
    lasting = [end - start for start, end in zip([0.0, *ends], ends, strict=False)]
    firsts = {next(step.index for step in plan.steps if step.expert == name) for name in plan.steps_per_expert}
    later = [seconds for index, seconds in enumerate(lasting) if index not in firsts] or lasting
    switch = max(firsts)
    text_blocks = config.text.num_layers * sizes.text_slot / rates.link
    seconds = {
        "text": text_blocks,
        **({"picture": _encode_flops(config, plan, budget) / rates.vae_flops} if plan.image_size is not None else {}),
        "steps": timeline.seconds,
        "decode": _decode_flops(config, plan, budget) / rates.vae_flops,
    }
    return Prediction(
        seconds=seconds,
        seconds_per_step=sum(later) / len(later),
        stall=sum(timeline.stalls),
        copied=len(schedule.moves) * sizes.slot,
        switch_stall=sum(timeline.stalls[lasts[switch - 1] + 1 : lasts[switch] + 1]) if switch else 0.0,
        source=rates.source,
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
        "bytes_copied": prediction.copied,
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
