"""Conversions that are stopped, doubled or cannot be written: they go on, or leave everything as it was."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reference.families import make_family

from wanfast.__main__ import main
from wanfast.convert import convert_model
from wanfast.errors import CheckpointError, RequestError
from wanfast.model import open_model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return make_family("t2v", folder).write_official(folder / "model")


class Stopped(KeyboardInterrupt):
    pass


def stop_after(num_calls: int) -> Any:
    """A progress callback that interrupts."""
    calls = 0

    def told(name: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == num_calls:
            raise Stopped

    return told


@pytest.mark.parametrize("num_calls", [1, 2, 3, 4, 6, 8, 9, 10])
def test_an_interrupted_conversion_goes_on(num_calls: int, tmp_path: Path, tiny: Path) -> None:
    model, output = open_model(tiny), tmp_path / "ready"
    with pytest.raises(Stopped):
        convert_model(model, output, "int8", on_progress=stop_after(num_calls))
    assert not output.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "ready.partial").glob("*.safetensors")}
    convert_model(model, output, "int8")
    assert not (tmp_path / "ready.partial").exists()
    assert {name: (output / name).stat().st_mtime_ns for name in kept} == kept, "whole files are not written again"
    whole = convert_model(model, tmp_path / "whole", "int8")
    assert contents(output) == contents(whole)


def test_a_killed_process_leaves_what_the_next_one_needs(tmp_path: Path, tiny: Path) -> None:
    """SIGKILL in the middle of a file."""
    code = f"""
import os, signal
from wanfast.convert import convert_model
from wanfast.model import open_model
calls = 0
def told(name, done, total):
    global calls
    calls += 1
    if calls == 5:
        os.kill(os.getpid(), signal.SIGKILL)
convert_model(open_model({str(tiny)!r}), {str(tmp_path / "ready")!r}, "fp8", on_progress=told)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert result.returncode == -9, result.stderr
    assert not (tmp_path / "ready").exists()
    convert_model(open_model(tiny), tmp_path / "ready", "fp8")
    assert contents(tmp_path / "ready") == contents(convert_model(open_model(tiny), tmp_path / "whole", "fp8"))


def test_another_conversion_is_not_mixed_in(tmp_path: Path, tiny: Path) -> None:
    model, output = open_model(tiny), tmp_path / "ready"
    with pytest.raises(Stopped):
        convert_model(model, output, "int8", on_progress=stop_after(3))
    before = contents(tmp_path / "ready.partial")
    with pytest.raises(RequestError, match=r"output: .*ready\.partial"):
        convert_model(model, output, "fp8")
    assert contents(tmp_path / "ready.partial") == before


def test_changed_files_are_not_mixed_in(tmp_path: Path) -> None:
    folder = make_family("t2v", tmp_path).write_official(tmp_path / "model")
    with pytest.raises(Stopped):
        convert_model(open_model(folder), tmp_path / "ready", on_progress=stop_after(3))
    file = folder / "high_noise_model" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RequestError, match="unfinished folder of another conversion"):
        convert_model(open_model(folder), tmp_path / "ready")


def test_two_processes_do_not_write_at_once(tmp_path: Path, tiny: Path) -> None:
    """The one that comes second goes; what the first one writes is whole."""
    code = f"""
import sys, time
from wanfast.convert import convert_model
from wanfast.model import open_model
def told(name, done, total):
    print(name, flush=True)
    sys.stdin.readline()
convert_model(open_model({str(tiny)!r}), {str(tmp_path / "ready")!r}, "int8", on_progress=told)
"""
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdin is not None and first.stdout is not None
    try:
        assert first.stdout.readline() == "high_noise.safetensors\n"
        with pytest.raises(RequestError, match=r"ready\.partial, which another one is writing"):
            convert_model(open_model(tiny), tmp_path / "ready", "int8")
        first.communicate("\n" * 100, timeout=60)
    finally:
        first.kill()
    assert first.returncode == 0
    whole = convert_model(open_model(tiny), tmp_path / "whole", "int8")
    assert contents(tmp_path / "ready") == contents(whole)


def test_a_whole_folder_that_lacks_its_name_gets_it(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at the very end: nothing is written again."""
    with monkeypatch.context() as stopped:
        stopped.setattr(Path, "rename", lambda self, target: (_ for _ in ()).throw(Stopped()))
        with pytest.raises(Stopped):
            convert_model(open_model(tiny), tmp_path / "ready", "int8")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "ready.partial").glob("*.safetensors")}
    assert len(times) == 4
    folder = convert_model(open_model(tiny), tmp_path / "ready", "int8")
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")} == times
    assert open_model(folder).config.name == "t2v-A14B" and not (folder / "conversion.json").exists()


@pytest.mark.parametrize("name", ["a" * 250, "a" * 300, "dangling"])
def test_names_that_cannot_be(name: str, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "dangling").symlink_to("/nonexistent")
    with pytest.raises((RequestError, CheckpointError), match=name):
        convert_model(open_model(tiny), tmp_path / name)


@pytest.mark.parametrize("found", [b"\xff\xfe", b"{}"])
def test_a_foreign_unfinished_folder_is_kept(found: bytes, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "ready.partial").mkdir()
    (tmp_path / "ready.partial" / "conversion.json").write_bytes(found)
    with pytest.raises(RequestError, match="unfinished folder of another conversion"):
        convert_model(open_model(tiny), tmp_path / "ready")
    assert (tmp_path / "ready.partial" / "conversion.json").read_bytes() == found


def test_a_full_disk_is_told_in_a_line(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Path, *more: Any, **others: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", full)
        assert main(["convert", "--model", str(tiny), "-o", str(tmp_path / "ready"), "--quiet"]) == 1
    assert "ready.partial: cannot be written (No space left on device)" in capsys.readouterr().err
