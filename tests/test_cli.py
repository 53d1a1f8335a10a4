"""The command line as a user meets it: what it prints where, its exit codes, and that mistakes leave nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from reference.families import make_family

from wanfast.__main__ import main
from wanfast.video import probe_video, read_settings, read_video

SMALL = ["--size", "32x32", "--num-frames", "5", "--steps", "3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small official checkpoint per task."""
    made = {}
    for task in ("t2v", "i2v", "ti2v"):
        folder = tmp_path_factory.mktemp(task)
        made[task] = make_family(task, folder).write_official(folder / "model", shards=2)
    return made


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: object) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_generate_prints_the_path_alone(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "a red ball", "--model", folders["t2v"], *SMALL, "--seed", 1, "-o", "clip.mp4") == 0
    out, err = capsys.readouterr()
    assert out == "clip.mp4\n"
    assert "seed 1" in err
    assert [p.name for p in Path().iterdir()] == ["clip.mp4"]
    clip = probe_video("clip.mp4")
    assert (clip["frames"], clip["width"], clip["height"], clip["fps"]) == (5, 32, 32, 16)


def test_without_a_model_the_tiny_one_is_made_and_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run("generate", "a red circle moves left", "--seed", 0, *SMALL, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["model"] == "wan-tiny"
    assert result["seed"] == 0
    assert set(result["seconds"]) == {"text", "steps", "decode", "total"}
    assert Path(result["path"]).stat().st_size > 0
    assert [p.name for p in (tmp_path / "cache" / "wanfast").iterdir()] == ["wan-tiny-r1"]


def test_rerun_repeats_the_same_frames(folders: dict[str, Path]) -> None:
    assert run("generate", "a ball", "--model", folders["t2v"], *SMALL, "--guidance-low", 2.5, "-o", "a.mp4") == 0
    assert run("rerun", "a.mp4", "-o", "b.mp4") == 0
    assert torch.equal(torch.as_tensor(read_video("a.mp4")), torch.as_tensor(read_video("b.mp4")))
    assert read_settings("a.mp4")["request"] == read_settings("b.mp4")["request"]
    assert read_settings("a.mp4")["request"]["guidance_low"] == 2.5


def test_rerun_of_image_to_video_notices_another_picture(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 30), "red").save("a.png")
    assert run("generate", "a ball", "--model", folders["i2v"], "--image", "a.png", *SMALL, "-o", "a.mp4") == 0
    assert run("rerun", "a.mp4") == 0
    assert torch.equal(torch.as_tensor(read_video("a.mp4")), torch.as_tensor(read_video("a-rerun.mp4")))
    Image.new("RGB", (40, 30), "blue").save("a.png")
    assert run("rerun", "a.mp4", "-o", "c.mp4") == 2
    assert "image: " in capsys.readouterr().err
    assert not Path("c.mp4").exists()


def test_official_flags_are_aliases(folders: dict[str, Path]) -> None:
    ours = ["generate", "a ball", "--model", folders["t2v"], *SMALL, "--seed", 5, "--guidance", 3.5, "--shift", 7]
    theirs = ["generate", "--task", "t2v-A14B", "--prompt", "a ball", "--ckpt_dir", folders["t2v"], "--size", "32*32"]
    theirs += ["--frame_num", 5, "--sample_steps", 3, "--base_seed", 5]
    theirs += ["--sample_guide_scale", 3.5, "--sample_shift", 7]
    theirs += ["--offload_model", "True", "--convert_model_dtype", "--t5_cpu", "--save_file", "theirs.mp4"]
    assert run(*ours, "-o", "ours.mp4") == 0
    assert run(*theirs) == 0
    assert Path("ours.mp4").read_bytes() == Path("theirs.mp4").read_bytes() or torch.equal(
        torch.as_tensor(read_video("ours.mp4")), torch.as_tensor(read_video("theirs.mp4"))
    )


def test_an_existing_file_is_kept_unless_told_otherwise(folders: dict[str, Path]) -> None:
    Path("mine.mp4").write_text("precious")
    line = ["generate", "a ball", "--model", folders["t2v"], *SMALL, "-o", "mine.mp4"]
    assert run(*line) == 2
    assert Path("mine.mp4").read_text() == "precious"
    assert run(*line, "--overwrite") == 0
    assert probe_video("mine.mp4")["frames"] == 5


