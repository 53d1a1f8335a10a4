"""An engine in a child process: its answers, its errors under their own names, its death, and that it ends."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_engines import StandIn, make_frames

from wanfast.bench.worker import Worker
from wanfast.errors import CheckpointError, MemoryBudgetError

NOISE = torch.zeros(16, 2, 4, 6)


def worker(folder: Path, **options: object) -> Worker:
    return Worker("engine", partial(StandIn, **options), "cpu", 1, folder)


def test_a_childs_whole_life(tmp_path: Path) -> None:
    """One child, as each costs the import of torch: errors under their own names, answers, an end nobody asked for."""
    failures = "load checkpoint,load cuda memory,load bug,run 3"
    made = worker(tmp_path, text=0.05, steps=(0.0,), context=torch.ones(2, 3, 4), fails=failures)
    try:
        with pytest.raises(CheckpointError, match=r"^engine: model.safetensors: is damaged$"):
            made.load()
        with pytest.raises(MemoryBudgetError, match=r"engine: out of memory .CUDA out of memory. Tried to .* 2 GiB.$"):
            made.load()
        with pytest.raises(RuntimeError, match=r"(?s)engine: Traceback.*ZeroDivisionError: planted"):
            made.load()
        loaded = made.load()
        assert 0 <= loaded.seconds < 5 and loaded.ram_before is not None and loaded.ram_before > 10e6
        with pytest.raises(RuntimeError, match="engine: its process ended with exit code 3"):
            made.run(NOISE, None, keeps_frames=True)
    finally:
        made.close()


def test_a_child_does_what_is_asked_and_ends_by_itself(tmp_path: Path) -> None:
    made = worker(tmp_path, text=0.05, steps=(0.0,), context=torch.ones(2, 3, 4))
    try:
        made.load()
        run = made.run(NOISE, None, keeps_frames=True)
        again = made.run(NOISE, torch.zeros(2, 3, 4), keeps_frames=False)
        process = made._process
    finally:
        made.close()
    assert process.exitcode == 0
    assert run.frames is not None and (run.frames == make_frames()).all()
    assert again.frames is None and again.digest == run.digest
    assert 0.05 <= run.seconds["text"] <= run.seconds["total"]
    assert run.context is not None and torch.equal(run.context, torch.ones(2, 3, 4))
    assert (run.copied_bytes, run.stall_seconds) == (1000, 0.5)
    assert run.footprint.ram is not None and run.footprint.ram > 10e6
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_is_killed_is_told_as_out_of_memory(tmp_path: Path) -> None:
    made = worker(tmp_path)
    made._begin()
    os.kill(made._process.pid, signal.SIGKILL)
    try:
        with pytest.raises(MemoryBudgetError, match="engine: its process was killed, as the system does when memory"):
            made.load()
    finally:
        made.close()


def test_a_child_that_is_busy_is_not_waited_for(tmp_path: Path) -> None:
    made = worker(tmp_path)
    made._begin()
    process, made._is_busy = made._process, True  # as it is when a Ctrl-C ends the wait for an answer
    began = time.perf_counter()
    made.close()
    assert time.perf_counter() - began < 5
    assert process.exitcode == -signal.SIGTERM
