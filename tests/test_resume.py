"""Runs that are stopped and go on: the video of the undisturbed run, whatever the step and the end it came to."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from reference.families import make_family, official_by_task
from safetensors.torch import load_file, save_file

import wanfast.commands as commands
import wanfast.run_state as run_state
from wanfast.__main__ import main
from wanfast.checkpoint.safetensors_format import safetensors_metadata
from wanfast.errors import MediaError
from wanfast.loaded import LoadedModel
from wanfast.run_state import RunKeeper, RunState, read_run
from wanfast.video import read_video

STEPS = 4
FLAGS = ["--size", "32x32", "--num-frames", "5", "--steps", str(STEPS), "--seed", "3", "--quiet"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return official_by_task(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_state, "KEEP_AFTER_SECONDS", 0.0)
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(tmp_path / "picture.png")


def line(model: Path, task: str = "t2v", output: str = "a.mp4", solver: str = "unipc") -> list[str]:
    image = [] if task == "t2v" else ["--image", "picture.png"]
    return ["generate", "a red ball", "--model", str(model), "--solver", solver, "-o", output, *image, *FLAGS]


def stop_after(num_steps: int, monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> None:
    """Let the run be interrupted once it has taken so many steps."""
    own = RunKeeper.update

    def update(self: RunKeeper, state: RunState) -> None:
        own(self, state)
        if state.next_step == num_steps:
            raise error or KeyboardInterrupt

    monkeypatch.setattr(RunKeeper, "update", update)


def names() -> set[str]:
    return {path.name for path in Path.cwd().iterdir()} - {"picture.png"}


@pytest.mark.parametrize("num_steps", range(1, STEPS + 1))
@pytest.mark.parametrize(
    ("task", "solver"), [("t2v", "unipc"), ("t2v", "dpmpp"), ("t2v", "euler"), ("i2v", "unipc"), ("ti2v", "unipc")]
)
def test_a_run_goes_on_after_any_step(
    task: str,
    solver: str,
    num_steps: int,
    models: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = models(task)
    assert main(line(model, task, "whole.mp4", solver)) == 0
    with monkeypatch.context() as stopped:
        stop_after(num_steps, stopped)
        assert main(line(model, task, "a.mp4", solver)) == 130
    assert f"`wanfast resume a.mp4.resume` goes on after step {num_steps} of {STEPS}" in capsys.readouterr().err
    assert names() == {"whole.mp4", "a.mp4.resume"}
    assert main(["resume", "a.mp4.resume", "--quiet"]) == 0
    assert capsys.readouterr().out.strip().endswith("a.mp4")
    assert names() == {"whole.mp4", "a.mp4"}
    assert Path("a.mp4").read_bytes() == Path("whole.mp4").read_bytes()


def test_a_run_can_be_stopped_again_and_again(models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(line(models("t2v"), output="whole.mp4")) == 0
    command = line(models("t2v"))
    for num_steps in range(1, STEPS + 1):
        with monkeypatch.context() as stopped:
            stop_after(num_steps, stopped)
            assert main(command) == 130
        command = ["resume", "a.mp4.resume", "--quiet"]
        assert read_run("a.mp4.resume").state.next_step == num_steps
    assert main(command) == 0
    assert torch.equal(read_video("a.mp4"), read_video("whole.mp4"))


def test_steps_that_are_done_are_not_taken_again(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **more: Any) -> None:
        for _ in arguments[1]:
            pass
        raise wanfast_error

    wanfast_error = MediaError("a.mp4: the disk is full")
    with monkeypatch.context() as broken:
        broken.setattr(commands, "write_video", failing)
        assert main(line(models("t2v"))) == 1
    asked: list[str] = []
    monkeypatch.setattr(LoadedModel, "expert", lambda self, name, loras=(): asked.append(name))
    monkeypatch.setattr(LoadedModel, "text_encoder", lambda self: asked.append("text"))
    assert main(["resume", "a.mp4.resume", "--quiet"]) == 0
    assert asked == [] and names() == {"a.mp4"}


def test_a_killed_run_goes_on(models: Callable[[str], Path]) -> None:
    assert main(line(models("t2v"), output="whole.mp4")) == 0
    code = f"""
import os, signal, sys
import torch
import wanfast.run_state as run_state
from wanfast.__main__ import main
torch.set_num_threads({torch.get_num_threads()})  # another number of them sums in another order
run_state.KEEP_AFTER_SECONDS = 0.0
own = run_state.RunKeeper.update
def update(self, state):
    own(self, state)
    if state.next_step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
run_state.RunKeeper.update = update
main({line(models("t2v"))!r})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert result.returncode == -9, result.stderr
    assert main(["resume", "a.mp4.resume", "--quiet"]) == 0
    assert torch.equal(read_video("a.mp4"), read_video("whole.mp4"))


def test_a_short_run_leaves_nothing(models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_state, "KEEP_AFTER_SECONDS", 10.0)
    stop_after(2, monkeypatch)
    assert main(line(models("t2v"))) == 130
    assert names() == set()


