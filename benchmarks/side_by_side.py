"""What every comparison needs: alternate rounds of two engines in one process, peak memory in a process for each.

Alternating means that a slow spell of the machine meets both alike. Memory is what the weights and one operation add
to a fresh process after its imports.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from wanfast.bench.measure import Meter, status_bytes

Operation = Callable[[], Any]

# Imported before memory is measured: what an import costs is not a model's memory.
MODULES = {
    "wanfast": ["wanfast.pipeline"],
    "whole": ["wanfast.pipeline"],
    "diffusers": ["diffusers.pipelines.wan.pipeline_wan", "diffusers.models.autoencoders.autoencoder_kl_wan"],
    "channels_last": ["diffusers.pipelines.wan.pipeline_wan", "diffusers.models.autoencoders.autoencoder_kl_wan"],
    "transformers": ["transformers.models.umt5.modeling_umt5"],
    "library": ["safetensors.torch", "gguf"],
}


def compare(
    benchmark: BenchmarkFixture,
    ours: Operation,
    theirs: Operation,
    *,
    peer: str,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Time `ours` with the peer's run before each round, and keep the ratios (above 1: ours is faster)."""
    peer_seconds: list[float] = []

    def time_peer() -> None:
        start = clock()
        theirs()
        peer_seconds.append(clock() - start)

    ours()
    theirs()
    benchmark.pedantic(ours, setup=time_peer, rounds=rounds)
    stats = benchmark.stats.stats
    benchmark.extra_info |= {
        f"{peer}_seconds": round(statistics.median(peer_seconds), 4),
        f"{peer}_seconds_over_ours": round(statistics.median(peer_seconds) / stats.median, 3),
        f"{peer}_fastest_over_our_fastest": round(min(peer_seconds) / stats.min, 3),
    }


def compare_memory(benchmark: BenchmarkFixture, script: str, *arguments: str, peer: str, is_held: bool = True) -> None:
    """Run `script` as a child once for each engine, keep the peak of each, and hold ours to the peer's if asked."""
    peaks = {engine: _child_peak(script, engine, *arguments) for engine in ("wanfast", peer)}
    benchmark.extra_info |= {"peak_mb": peaks["wanfast"], f"{peer}_peak_mb": peaks[peer]}
    assert not is_held or peaks["wanfast"] <= peaks[peer], peaks


def print_peak(engine: str, load: Callable[[], Operation]) -> None:
    """In the child: load, run once, and print the megabytes the two added at the run's peak."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    for module in MODULES[engine]:
        import_module(module)
    imported = status_bytes("VmRSS")
    operation, meter = load(), Meter(torch.device("cpu"))
    meter.start()  # forgets the peak of loading
    operation()
    peak = meter.stop().ram
    assert imported is not None and peak is not None, "no /proc to read"
    print((peak - imported) / 1.024e6)  # thousands of the kibibytes that the system tells


def _child_peak(script: str, *arguments: str) -> float:
    done = subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])
