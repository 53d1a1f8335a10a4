"""What weights that move cost on a GPU: steps streamed beside resident, the swap, the link, planned peaks, diffusers.

    python benchmarks/residency_gpu.py [--only steps,peaks,...] [--seconds 100] [--json run.json] [--small]

Weights are random, of A14B's shapes, and stand in no file: all blocks are copies of one that the GPU has drawn. A step
has as many blocks as the time allows, and says so; what a block costs does not depend on how many there are. Every
number is left as soon as it is there, a section that fails costs its own. `--small` runs all of it on a CPU, with a GPU
that is played: nothing of it says how fast anything is, but that it runs.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from played_gpu import play
from torch import Tensor

from wanfast.budget import DRIVER_BYTES, make_budget
from wanfast.checkpoint.reader import memory_reader
from wanfast.config import T2V_A14B, DiTConfig, ModelConfig
from wanfast.dit import packed
from wanfast.dit.memory import kept_text_bytes
from wanfast.dit.model import predict_velocities
from wanfast.dit.text import TextMemory
from wanfast.dit.weights import BlockWeights, OuterWeights, expected_tensors, is_fp32, load_block, load_outer
from wanfast.plan import Precision, make_plan
from wanfast.request import Request
from wanfast.residency import Residency, map_tensors, packed_bytes
from wanfast.residency.memory import named_tensors
from wanfast.weight_sizes import weight_sizes

TIMESTEP, GB = 611, 10**9
SIZES = {"480p": (832, 480), "720p": (1280, 720)}
LIMITS = (24, 16, 12, 8)  # GB
PEAK_BLOCKS = 3  # after which the peak of a step has been seen
HIGH, LOW = "high_noise", "low_noise"

Forward = Callable[[Iterator[Any]], Any]


@dataclass(frozen=True)
class Bench:
    """Where and how large."""

    device: torch.device  # of the tensors
    is_small: bool
    deadline: float  # of all of it, as time.monotonic counts
    config: ModelConfig
    results: Path | None = None
    entries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def place(self) -> torch.device:
        """Where the residency shall believe that it is."""
        return torch.device("cuda")

    def note(self, name: str, seconds: Sequence[float], **more: Any) -> None:
        """Leave one result, in the form of pytest-benchmark, which record.py reads."""
        times = sorted(seconds) or [0.0]
        stats = {"median": statistics.median(times), "min": times[0], "max": times[-1], "rounds": len(times)}
        stats["iqr"] = times[3 * len(times) // 4] - times[len(times) // 4]
        entry = {"name": name, "fullname": "benchmarks/residency_gpu.py", "stats": stats, "extra_info": more}
        self.entries.append(entry)
        if self.results is not None:
            run = {"commit_info": {"id": "unversioned"}, "machine_info": machine_info(), "benchmarks": self.entries}
            self.results.write_text(json.dumps(run))
        print(f"{name}: {stats['median']:.4g} s, {more}", flush=True)

    def settle(self) -> None:
        """Wait for all that was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Weights:
    """One block on the host, which stands for all, and what stands around the blocks on the device."""

    config: DiTConfig
    precision: Precision
    block: BlockWeights
    outer: OuterWeights
    block_bytes: int

    def load(self, expert: str, index: int) -> BlockWeights:
        """Give a block; pinned memory makes a copy of its own for each."""
        return self.block

    def residency(self, bench: Bench, blocks: int, slots: int) -> Residency[BlockWeights]:
        """Make a residency of so many blocks in so many slots."""
        budget = slots * self.block_bytes
        return Residency(self.load, blocks, bench.place, budget, slot_bytes=self.block_bytes)

    def ready(self, blocks: Iterator[Any]) -> Iterator[Any]:
        """Let blocks be what the arithmetic takes."""
        dtype = packed.DTYPES.get(self.precision)
        return blocks if dtype is None else map(partial(packed.pack_block, dtype=dtype), blocks)