def test_a_stopped_run_is_not_lost_to_another(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as stopped:
        stop_after(2, stopped)
        main(line(models("t2v")))
    before = Path("a.mp4.resume").read_bytes()
    capsys.readouterr()
    assert main(line(models("t2v"))) == 2
    assert "output: must not have a stopped run beside it, got a.mp4.resume" in capsys.readouterr().err
    assert Path("a.mp4.resume").read_bytes() == before
    assert main(["resume", "a.mp4.resume", "-o", "b.mp4", "--quiet"]) == 0
    assert names() == {"b.mp4"}


def test_a_failure_of_the_file_does_not_stop_the_run(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_state, "write_run", full)
    assert main(line(models("t2v"))) == 0
    assert "a.mp4.resume: the run cannot be kept there (No space left on device)" in caplog.text
    assert names() == {"a.mp4"}


def test_a_run_is_found_through_a_link(stopped: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    assert main(["resume", str(tmp_path / "sub" / ".." / "link" / "a.mp4.resume"), "--quiet"]) == 0
    assert Path("a.mp4").exists() and not stopped.exists()


def test_a_model_that_has_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_family("t2v", tmp_path / "source").write_official(tmp_path / "source" / "model")
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        main(line(model))
    file = next((model / "low_noise_model").glob("*.safetensors"))
    state = load_file(file)
    save_file({name: tensor * 1.3 for name, tensor in state.items()}, file)
    capsys.readouterr()
    assert main(["resume", "a.mp4.resume", "--quiet"]) == 2
    assert f"model: must be as it was when the run was begun, got {file}" in capsys.readouterr().err
    assert Path("a.mp4.resume").exists()


def test_a_file_that_appears_meanwhile_is_kept(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = RunKeeper.update

    def update(self: RunKeeper, state: RunState) -> None:
        own(self, state)
        Path("a.mp4").write_text("precious")

    monkeypatch.setattr(RunKeeper, "update", update)
    assert main(line(models("t2v"))) == 0
    assert capsys.readouterr().out == f"{Path('a-2.mp4').absolute()}\n"
    assert Path("a.mp4").read_text() == "precious" and len(read_video("a-2.mp4")) == 5


def test_a_name_that_is_too_long_is_refused_in_a_line(
    models: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for length in (244, 251, 300):
        assert main(line(models("t2v"), output="x" * length + ".mp4")) in (0, 1, 2)
        assert "Traceback" not in capsys.readouterr().err


@pytest.fixture
def stopped(models: Callable[[str], Path]) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        stop_after(3, patched)
        main(line(models("t2v")))
    return Path("a.mp4.resume")


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    content = json.loads(safetensors_metadata(path)["wanfast_run"])
    change(tensors, content)
    save_file(tensors, path, metadata={"wanfast_run": json.dumps(content)})


CHANGES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "format": lambda tensors, content: content.update(format=2),
    "next_step": lambda tensors, content: content.update(next_step=-1),
    "next_step is text": lambda tensors, content: content.update(next_step="3"),
    "later than the last": lambda tensors, content: content.update(next_step=STEPS + 1),
    "sigmas": lambda tensors, content: content.update(sigmas=["x", 1.0]),
    "files": lambda tensors, content: content.update(files=[["a", "b"]]),
    "too many sigmas": lambda tensors, content: content.update(sigmas=[0.9, 0.8, 0.7]),
    "one sigma less": lambda tensors, content: content["sigmas"].pop(),
    "no settings": lambda tensors, content: content.pop("settings"),
    "no latents": lambda tensors, content: tensors.pop("latents"),
    "NaN": lambda tensors, content: tensors["history.latents"].fill_(torch.nan),
    "another shape": lambda tensors, content: tensors.update(latents=tensors["latents"][:, :, :1].clone()),
    "one of another shape": lambda t, content: t.update({"history.latents": t["history.latents"][..., :1].clone()}),
    "another dtype": lambda tensors, content: tensors.update(latents=tensors["latents"].half()),
    "settings": lambda tensors, content: content["settings"]["request"].update(seed=-4),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_damaged_run_is_refused(what: str, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewritten(stopped, CHANGES[what])
    capsys.readouterr()
    assert main(["resume", str(stopped), "--quiet"]) in (1, 2)
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and "Traceback" not in told
    assert stopped.name in told or "state: must be of this plan" in told
    assert stopped.exists() and not Path("a.mp4").exists()


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"{}"])
def test_what_is_no_run_is_refused(data: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.resume").write_bytes(data)
    assert main(["resume", "x.resume"]) == 1
    assert "x.resume" in capsys.readouterr().err
    assert main(["resume", "absent.resume"]) == 1
    save_file({"latents": torch.zeros(1)}, "y.resume")
    assert main(["resume", "y.resume"]) == 1
    assert "y.resume: is not a stopped run" in capsys.readouterr().err
