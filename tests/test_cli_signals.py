"""Signals to the running program: it stops soon, says so in a line, and leaves nothing half-written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reference.families import make_family

from wanfast.__main__ import _interrupts_held_back


def test_ctrl_c_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "wanfast", "generate", "a ball", "--steps", "1000", "-o", "a.mp4"]
    line += ["--preview", "look.webp"]  # it appears with the first step
    process = subprocess.Popen(line, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "look.webp").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "cancelled" in err
    assert "Traceback" not in err
    assert {p.name for p in tmp_path.iterdir()} <= {"cache", "look.webp"}


def test_sigterm_while_decoding_leaves_nothing(tmp_path: Path) -> None:
    model = make_family("t2v", tmp_path / "source").write_official(tmp_path / "model")
    working = tmp_path / "working"
    working.mkdir()
    line = [sys.executable, "-m", "wanfast", "generate", "a ball", "--model", str(model), "-o", "a.mp4"]
    line += ["--size", "64x64", "--num-frames", "2001", "--steps", "1"]
    process = subprocess.Popen(line, cwd=working, stderr=subprocess.PIPE, text=True)
    try:
        deadline, seen = time.monotonic() + 60, 0
        while seen < 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
            seen = seen + 1 if list(working.glob(".a.mp4*")) else 0  # the probe of the place is gone at once
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert seen == 3
    assert process.returncode == 143
    assert "terminated" in err
    assert "Traceback" not in err
    assert list(working.iterdir()) == []


def test_a_reader_that_has_seen_enough_gets_no_traceback(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "wanfast", "plan", "a ball"]
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `head -0` does
    told = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert told == ""


def test_an_interrupt_during_the_imports_is_not_lost() -> None:
    """Some import swallows it: what the body does with the signal must not matter."""
    reached = []
    with pytest.raises(KeyboardInterrupt), _interrupts_held_back():
        signal.raise_signal(signal.SIGINT)
        reached.append("the end of the imports")
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with _interrupts_held_back():
        reached.append("no interrupt, no error")
