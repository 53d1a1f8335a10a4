"""An engine in a process of its own, so that its memory is its own and a death of it is not the benchmark's."""

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from wanfast import errors
from wanfast.bench.engine import Engine, Run, measured_run
from wanfast.bench.measure import status_bytes
from wanfast.errors import MemoryBudgetError

_ERRORS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}


@dataclass(frozen=True, slots=True)
class Loaded:
    """What opening the weights took."""

    seconds: float
    ram_before: int | None  # bytes resident before it: what imports cost


class Host(Protocol):
    """Who runs an engine for the benchmark."""

    def load(self) -> Loaded:
        """Open the engine's weights."""

    def run(self, noise: Tensor, context: Tensor | None, *, keeps_frames: bool) -> Run:
        """Make the video once."""

    def close(self) -> None:
        """End it; everything it holds goes."""


class Worker:
    """A host in a child process, begun when it is first asked for something."""

    def __init__(self, name: str, make: Callable[[], Engine], device: str, threads: int, folder: Path) -> None:
        """Begin nothing yet.

        Args:
            name: of the engine, for messages.
            make: makes the engine, in the child: a function or partial of a module.
            device: it computes on.
            threads: of the CPU that it may take.
            folder: for its clips, which do not stay.
        """
        self._name = name
        self._arguments = (make, device, threads, folder / f"{name.replace(' ', '-')}.mp4")
        self._process: Any = None
        self._connection: Connection | None = None
        self._is_busy = False

    def load(self) -> Loaded:
        """Open the engine's weights, in a process that has imported what it needs."""
        loaded: Loaded = self._ask("load")
        return loaded

    def run(self, noise: Tensor, context: Tensor | None, *, keeps_frames: bool) -> Run:
        """Make the video once.

        Raises:
            MemoryBudgetError: the process died as it does when the system is out of memory.
            RuntimeError: it failed in another way than wanfast's own errors; the message has the child's traceback.
        """
        made: Run = self._ask("run", noise, context, keeps_frames)
        return made

    def close(self) -> None:
        """End the process, whatever it is at."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            if not self._is_busy:  # it sees that nobody asks any more
                self._process.join(10)
            self._process.terminate()
            self._process.join(10)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self._process = self._connection = None

    def _ask(self, *question: Any) -> Any:
        if self._connection is None:
            self._begin()
        assert self._connection is not None
        self._is_busy = True
        try:
            self._connection.send(question)
            kind, answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode
            if code == -signal.SIGKILL:
                raise MemoryBudgetError(
                    f"{self._name}: its process was killed, as the system does when memory runs out; try a smaller size"
                ) from None
            raise RuntimeError(f"{self._name}: its process ended with exit code {code}") from None
        self._is_busy = False
        if kind == "done":
            return answer
        raise _ERRORS.get(kind, RuntimeError)(f"{self._name}: {answer}")

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit this process's memory and threads
        self._connection, theirs = context.Pipe()
        name = f"wanfast-bench {self._name}"
        self._process = context.Process(target=serve, args=(theirs, *self._arguments), daemon=True, name=name)
        self._process.start()
        theirs.close()


def serve(connection: Connection, make: Callable[[], Engine], device: str, threads: int, clip: Path) -> None:
    """Answer questions until the other end is closed: the child's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    torch.set_num_threads(threads)
    answer = Answers(make, torch.device(device), clip)
    while True:
        try:
            question = connection.recv()
        except (EOFError, OSError):
            return
        try:
            reply = ("done", answer(*question))
        except Exception as error:
            reply = _told(error)
        connection.send(reply)


class Answers:
    """Loads and runs one engine."""

    def __init__(self, make: Callable[[], Engine], device: torch.device, clip: Path) -> None:
        """Make nothing yet; `clip` is where videos are written, none of which stays."""
        self._make, self._device, self._clip = make, device, clip
        self._engine: Engine | None = None

    def __call__(self, question: str, *arguments: Any) -> Any:
        """Answer "load" or "run"."""
        if question == "load":
            self._engine = self._engine or self._make()
            resident, began = status_bytes("VmRSS"), time.perf_counter()
            self._engine.load()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            return Loaded(time.perf_counter() - began, resident)
        noise, context, keeps_frames = arguments
        assert self._engine is not None, "load comes first"
        return measured_run(self._engine, self._device, noise, context, self._clip, keeps_frames=keeps_frames)


def _told(error: Exception) -> tuple[str, str]:
    """An error as its kind and text, which any process can read."""
    if isinstance(error, torch.OutOfMemoryError):
        return "MemoryBudgetError", f"out of memory ({str(error).splitlines()[0]})"
    if type(error).__name__ in _ERRORS:
        return type(error).__name__, str(error)
    return "RuntimeError", "".join(traceback.format_exception(error))
