"""Engines that stand in for real ones in tests of the benchmark; a module of its own, so that a child can import it."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from wanfast.bench import engine, measure, worker
from wanfast.bench.engine import Made, Run, write_clip
from wanfast.bench.measure import Stopwatch
from wanfast.bench.worker import Answers, Loaded
from wanfast.errors import CheckpointError, MemoryBudgetError

FRAMES, HEIGHT, WIDTH = 5, 32, 48


def make_frames(seed: int = 0) -> np.ndarray:
    """A video with slopes and grain, far from 0 and 255, so that what is planted in it does not wrap."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    slopes = 60 + rows + columns
    grain = np.random.default_rng(seed).integers(0, 20, (FRAMES, HEIGHT, WIDTH, 3))
    return (slopes[None, :, :, None] + grain).astype(np.uint8)


class Clock:
    """Time that goes by when somebody sleeps; in place of the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def stop_time(patch: pytest.MonkeyPatch) -> Clock:
    """Let the benchmark's time be a clock's, and encoding take none."""
    clock = Clock()
    for module in (measure, engine, worker):
        patch.setattr(module, "time", clock)
    patch.setattr(engine, "write_video", lambda clip, chunks, **_: sum(len(chunk) for chunk in chunks))
    patch.setattr(StandIn, "clock", clock)
    patch.setattr(measure, "gc", SimpleNamespace(collect=lambda: 0))  # which looks at all that torch has
    return clock


@dataclass
class StandIn:
    """An engine that sleeps through its stages and gives prepared frames."""

    clock: ClassVar[Any] = time

    frames: np.ndarray = field(default_factory=make_frames)
    text: float = 0.0  # seconds
    steps: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    frame: float = 0.0  # seconds to decode one
    fails: str | None = (
        None  # on which question, and how: "load checkpoint", "run memory", "load bug"; each once, by commas
    )
    context: Tensor | None = None
    seen: list[Tensor | None] = field(default_factory=list)

    def load(self) -> None:
        self._fail("load")

    def run(self, watch: Stopwatch, noise: Tensor, context: Tensor | None, clip: Path) -> Made:
        self.seen.append(context)
        with watch.stage("text"):
            self.clock.sleep(self.text)
        watch.mark()
        for seconds in self.steps:
            self.clock.sleep(seconds)
            watch.mark()
        self._fail("run")
        frames = write_clip(watch, self._decoded(), clip, 16)
        return Made(frames=frames, context=self.context, copied_bytes=1000, stall_seconds=0.5)

    def step_aside(self) -> None:
        pass

    def _decoded(self) -> Iterator[Tensor]:
        for frame in torch.from_numpy(self.frames).split(1):
            self.clock.sleep(self.frame)
            yield frame

    def _fail(self, question: str) -> None:
        """Fail as told; of several failures each happens once, in their order."""
        failure, _, rest = (self.fails or "").partition(",")
        if not failure.startswith(question):
            return
        self.fails = rest
        raise_failure(failure.removeprefix(question).strip())


def raise_failure(failure: str) -> None:
    if failure == "checkpoint":
        raise CheckpointError("model.safetensors: is damaged")
    if failure == "memory":
        raise MemoryBudgetError("vram: too little")
    if failure == "cuda memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
    if failure == "bug":
        raise ZeroDivisionError("planted")
    os._exit(int(failure))


class InProcess:
    """A host of an engine in this process."""

    def __init__(self, stand_in: StandIn, folder: Path) -> None:
        self.answers = Answers(lambda: stand_in, torch.device("cpu"), folder / f"{id(self)}.mp4")
        self.asked: list[str] = []

    def load(self) -> Loaded:
        self.asked.append("load")
        loaded: Loaded = self.answers("load")
        return loaded

    def run(self, noise: Tensor, context: Tensor | None, *, keeps_frames: bool) -> Run:
        self.asked.append("run")
        run: Run = self.answers("run", noise, context, keeps_frames)
        return run

    def close(self) -> None:
        self.asked.append("close")
