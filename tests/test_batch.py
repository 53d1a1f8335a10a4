"""Many clips at once: each the same as alone, ordered by phase, and none lost to another's failure."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from reference.families import official_by_task
from safetensors.torch import load_file, save_file

import wanfast.batch as batch
import wanfast.batch_command as batch_command
import wanfast.run_state as run_state
from wanfast.__main__ import main
from wanfast.errors import MediaError, NumericsError
from wanfast.loaded import LoadedModel
from wanfast.run_state import RunKeeper, RunState
from wanfast.video import read_settings, read_video

FLAGS = ["--size", "32x32", "--num-frames", "5", "--steps", "4", "--quiet"]
PROMPTS = ["a red ball", "the cat jumps", "a blue box rolls"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return official_by_task(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for index in range(2):
        Image.linear_gradient("L").resize((32, 32)).rotate(90 * index).convert("RGB").save(tmp_path / f"p{index}.png")
    Path("prompts.txt").write_text("# three clips\n\n" + "\n".join(PROMPTS) + "\n")
    Path("clips").mkdir()
    return Path("clips")


def line(model: Path, *more: str, prompts: str = "prompts.txt") -> list[str]:
    return ["generate", "--prompts", prompts, "--model", str(model), "-o", "clips", *FLAGS, *more]


def jsonl(*lines: Any) -> None:
    Path("prompts.jsonl").write_text("\n".join(json.dumps(content) for content in lines))


@pytest.mark.parametrize("group_bytes", [1, 300_000, 10**9])
def test_each_clip_is_what_it_is_alone(
    group_bytes: int, models: Callable[[str], Path], clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "GROUP_BYTES", group_bytes)
    assert main(line(models("t2v"), "--seed", "5")) == 0
    names = ["0003-a-red-ball.mp4", "0004-the-cat-jumps.mp4", "0005-a-blue-box-rolls.mp4"]
    assert sorted(path.name for path in clips.iterdir()) == names
    for name, prompt in zip(names, PROMPTS, strict=True):
        alone = ["generate", prompt, "--model", str(models("t2v")), "-o", "alone.mp4", "--overwrite", "--seed", "5"]
        assert main([*alone, *FLAGS]) == 0
        assert (clips / name).read_bytes() == Path("alone.mp4").read_bytes()


@pytest.mark.parametrize("task", ["i2v", "ti2v"])
def test_lines_say_what_differs(task: str, models: Callable[[str], Path], clips: Path) -> None:
    jsonl(
        {"prompt": "a red ball", "image": "p0.png", "seed": 1, "output": "one.mp4"},
        {"prompt": "the cat", "image": "p1.png", "seed": 2, "num_frames": 9, "num_inference_steps": 2, "shift": 3.0},
    )
    assert main(line(models(task), prompts="prompts.jsonl")) == 0
    assert {path.name for path in clips.iterdir()} == {"one.mp4", "0002-the-cat.mp4"}
    assert len(read_video(clips / "0002-the-cat.mp4")) == 9
    alone = ["generate", "a red ball", "--image", "p0.png", "--model", str(models(task)), "-o", "alone.mp4"]
    assert main([*alone, "--seed", "1", *FLAGS]) == 0
    assert torch.equal(read_video(clips / "one.mp4"), read_video("alone.mp4"))
    assert main(["rerun", "clips/0002-the-cat.mp4", "-o", "again.mp4", "--quiet"]) == 0
    assert torch.equal(read_video("again.mp4"), read_video(clips / "0002-the-cat.mp4"))


def test_a_lora_is_in_every_clip(models: Callable[[str], Path], clips: Path) -> None:
    dim = load_file(next((models("t2v") / "low_noise_model").glob("*.safetensors")))["patch_embedding.bias"].numel()
    factors = {"lora_A.weight": torch.full((2, dim), 0.1), "lora_B.weight": torch.full((dim, 2), 0.1)}
    save_file({f"diffusion_model.blocks.0.self_attn.q.{name}": t for name, t in factors.items()}, "lora.safetensors")
    assert main(line(models("t2v"), "--seed", "5", "--lora", "lora.safetensors")) == 0
    alone = ["generate", PROMPTS[1], "--model", str(models("t2v")), "-o", "alone.mp4", "--seed", "5", *FLAGS]
    assert main([*alone, "--lora", "lora.safetensors"]) == 0
    with_lora = read_video("alone.mp4")
    assert torch.equal(read_video(clips / "0004-the-cat-jumps.mp4"), with_lora)
    assert main([*alone, "--overwrite"]) == 0
    assert not torch.equal(read_video("alone.mp4"), with_lora)


def test_weights_move_once_for_a_group(models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("expert", "text_encoder"):
        own = getattr(LoadedModel, name)

        def counted(self: LoadedModel, *more: Any, own: Any = own, **options: Any) -> Any:
            asked.append(more[0] if more else "text")
            return own(self, *more, **options)

        monkeypatch.setattr(LoadedModel, name, counted)
    assert main(line(models("t2v"), "--seed", "5")) == 0
    changes = [name for name, before in zip(asked, ["", *asked], strict=False) if name != before]
    assert changes == ["text", "high_noise", "low_noise"]
    assert len(asked) == 1 + 3 * 4


def test_a_clip_that_fails_leaves_the_others_alone(
    models: Callable[[str], Path], clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = batch.denoise

    def failing(model: LoadedModel, plan: Any, *arguments: Any, **more: Any) -> RunState:
        if plan.prompt == PROMPTS[1]:
            raise NumericsError("step 1 of 4: latents are not finite any more")
        return own(model, plan, *arguments, **more)

    monkeypatch.setattr(batch, "denoise", failing)
    assert main(line(models("t2v"), "--seed", "5")) == 1
    told = capsys.readouterr()
    assert "1 of 3 clips failed: line 4: step 1 of 4: latents are not finite" in told.err
    assert told.out.splitlines() == ["clips/0003-a-red-ball.mp4", "clips/0005-a-blue-box-rolls.mp4"]
    monkeypatch.undo()


def test_a_file_that_cannot_be_written_leaves_the_others_alone(
    models: Callable[[str], Path], clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = batch_command.encode_video

    def failing(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.name.startswith("0004"):
            raise MediaError(f"{path}: the disk is full")
        return own(path, *arguments, **more)

    with monkeypatch.context() as broken:
        broken.setattr(batch_command, "encode_video", failing)
        assert main(line(models("t2v"), "--json")) == 1
    results = json.loads(capsys.readouterr().out)
    assert [result["error"] is None for result in results] == [True, False, True]
    assert sorted(path.name[:4] for path in clips.glob("*.mp4")) == ["0003", "0005"]
    assert main(line(models("t2v"))) == 0
    assert len(list(clips.glob("*.mp4"))) == 3


@pytest.mark.parametrize("stop_at", [1, 2, 5, 7, 11])
def test_an_interrupted_batch_goes_on(
    stop_at: int,
    models: Callable[[str], Path],
    clips: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a seed of the user's: what was begun keeps the seed that was drawn for it."""
    monkeypatch.setattr(run_state, "KEEP_AFTER_SECONDS", 0.0)
    own, calls = RunKeeper.update, []

    def update(self: RunKeeper, state: RunState) -> None:
        own(self, state)
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(RunKeeper, "update", update)
        assert main(line(models("t2v"))) == 130
    assert "the same command goes on" in capsys.readouterr().err
    begun = {file.name: run_state.read_run(file) for file in clips.glob("*.resume")}
    assert begun
    calls.clear()
    with monkeypatch.context() as counted:
        counted.setattr(RunKeeper, "update", update)
        stop_at = 10**9
        capsys.readouterr()
        assert main(line(models("t2v"), "--json")) == 0
    for result in json.loads(capsys.readouterr().out):
        assert result["seed"] == read_settings(result["path"])["request"]["seed"]
    assert len(calls) == 3 * 4 - sum(run.state.next_step for run in begun.values())
    assert not list(clips.glob("*.resume"))
    for path in clips.glob("*.mp4"):
        settings = read_settings(path)
        if f"{path.name}.resume" in begun:
            assert settings["request"]["seed"] == begun[f"{path.name}.resume"].settings["request"]["seed"]
        assert main(["rerun", str(path), "-o", "again.mp4", "--overwrite", "--quiet"]) == 0
        assert torch.equal(read_video("again.mp4"), read_video(path))


