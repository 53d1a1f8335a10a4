"""What this machine reached in earlier generations, so that a plan can say seconds from measurements.

Every generation notes how long its steps and its decoding took; a plan takes the median of the last few of the same
device and precision. Time in which the device waited for blocks is not in it: a plan adds that for the slots it has.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from wanfast.config import ModelConfig
from wanfast.machines import DISK
from wanfast.plan import Plan, Precision
from wanfast.predict import Rates, decode_chunk_flops
from wanfast.prompt_cache import cache_folder
from wanfast.version import __version__

KEPT = 5  # generations
MIN_SECONDS = 0.2  # of a step or a chunk: a tiny model, or a tiny video, says nothing about a large one

_SLOWEST, _FASTEST = 1e6, 1e18  # FLOP per second that anything could reach

OnProgress = Callable[[str, int, int], None]


@dataclass
class StageClock:
    """Passes progress on and notes when each part of a stage began."""

    progress: OnProgress | None = None
    idle: Callable[[], float] | None = None  # seconds the device has waited for blocks so far: the clock stands then
    times: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # stage -> (parts done, seconds)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take one report of progress."""
        idle = 0.0 if self.idle is None else self.idle()
        self.times.setdefault(stage, []).append((done, time.perf_counter() - idle))
        if self.progress is not None:
            self.progress(stage, done, total)

    def parts(self, stage: str) -> list[tuple[int, float]]:
        """Give each part of a stage that was seen from its begin to its end: how many were done before, seconds."""
        noted = self.times.get(stage, [])
        return [(first[0], second[1] - first[1]) for first, second in pairwise(noted) if second[0] > first[0]]


def rates_file() -> Path:
    """Where rates are kept, beside the encoded prompts."""
    return cache_folder().parent / "rates.json"


def note_rates(config: ModelConfig, plan: Plan, clock: StageClock) -> None:
    """Keep what a generation reached; a disk that cannot be written to is no error.

    Args:
        config: the model.
        plan: of the generation.
        clock: that went with it.
    """
    found = {"dit": _dit_rates(plan, clock), "vae": _vae_rates(config, plan, clock)}
    found = {kind: values for kind, values in found.items() if values}
    if not found:
        return
    with suppress(OSError, RuntimeError):
        known = _read()
        entry = known.setdefault(_key(config, plan.device, plan.precision), {})
        for kind, values in found.items():
            entry[kind] = [*entry.get(kind, []), statistics.median(values)][-KEPT:]
        _write(known)


def measured_rates(config: ModelConfig, device: str, precision: Precision, link: float) -> Rates | None:
    """Give what earlier generations reached here; None until there was one with steps and decoding.

    Args:
        config: the model.
        device: of the plan, "cpu" or "cuda:0".
        precision: of the plan.
        link: bytes per second from the host, which is not measured this way.
    """
    entry = _read().get(_key(config, device, precision), {})
    if not entry.get("dit") or not entry.get("vae"):
        return None
    dit, vae = statistics.median(entry["dit"]), statistics.median(entry["vae"])
    return Rates(dit, vae, link, "measured", disk=DISK)


def _dit_rates(plan: Plan, clock: StageClock) -> list[float]:
    """FLOP per second of the steps, but for the first of each expert, which may wait for its weights."""
    firsts = {next(step.index for step in plan.steps if step.expert == name) for name in plan.steps_per_expert}
    firsts |= {done for done, _ in clock.parts("steps")[:1]}  # also that of a resumed run
    rates = []
    for index, seconds in clock.parts("steps"):
        if index not in firsts and seconds > MIN_SECONDS:
            rates.append(plan.flops_of(plan.steps[index]) / seconds)
    return rates


def _vae_rates(config: ModelConfig, plan: Plan, clock: StageClock) -> list[float]:
    """FLOP per second of decoding all chunks but the first; nothing where pictures are decoded in strips."""
    chunks = [seconds for done, seconds in clock.parts("decode") if done > 0]
    if not chunks or len(chunks) != plan.latent_shape[1] - 1 or sum(chunks) <= len(chunks) * MIN_SECONDS:
        return []
    return [len(chunks) * decode_chunk_flops(config, plan) / sum(chunks)]


def _key(config: ModelConfig, device: str, precision: Precision) -> str:
    place = torch.device(device)
    is_gpu = place.type == "cuda" and torch.cuda.is_available()
    name = torch.cuda.get_device_name(place) if is_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    model = f"{config.name}, {config.dit.num_layers} blocks of {config.dit.dim}"
    return f"{name}, {model}, {precision}, wanfast {__version__}, torch {torch.__version__}"


def _read() -> dict[str, dict[str, list[float]]]:
    """Read what is known; what is damaged, or of another version, is measured anew."""
    try:
        known = json.loads(rates_file().read_text())
    except (OSError, ValueError, RecursionError, RuntimeError):  # the last where there is no home folder
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: {kind: _rates_in(entry, kind) for kind in ("dit", "vae")} for key, entry in known.items()}


def _rates_in(entry: object, kind: str) -> list[float]:
    values = entry.get(kind) if isinstance(entry, dict) else None
    if not isinstance(values, list):
        return []
    return [float(rate) for rate in values if isinstance(rate, float) and _SLOWEST < rate < _FASTEST]


def _write(known: dict[str, dict[str, list[float]]]) -> None:
    file = rates_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=file.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w") as stream:
            json.dump(known, stream, indent=1)
        Path(part).replace(file)
    except OSError:
        Path(part).unlink(missing_ok=True)
        raise
