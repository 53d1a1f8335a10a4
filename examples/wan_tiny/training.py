"""What both trainings share: a loop that can be paused, stopped and resumed, its checkpoints and its log."""

import csv
import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SAVE_SECONDS = 180.0
LOG_STEPS = 20
INTERRUPTED = 3  # exit status of a training that has steps left
PAUSE = "PAUSE"  # while a file of this name lies in the run's folder, training waits


class Run:
    """One training in a folder: `NAME.pt` is its newest checkpoint, `NAME.csv` its log."""

    def __init__(self, folder: Path, name: str, state: Mapping[str, Any]) -> None:
        """Take the training up where it stopped.

        Args:
            folder: of all trainings of a model; made if missing.
            name: of this one.
            state: objects with state_dict and load_state_dict, by name; loaded from the checkpoint if there is one.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / f"{name}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{folder}: another process is training {name} there")
        self.folder, self.path, self.log_path = folder, folder / f"{name}.pt", folder / f"{name}.csv"
        self._state = state
        self.step = 0
        self._sums: dict[str, float] = {}
        self._num_summed = 0  # fewer than LOG_STEPS after a fresh start
        self._is_stopping = False
        self.seconds = 0.0  # of computing, over all pieces
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            self.step, self.seconds = saved["step"], saved["seconds"]
            for key, part in state.items():
                part.load_state_dict(saved[key])
        self._drop_log_after(self.step)

    def train(self, num_steps: int, take_step: Callable[[int], Mapping[str, float]]) -> bool:
        """Take steps until `num_steps` are done or the process is told to end (SIGTERM, SIGINT).

        Args:
            num_steps: of the whole training.
            take_step: called with the number of the step, from 0; returns what to log.

        Returns:
            Whether the training is complete. Either way the last step is in the checkpoint.
        """
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        saved_at = time.monotonic()
        while self.step < num_steps and not self._is_stopping:
            wait_while_paused(self.folder, lambda: self._is_stopping)
            start = time.monotonic()
            values = take_step(self.step)
            self.seconds += time.monotonic() - start
            self.step += 1
            self._log(values)
            if time.monotonic() - saved_at > SAVE_SECONDS:
                self._save()
                saved_at = time.monotonic()
        self._save()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        self._lock.close()
        return self.step >= num_steps

    def _stop(self, *_: object) -> None:
        self._is_stopping = True

    def _save(self) -> None:
        content = {key: part.state_dict() for key, part in self._state.items()}
        temporary = self.path.with_suffix(".pt.part")
        torch.save(content | {"step": self.step, "seconds": self.seconds}, temporary)
        os.replace(temporary, self.path)

    def _log(self, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._num_summed += 1
        if self.step % LOG_STEPS:
            return
        row = {"step": str(self.step), "seconds": f"{self.seconds:.0f}"}
        row |= {key: f"{value / self._num_summed:.6g}" for key, value in self._sums.items()}
        is_new = not self.log_path.exists()
        with self.log_path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row.keys())
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        self._sums.clear()
        self._num_summed = 0

    def _drop_log_after(self, step: int) -> None:
        """Rows written after the checkpoint are of steps that will be taken again."""
        if not self.log_path.exists():
            return
        header, *rows = self.log_path.read_text().splitlines(keepends=True)
        kept = [row for row in rows if row.endswith("\n") and int(row.split(",", 1)[0]) <= step]
        if not kept:
            self.log_path.unlink()
        elif kept != rows:
            self.log_path.write_text("".join([header, *kept]))


def wait_while_paused(folder: Path, is_stopping: Callable[[], bool] = bool) -> None:
    """Wait as long as a file PAUSE lies in the run's folder."""
    while (folder / PAUSE).exists() and not is_stopping():
        time.sleep(2)


class Average:
    """An exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        self.values = {name: value.detach().clone() for name, value in module.named_parameters()}

    def update(self, step: int) -> None:
        """Take the parameters after a step in; early steps weigh more, so that the start is soon forgotten."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        for name, value in self._module.named_parameters():
            self.values[name].lerp_(value.detach(), weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, by parameter name."""
        return self.values

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved averages."""
        for name, value in state.items():
            self.values[name].copy_(value)


def learning_rate(step: int, num_steps: int, warmup: int = 30) -> float:
    """Fraction of the peak rate: a short rise, then a straight fall to nothing."""
    return min((step + 1) / warmup, 1.0) * (1 - step / num_steps)