def test_a_finished_batch_is_not_made_again(
    models: Callable[[str], Path], clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line(models("t2v"))) == 0
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in clips.iterdir()}
    with monkeypatch.context() as idle:
        idle.setattr(LoadedModel, "expert", None)
        capsys.readouterr()
        assert main(line(models("t2v"), "--json")) == 0
    assert [result["line"] for result in json.loads(capsys.readouterr().out)] == [3, 4, 5]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in clips.iterdir()} == before


@pytest.mark.parametrize("change", [["--steps", "3"], ["--seed", "1"], ["--negative-prompt", "x"]], ids=str)
def test_other_clips_of_the_same_names_are_kept(
    change: list[str], models: Callable[[str], Path], clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line(models("t2v"), "--seed", "4")) == 0
    before = {path: path.read_bytes() for path in clips.iterdir()}
    assert main(line(models("t2v"), "--seed", "4", *change)) == 2
    assert "output: must not hold other clips of these names" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in clips.iterdir()} == before
    assert main(line(models("t2v"), "--seed", "4", "--overwrite", *change)) == 0


def test_two_lines_cannot_have_one_name(
    models: Callable[[str], Path], clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonl({"prompt": "dog", "output": "0002-cat.mp4"}, "cat")
    assert main(line(models("t2v"), prompts="prompts.jsonl")) == 2
    assert (
        "prompts: must give each clip a name of its own, got 0002-cat.mp4 for lines 1 and 2" in capsys.readouterr().err
    )
    assert list(clips.iterdir()) == []


def test_frames_that_are_not_numbers_are_one_clips_fault(
    models: Callable[[str], Path], clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = batch.decode_frames

    def broken(model: LoadedModel, plan: Any, latents: torch.Tensor, *more: Any) -> Any:
        return own(model, plan, latents * torch.nan if plan.prompt == PROMPTS[1] else latents, *more)

    monkeypatch.setattr(batch, "decode_frames", broken)
    assert main(line(models("t2v"))) == 1
    assert "1 of 3 clips failed: line 4: frames: must be finite" in capsys.readouterr().err
    assert len(list(clips.glob("*.mp4"))) == 2


def test_two_batches_do_not_write_into_one_folder(
    models: Callable[[str], Path], clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys, time; from wanfast.locks import lock_file; f = open(sys.argv[1], 'a+b');"
    code += "print(lock_file(f), flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(clips / ".wanfast-batch.lock")], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"True\n"
        assert main(line(models("t2v"))) == 2
        assert "output: must be another folder while a batch is writing there" in capsys.readouterr().err
    finally:
        other.kill()
        other.wait()
    assert main(line(models("t2v"))) == 0
    assert {path.suffix for path in clips.iterdir()} == {".mp4"}


def test_a_file_that_appears_meanwhile_is_kept(
    models: Callable[[str], Path], clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = batch_command.generate_batch

    def making(*arguments: Any) -> Any:
        (clips / "0004-the-cat-jumps.mp4").write_text("precious")
        yield from own(*arguments)

    monkeypatch.setattr(batch_command, "generate_batch", making)
    assert main(line(models("t2v"))) == 0
    assert "clips/0004-the-cat-jumps-2.mp4" in capsys.readouterr().out
    assert (clips / "0004-the-cat-jumps.mp4").read_text() == "precious"


def test_a_stopped_batch_leaves_nothing_beside_finished_clips(
    models: Callable[[str], Path], clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_state, "KEEP_AFTER_SECONDS", 0.0)
    own, written = batch_command.encode_video, []

    def stopping(path: Path, *arguments: Any, **more: Any) -> Any:
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        return own(path, *arguments, **more)

    with monkeypatch.context() as stopped:
        stopped.setattr(batch_command, "encode_video", stopping)
        assert main(line(models("t2v"))) == 130
    assert [path.name for path in sorted(clips.glob("*.resume"))] == [f"{written[2].name}.resume"]
    assert main(line(models("t2v"))) == 0


BAD_LINES = {
    "": "must hold a prompt on at least one line",
    '{"prompt": "a"': "line 1: must be JSON",
    '"a"\n[1]': "line 2: must be text or an object",
    '{"seed": 1}': "line 1: must be text or an object with a prompt",
    '{"prompt": "a", "sead": 1}': "line 1: sead: is no argument",
    '{"prompt": "a", "seed": "1"}': "line 1: seed: must be a whole number",
    '{"prompt": "a", "seed": true}': "line 1: seed: must be a whole number",
    '{"prompt": "a", "num_frames": 6}': "line 1: num_frames",
    '{"prompt": "a", "output": "../a.mp4"}': "line 1: output: must be a file name",
    '{"prompt": "a", "output": "a.avi"}': "line 1: output: must be a file name",
    '{"prompt": "a", "output": "a.mp4"}\n{"prompt": "b", "output": "a.mp4"}': "name each output once",
    '{"prompt": "a", "image": "absent.png"}': "line 1: .*absent.png",
}


@pytest.mark.parametrize("content", BAD_LINES)
def test_a_bad_line_is_named_before_anything_is_made(
    content: str, models: Callable[[str], Path], clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("prompts.jsonl").write_text(content)
    assert main(line(models("ti2v"), prompts="prompts.jsonl")) in (1, 2)
    told = capsys.readouterr().err
    assert re.search(BAD_LINES[content], told), told
    assert len(told.splitlines()) == 1 and list(clips.iterdir()) == []


def test_arguments_that_do_not_go_together(models: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in [
        (line(models("t2v"), "--image", "p0.png"), "image: must be left out beside --prompts"),
        (line(models("t2v"), prompts="absent.txt"), "prompts: must be a text file"),
        (["generate", "--prompts", "prompts.txt", "--model", str(models("t2v")), "-o", "no"], "must be a folder"),
    ]:
        assert main(words) == 2
        assert told in capsys.readouterr().err
    for words in (["generate", "a", "--prompts", "prompts.txt"], ["plan", "--prompts", "prompts.txt"]):
        with pytest.raises(SystemExit):
            main(words)
        assert "prompts: must" in capsys.readouterr().err