def test_default_names_never_collide(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert run("generate", "a/ball: red?", "--model", folders["t2v"], *SMALL, "--seed", 2, "--quiet") == 0
    first, second = capsys.readouterr().out.split()
    assert first != second
    assert {p.name for p in Path().iterdir()} == {first, second}


@pytest.mark.parametrize("name", ["t2v-A14B", "i2v-A14B", "ti2v-5B"])
def test_plan_answers_by_name_without_weights(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (1280, 720)).save("a.png")
    image = [] if name == "t2v-A14B" else ["--image", "a.png"]
    assert run("plan", "a ball", "--model", name, *image, "--seed", 1, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_tokens"] == {"t2v-A14B": 75_600, "i2v-A14B": 75_600, "ti2v-5B": 26_598}[name]
    experts = {"t2v-A14B": {"high_noise": 26, "low_noise": 14}, "i2v-A14B": {"high_noise": 15, "low_noise": 25}}
    assert plan["steps_per_expert"] == experts.get(name, {"single": 50})
    assert run("plan", "a ball", "--model", name, *image) == 0
    assert name in capsys.readouterr().out


def test_inspect_says_what_things_are(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", folders["i2v"], "--json") == 0
    assert json.loads(capsys.readouterr().out)["task"] == "i2v"
    assert run("generate", "a ball", "--model", folders["t2v"], *SMALL, "-o", "a.mp4") == 0
    capsys.readouterr()
    assert run("inspect", "a.mp4", "--json") == 0
    clip = json.loads(capsys.readouterr().out)
    assert clip["settings"]["request"]["prompt"] == "a ball"
    assert run("inspect", "nothing-here") == 1


MISTAKES = {
    "wrong frame count": (["--num-frames", 10], 2, "num_frames: .*9 or 13"),
    "size not divisible": (["--size", "30x32"], 2, "width: .*16 or 32"),
    "not a size": (["--size", "big"], 2, "size: "),
    "unknown flag": (["--step", 3], 2, "--step: .*--steps"),
    "not a number": (["--seed", "one"], 2, "seed"),
    "unwritable output": (["-o", "/proc/clip.mp4"], 1, "/proc"),
    "no such folder": (["-o", "nowhere/clip.mp4"], 1, "nowhere"),
    "another suffix": (["-o", "clip.avi"], 2, "mp4"),
    "picture for text to video": (["--image", "a.png"], 2, "image: "),
    "no such picture": (["--image", "b.png"], 1, "b.png"),
    "no such model": (["--model", "nothing"], 1, "nothing"),
    "wrong task": (["--task", "i2v-A14B"], 2, "task: "),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words, code, named = MISTAKES[case]
    Image.new("RGB", (8, 8)).save("a.png")
    line = ["generate", "a ball", "--num-frames", 5, "--size", "32x32", "--steps", 2, "--model", folders["t2v"], *words]
    assert run(*line) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(named, err), err
    assert len(err.strip().splitlines()) == 1, err
    assert [p.name for p in Path().iterdir()] == ["a.png"]


@pytest.mark.parametrize("prompt", ["", "   "])
def test_an_empty_prompt_is_refused(prompt: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", prompt, "--model", folders["t2v"], *SMALL) == 2
    assert "prompt: must not be empty" in capsys.readouterr().err


def test_a_long_prompt_is_cut_and_said(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a red ball rolling left " * 200
    assert run("generate", prompt, "--model", folders["t2v"], *SMALL, "-o", "a.mp4") == 0
    assert "prompt: " in (err := capsys.readouterr().err)
    assert "512" in err


@pytest.mark.parametrize(("part", "named"), [("high_noise_model", "1-of-00002"), ("low_noise_model", "2-of-00002")])
def test_a_damaged_model_is_named(part: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_family("t2v", tmp_path / "source").write_official(tmp_path / "model", shards=2)
    shard = next(p for p in (folder / part).iterdir() if named in p.name)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert run("generate", "a ball", "--model", folder, *SMALL, "-o", "a.mp4") == 1
    assert shard.name in capsys.readouterr().err
    shard.unlink()
    assert run("generate", "a ball", "--model", folder, *SMALL, "-o", "a.mp4") == 1
    assert shard.name in capsys.readouterr().err
    assert not Path("a.mp4").exists()


def test_weights_of_another_variant_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_family("i2v", tmp_path / "source").write_official(tmp_path / "model")
    for part in ("high_noise_model", "low_noise_model"):
        config = folder / part / "config.json"
        config.write_text(config.read_text().replace('"i2v"', '"t2v"'))
    assert run("generate", "a ball", "--model", folder, *SMALL) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_ctrl_c_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "wanfast", "generate", "a ball", "--steps", "900", "-o", "a.mp4"]
    process = subprocess.Popen(line, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".a.mp4*")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
            if (tmp_path / "cache").exists() and any((tmp_path / "cache" / "wanfast").glob("wan-tiny*")):
                time.sleep(4)  # well into the steps
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "cancelled" in err
    assert "Traceback" not in err
    assert {p.name for p in tmp_path.iterdir()} == {"cache"}


def test_import_is_light() -> None:
    code = "import sys, wanfast; print(sorted({'diffusers', 'transformers', 'torch'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    code = "import sys, wanfast; wanfast.load; print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
