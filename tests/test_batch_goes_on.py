"""An interrupted batch goes on where the machine is another by then: other free memory, other places of files."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from reference import loras
from reference.families import make_family

import wanfast.pipeline as pipeline
import wanfast.run_state as run_state
from wanfast.__main__ import main
from wanfast.model import open_model
from wanfast.plan import Plan, Precision, Wish
from wanfast.precision import in_precision
from wanfast.run_state import RunKeeper, RunState
from wanfast.video import read_settings

FLAGS = ["--size", "32x32", "--num-frames", "1", "--steps", "4", "--seed", "3", "--quiet", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_family("t2v", folder).write_official(folder / "model")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_state, "KEEP_AFTER_SECONDS", 0.0)
    Path("prompts.txt").write_text("a red ball\nthe cat jumps\n")
    for folder in ("begun", "whole"):
        Path(folder).mkdir()
    yield


def line(model: Path, folder: str, *more: str) -> list[str]:
    return ["generate", "--prompts", "prompts.txt", "--model", str(model), "-o", folder, *FLAGS, *more]


def interrupted(words: list[str], stop_at: int = 3) -> int:
    """Run a command that is stopped as it keeps a state."""
    own, calls = RunKeeper.update, []

    def update(self: RunKeeper, state: RunState) -> None:
        own(self, state)
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as stopped:
        stopped.setattr(RunKeeper, "update", update)
        return main(words)


def with_memory_for(patched: pytest.MonkeyPatch, precision: Precision) -> None:
    """Let `auto` be fp32, or int8 for want of memory, as beside a GPU; a precision that is asked for stays."""

    def plan_here(model: object, plan: Plan, wish: Wish, loras: object) -> tuple[Plan, str | None]:
        is_free = wish.may_round and precision != plan.precision
        return (in_precision(model.config, plan, precision) if is_free else plan), "for this test"  # type: ignore[attr-defined]

    patched.setattr(pipeline, "wish_of_auto", lambda *_, **__: Wish("fp32", may_round=True))
    patched.setattr(pipeline, "plan_here", plan_here)


def clips(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.mp4"))}


@pytest.mark.parametrize(("begun_in", "later"), [("int8", "fp32"), ("fp32", "int8")])
def test_what_was_begun_keeps_its_precision(begun_in: Precision, later: Precision, model: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        with_memory_for(patched, begun_in)
        assert main(line(model, "whole")) == 0
        assert interrupted(line(model, "begun"), stop_at=6) == 130  # one whole or both begun
    kept = {file.name.removesuffix(".resume"): run_state.read_run(file) for file in Path("begun").glob("*.resume")}
    assert kept and all(run.settings["precision"] == begun_in for run in kept.values())
    with pytest.MonkeyPatch.context() as patched:
        with_memory_for(patched, later)
        assert main(line(model, "begun")) == 0
        assert main(line(model, "begun")) == 0, "what is there is known again"
    made, whole = clips("begun"), clips("whole")
    assert len(made) == 2 and all(made[name] == whole[name] for name in kept)
    assert all(read_settings(f"begun/{name}")["precision"] == begun_in for name in kept)


@pytest.mark.parametrize(("begun_in", "later"), [("int8", "fp32"), ("fp32", "int8")])
def test_a_clip_beside_those_of_another_precision_is_as_it_is_alone(
    begun_in: Precision, later: Precision, model: Path
) -> None:
    """Its prompt too is encoded in its own precision."""
    with pytest.MonkeyPatch.context() as patched:
        with_memory_for(patched, later)
        assert main(line(model, "whole")) == 0
    with pytest.MonkeyPatch.context() as patched:
        with_memory_for(patched, begun_in)
        assert interrupted(line(model, "begun"), stop_at=1) == 130  # the second has not begun
    with pytest.MonkeyPatch.context() as patched:
        with_memory_for(patched, later)
        assert main(line(model, "begun")) == 0
    second = "0002-the-cat-jumps.mp4"
    assert read_settings(f"begun/{second}")["precision"] == later
    assert clips("begun")[second] == clips("whole")[second]


def test_another_precision_that_is_asked_for_is_another_clip(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        with_memory_for(patched, "int8")
        assert interrupted(line(model, "begun")) == 130
    assert main(line(model, "begun", "--precision", "fp32")) == 2
    assert "must not hold other clips of these names" in capsys.readouterr().err
    assert main(line(model, "begun")) == 2, "on a CPU auto is fp32, whatever memory is free"


def test_a_lora_is_what_it_holds_wherever_it_is(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As those of a built-in model, whose place is that of the environment."""
    layers = loras.linear_layers(open_model(model).config.dit)
    first = loras.write_lora(Path("one.safetensors"), loras.random_factors(layers, rank=4, seed=1))
    assert main(line(model, "whole", "--lora", str(first))) == 0
    assert interrupted(line(model, "begun", "--lora", str(first))) == 130
    Path("elsewhere").mkdir()
    moved = shutil.move(first, "elsewhere/two.safetensors")
    assert main(line(model, "begun", "--lora", str(moved))) == 0
    made, whole = clips("begun"), clips("whole")
    assert made.keys() == whole.keys() and len(made) == 2
    assert main(["rerun", "begun/0001-a-red-ball.mp4", "--lora", str(moved), "-o", "again.mp4", "--quiet"]) == 0
    other = loras.write_lora(Path("three.safetensors"), loras.random_factors(layers, rank=4, seed=2))
    for words in (["--lora", str(other)], ["--lora", f"{moved}:0.5"], []):
        assert main(line(model, "begun", *words)) == 2
        assert "must not hold other clips of these names" in capsys.readouterr().err


def test_a_picture_is_what_it_holds_wherever_it_is(tmp_path_factory: pytest.TempPathFactory) -> None:
    from PIL import Image

    folder = tmp_path_factory.mktemp("i2v")
    model = make_family("i2v", folder).write_official(folder / "model")
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save("p.png")
    Path("prompts.jsonl").write_text(json.dumps({"prompt": "a red ball", "image": "p.png"}))
    words = ["generate", "--prompts", "prompts.jsonl", "--model", str(model), "-o", "begun", *FLAGS]
    assert interrupted(words, stop_at=2) == 130
    Path("pictures").mkdir()
    shutil.move("p.png", "pictures/q.png")
    Path("prompts.jsonl").write_text(json.dumps({"prompt": "a red ball", "image": "pictures/q.png"}))
    assert main(words) == 0
    assert len(clips("begun")) == 1