def draw_weights(bench: Bench, precision: Precision) -> Weights:
    """Draw weights on the device; one block of them goes to the host."""
    config = bench.config.dit
    tensors = {
        name: torch.randn(shape, device=bench.device).mul_(0.02).to(torch.float32 if is_fp32(name) else torch.bfloat16)
        for name, shape in expected_tensors(config).items()
        if not name.startswith("blocks.") or name.startswith("blocks.0.")
    }
    reader = memory_reader(tensors)
    block = load_block(reader, config, 0, torch.bfloat16)
    if (dtype := packed.DTYPES.get(precision)) is not None:
        block = packed.prepare_block(block, dtype)
    block = map_tensors(block, lambda tensor: tensor.cpu())
    outer = map_tensors(load_outer(reader, config, torch.bfloat16), lambda tensor: tensor.to(bench.device))
    size = packed_bytes([tensor.nbytes for _, tensor in named_tensors(block)])
    return Weights(config, precision, block, outer, size)


def make_forward(bench: Bench, weights: Weights, size: str, *, blocks: int) -> Forward:
    """Make a step's work: both prompts through so many blocks, at a size of 81 frames."""
    config, width_height = replace(weights.config, num_layers=blocks), SIZES[size]
    frames = 2 if bench.is_small else 21
    rows, columns = (8, 8) if bench.is_small else (width_height[1] // 8, width_height[0] // 8)
    latents = torch.randn(1, config.in_channels, frames, rows, columns, device=bench.device)
    contexts = [torch.randn(1, config.text_len, config.text_dim, device=bench.device) for _ in range(2)]
    contexts = [context.bfloat16() for context in contexts]
    memory = TextMemory()
    return lambda given: predict_velocities(
        latents, TIMESTEP, contexts, weights.outer, weights.ready(given), config, text_memory=memory
    )


def pass_seconds(
    bench: Bench, residency: Residency[Any], experts: Sequence[str], work: Callable[[Iterator[Any]], Any]
) -> list[float]:
    """Seconds of each announced pass, by the device's own clock: nothing waits between them."""
    on_gpu = bench.device.type == "cuda"
    events: list[Any] = []

    def mark() -> None:
        if on_gpu:
            events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            events[-1].record()
        else:
            events.append(time.perf_counter())

    bench.settle()
    residency.begin(experts)
    mark()
    for expert in experts:
        work(residency.blocks(expert))
        mark()
    residency.end()
    bench.settle()
    pairs = pairwise(events)
    return [one.elapsed_time(other) / 1e3 if on_gpu else other - one for one, other in pairs]


def use_up(blocks: Iterator[Any]) -> None:
    """Ask for every block and compute nothing."""
    for _ in blocks:
        pass


def blocks_that_fit(bench: Bench, weights: Weights, size: str, *, passes: int, share: float) -> int:
    """How many blocks may be in a step, so that so many passes over them take no more than a share of the time left."""
    residency, forward = weights.residency(bench, 2, 2), make_forward(bench, weights, size, blocks=2)
    each = statistics.median(pass_seconds(bench, residency, [HIGH] * 3, forward)[1:]) / 2
    residency.release()
    left = max(bench.deadline - time.monotonic(), 0.0) * share
    return max(4, min(bench.config.dit.num_layers, int(left / (passes * each))))


def steps(bench: Bench) -> None:
    """Steps in two slots, at 480p also in four and half of the blocks, beside all of them resident; then the swap."""
    cases: list[tuple[Precision, str]] = [("int8", "480p"), ("int8", "720p"), ("exact", "480p"), ("exact", "720p")]
    for number, (precision, size) in enumerate(cases):
        if time.monotonic() > bench.deadline:
            print(f"step {precision} {size}: no time left", flush=True)
            continue
        weights, is_long = draw_weights(bench, precision), size == "720p"
        passes = 3 * (2 if is_long else 4) + 4
        blocks = blocks_that_fit(bench, weights, size, passes=passes, share=1 / (len(cases) - number))
        forward = make_forward(bench, weights, size, blocks=blocks)
        residency = weights.residency(bench, blocks, blocks)
        times: dict[int, list[float]] = {}
        for slots in dict.fromkeys((blocks, 2) if is_long else (blocks, 2, 4, blocks // 2)):
            residency.allow(slots * weights.block_bytes)
            times[slots] = pass_seconds(bench, residency, [HIGH] * 3, forward)[1:]  # the first one pins
        resident = statistics.median(times[blocks])
        for slots, seconds in times.items():
            name = "resident" if slots == blocks else f"{slots}-slots"
            over = round(statistics.median(seconds) / resident, 4)
            bench.note(f"step {precision} {size} {name}", seconds, over_resident=over, blocks=blocks, slots=slots)
        # The second expert takes the first one's slots, by way of the bounce buffers: it is copied once.
        residency.allow(blocks * weights.block_bytes)
        seconds = pass_seconds(bench, residency, [HIGH] * 2 + [LOW] * 2, forward)
        residency.release()
        over = round(seconds[2] / statistics.mean([seconds[1], seconds[3]]), 4)
        bench.note(f"switch step {precision} {size}", [seconds[2]], over_neighbours=over, blocks=blocks)
        del weights, forward, residency
        _clear(bench)


def link(bench: Bench) -> None:
    """Bytes per second of blocks that stream with nothing computed, beside a plain copy from pinned memory."""
    weights = draw_weights(bench, "int8")
    blocks = 4 if bench.is_small else 12
    residency = weights.residency(bench, blocks, 2)
    experts = [HIGH] * 4
    seconds = pass_seconds(bench, residency, experts, use_up)[1:]
    moved = residency.traffic.copied_bytes / len(experts)
    residency.release()
    host = torch.empty(weights.block_bytes, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
    target = torch.empty_like(host, device=bench.device)
    plain = []
    for _ in range(3):
        bench.settle()
        start = time.perf_counter()
        for _ in range(blocks):
            target.copy_(host, non_blocking=True)
        bench.settle()
        plain.append((time.perf_counter() - start) / blocks / weights.block_bytes)
    ours, theirs = moved / statistics.median(seconds), 1 / statistics.median(plain)
    bench.note(
        "link", seconds, gb_per_s=round(ours / GB, 2), plain=round(theirs / GB, 2), share=round(ours / theirs, 4)
    )


def peaks(bench: Bench) -> None:
    """The planned peak of the steps beside what the allocator saw, with no more memory than the plan was made for."""
    for limit in LIMITS:
        _clear(bench)
        fraction = (limit * GB - DRIVER_BYTES) / _memory(bench)
        if bench.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(min(1.0, fraction), bench.device)
        try:
            _peak(bench, limit)
        except (RuntimeError, MemoryError) as error:
            bench.note(f"peak int8 720p {limit} GB", [], error=str(error).splitlines()[0][:200])
        finally:
            if bench.device.type == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0, bench.device)


def _peak(bench: Bench, limit: int) -> None:
    sizes = weight_sizes(bench.config, "int8", "int8")
    asked = {"width": 64, "height": 64, "num_frames": 5} if bench.is_small else {"width": 1280, "height": 720}
    plan = make_plan(bench.config, Request("a", **asked), precision="int8", device="cuda")  # type: ignore[arg-type]
    budget = make_budget(bench.config, plan, sizes, vram=limit * GB)
    stage = next(stage for stage in budget.stages if stage.name.startswith("steps"))
    weights = draw_weights(bench, "int8")
    second = map_tensors(weights.outer, torch.clone)  # the other expert's, which is there too
    config = replace(weights.config, num_layers=PEAK_BLOCKS)
    residency = weights.residency(bench, budget.num_blocks, budget.num_slots)
    latents = torch.randn(1, *plan.latent_shape, device=bench.device)
    contexts = [torch.randn(1, config.text_len, config.text_dim, device=bench.device).bfloat16() for _ in range(2)]
    solver = torch.empty(5, *plan.latent_shape, device=bench.device)  # what a solver holds beside the latents
    memory = TextMemory(limit=budget.chunking.text_bytes)

    def forward(given: Sequence[Tensor]) -> list[Tensor]:
        blocks = weights.ready(islice(residency.blocks(HIGH), PEAK_BLOCKS))
        chunk = budget.chunking.tokens
        return predict_velocities(
            latents, TIMESTEP, given, weights.outer, blocks, config, text_memory=memory, chunk_tokens=chunk
        )

    start = time.perf_counter()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    residency.begin([HIGH] * 2 + [LOW] * 2)
    for given in [[one] for one in contexts] if budget.chunking.in_turn else [contexts]:
        forward(given)
    bench.settle()
    held = torch.cuda.max_memory_allocated(bench.device) if bench.device.type == "cuda" else 0
    count = partial(kept_text_bytes, num_contexts=2, itemsize=2, limit=budget.chunking.text_bytes)
    unseen = count(weights.config) - count(config)  # texts of the blocks that were left out
    planned = stage.total - DRIVER_BYTES - unseen
    residency.release()
    del second, solver
    bench.note(
        f"peak int8 720p {limit} GB",
        [time.perf_counter() - start],
        planned_gb=round(planned / GB, 3),
        measured_gb=round(held / GB, 3),
        measured_over_planned=round(held / planned, 4),
        slots=budget.num_slots,
        in_turn=budget.chunking.in_turn,
    )


def peers(bench: Bench) -> None:
    """A few blocks in bf16 at 480p: in two slots here, in diffusers all there, in groups, and moved as a whole."""
    weights, layers = draw_weights(bench, "exact"), 4
    forward = make_forward(bench, weights, "480p", blocks=layers)
    times: dict[str, list[float]] = {}
    for name, slots in (("wanfast resident", layers), ("wanfast 2 slots", 2)):
        residency = weights.residency(bench, layers, slots)
        times[name] = pass_seconds(bench, residency, [HIGH] * 4, forward)[1:]
        residency.release()
    del weights, forward
    _clear(bench)
    told: dict[str, Any] = {}
    try:
        from diffusers_steps import diffusers_seconds

        times |= diffusers_seconds(bench.config.dit, layers, bench.device, is_small=bench.is_small)
    except Exception as error:  # a library that is not here, or another version of it
        told["diffusers"] = f"did not run: {type(error).__name__}: {str(error).splitlines()[:1]}"
    for name, seconds in times.items():
        bench.note(f"few blocks bf16 480p, {name}", seconds, blocks=layers, **told)


def _memory(bench: Bench) -> int:
    return torch.cuda.get_device_properties(bench.device).total_memory if bench.device.type == "cuda" else 24 * GB


def _clear(bench: Bench) -> None:
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


SECTIONS: dict[str, Callable[[Bench], None]] = {"link": link, "steps": steps, "peaks": peaks, "peers": peers}


def small_model() -> ModelConfig:
    """A14B with few and narrow blocks."""
    dit = replace(T2V_A14B.dit, dim=256, ffn_dim=512, num_heads=2, num_layers=6, text_dim=64, text_len=32)
    return replace(T2V_A14B, dit=dit)


def machine_info() -> dict[str, Any]:
    """What was run on."""
    cpu = {"brand_raw": platform.processor(), "count": os.cpu_count(), "arch": platform.machine()}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"torch": torch.__version__, "python_version": platform.python_version()}
    return {"cpu": cpu, "gpu": name, "system": platform.system(), **versions}


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections; 1 where one has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--seconds", type=float, default=100, help="that all sections may take together, about")
    parser.add_argument("--json", type=Path, help="where results go, for record.py")
    parser.add_argument("--small", action="store_true", help="tiny shapes on a CPU, with a GPU that is played")
    arguments = parser.parse_args(argv)
    names, failed = arguments.only.split(","), []
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"only: must be of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    torch.manual_seed(0)
    if arguments.small:
        play()
    config = small_model() if arguments.small else T2V_A14B
    device, deadline = torch.device("cpu" if arguments.small else "cuda"), time.monotonic() + arguments.seconds
    bench = Bench(device, arguments.small, deadline, config, arguments.json)
    for name in names:
        try:
            SECTIONS[name](bench)
        except Exception:
            traceback.print_exc()
            failed.append(name)
        _clear(bench)
    print(f"failed: {', '.join(failed)}" if failed else "all sections ran")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
