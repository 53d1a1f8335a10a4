"""A run that was stopped: what the next step needs, in a file that holds the run's settings too.

The file is safetensors: the latents and what the solver remembers. Noise, prompts and picture are made again from the
settings, to the bit.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
import torch
from torch import Tensor

from wanfast.checkpoint.bind import read_tensor
from wanfast.checkpoint.reader import Reader, open_safetensors
from wanfast.checkpoint.safetensors_format import safetensors_metadata
from wanfast.errors import CheckpointError
from wanfast.solvers import History

KEEP_AFTER_SECONDS = 10.0  # what is lost at most; a shorter run is not worth a file

_log = logging.getLogger("wanfast")
_KEY, _FORMAT = "wanfast_run", 1
_FIELDS: dict[str, type] = {"next_step": int, "sigmas": list, "output": str, "settings": dict, "files": list}

FileMark: TypeAlias = tuple[str, int, int]  # path, bytes, time of its last change in nanoseconds


@dataclass(frozen=True, slots=True)
class RunState:
    """A run between two steps."""

    next_step: int  # index of the step to take; the number of steps when only decoding is left
    latents: Tensor  # [1, C, F, H, W], fp32
    history: History | None  # of the solver; None before the first step and after the last


def map_state(state: RunState, device: torch.device) -> RunState:
    """Bring a state to a device."""
    history = state.history
    if history is not None:
        predictions = tuple(x0.to(device) for x0 in history.predictions)
        history = History(predictions, history.sigmas, history.latents.to(device))
    return RunState(state.next_step, state.latents.to(device), history)


@dataclass(frozen=True, slots=True)
class StoredRun:
    """What a file of a stopped run holds."""

    state: RunState  # on the CPU
    settings: dict[str, Any]  # as a clip holds them
    output: str  # absolute path of the clip it was to become
    files: tuple[FileMark, ...]  # of the model, as they were


def write_run(
    file: Path, state: RunState, settings: dict[str, Any], output: Path, files: Sequence[FileMark] = ()
) -> None:
    """Write a stopped run; the file is replaced in one piece.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {"latents": state.latents}
    sigmas: tuple[float, ...] = ()
    if state.history is not None:
        sigmas = state.history.sigmas
        tensors["history.latents"] = state.history.latents
        tensors |= {f"history.predictions.{i}": x0 for i, x0 in enumerate(state.history.predictions)}
    content = {
        "format": _FORMAT,
        "next_step": state.next_step,
        "sigmas": sigmas,
        "output": str(output.absolute()),
        "settings": settings,
        "files": [list(mark) for mark in files],
    }
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(on_cpu, metadata={_KEY: json.dumps(content)})
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    finally:
        with suppress(OSError):
            part.unlink()


def read_run(file: str | Path) -> StoredRun:
    """Read a stopped run.

    Raises:
        CheckpointError: the file cannot be read, is none of these, or is damaged.
    """
    path = Path(file)
    reader, content = open_safetensors(path), _content(path)
    names = [f"history.predictions.{i}" for i in range(len(content["sigmas"]))]
    expected = {"latents", *names, *(["history.latents"] if names else [])}
    if reader.names() != expected:
        raise CheckpointError(
            f"{path}: holds {', '.join(sorted(reader.names()))}; expected {', '.join(sorted(expected))}"
        )
    shape = reader.shape("latents")
    tensors = {name: _latents(reader, name, shape) for name in expected}
    history = None
    if names:
        history = History(tuple(tensors[name] for name in names), tuple(content["sigmas"]), tensors["history.latents"])
    state = RunState(content["next_step"], tensors["latents"], history)
    files = tuple((str(path), int(size), int(time_ns)) for path, size, time_ns in content["files"])
    return StoredRun(state, content["settings"], content["output"], files)


def _content(path: Path) -> dict[str, Any]:
    text = safetensors_metadata(path).get(_KEY)
    try:
        content = json.loads(text or "null")
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: is not a stopped run of this wanfast; name the .resume file that it wrote")
    for name, kind in _FIELDS.items():
        if type(content.get(name)) is not kind:
            raise CheckpointError(f"{path}: its {name} is damaged; start the run anew")
    marks_are_right = all(
        isinstance(mark, list) and [type(part) for part in mark] == [str, int, int] for mark in content["files"]
    )
    sigmas = content["sigmas"]
    if content["next_step"] < 0 or len(sigmas) > 2 or not all(type(sigma) is float for sigma in sigmas):
        raise CheckpointError(f"{path}: its steps are damaged; start the run anew")
    if not marks_are_right:
        raise CheckpointError(f"{path}: its files are damaged; start the run anew")
    return content


def _latents(reader: Reader, name: str, shape: tuple[int, ...]) -> Tensor:
    if reader.dtype(name) != torch.float32 or len(shape) != 5:
        raise CheckpointError(f"{reader.where(name)} must be fp32 [1, C, F, H, W]; start the run anew")
    return read_tensor(reader, name, shape).clone()  # the file goes when the run is done


class RunKeeper:
    """Keeps a run on disk as it goes, so that at most some seconds of it can be lost."""

    def __init__(self, output: Path, settings: dict[str, Any], files: Sequence[FileMark] = ()) -> None:
        """Write nothing yet; the file is `<output>.resume`. `files` are the model's, as they are now."""
        self.file = resume_file(output)
        self._output = output
        self._settings = settings
        self._files = files
        self._kept_at = time.monotonic()
        self._state: RunState | None = None  # newer than the file

    def update(self, state: RunState) -> None:
        """Take the state after a step; it reaches the disk when the last one there is some seconds old."""
        self._state = map_state(state, torch.device("cpu"))  # a run that waits must not hold a device's memory
        if self._is_due():
            self._write(self._state)

    def stop(self) -> RunState | None:
        """Put the last state on the disk if the run is worth it; return what is there to go on from."""
        if self._state is not None and (os.path.exists(self.file) or self._is_due()):
            self._write(self._state)
        return self._state if os.path.exists(self.file) else None

    def finish(self) -> None:
        """Take the file away: the clip is there."""
        self._state = None
        with suppress(OSError):
            self.file.unlink()

    def _is_due(self) -> bool:
        return time.monotonic() - self._kept_at >= KEEP_AFTER_SECONDS

    def _write(self, state: RunState) -> None:
        try:
            write_run(self.file, state, self._settings, self._output, self._files)
        except OSError as error:  # the run itself is not harmed
            self._kept_at = math.inf  # it would fail again
            _log.warning("%s: the run cannot be kept there (%s)", self.file, error.strerror or error)
            return
        self._kept_at = time.monotonic()


def mark_files(readers: Iterable[Reader]) -> tuple[FileMark, ...]:
    """Note which files a model is in, and what they are like now."""
    files = sorted({reader.ref(name).file.absolute() for reader in readers for name in reader.names()})
    stats = [(file, file.stat()) for file in files if file.exists()]
    return tuple((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats)


def changed_file(marks: Iterable[FileMark], now: Iterable[FileMark]) -> str | None:
    """Name a file of a stopped run that has changed since; files that are elsewhere by now are not compared."""
    before = {path: rest for path, *rest in marks}
    return next((path for path, *rest in now if path in before and before[path] != rest), None)


def resume_file(output: Path) -> Path:
    """Where a stopped run is kept, by the clip it was to become."""
    return output.with_name(f"{output.name}.resume")
