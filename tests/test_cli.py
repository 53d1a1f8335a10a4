"""The command line as a user meets it: what it prints where, its exit codes, and that mistakes leave nothing."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from reference.families import make_family
from safetensors.torch import load_file, save_file

import wanfast
import wanfast.video as video
from wanfast.__main__ import main
from wanfast.images import load_image
from wanfast.settings import image_digest
from wanfast.vae import conv
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


def test_notes_and_warnings_are_told_plainly(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "_C", None)
    conv._say_extension_is_missing.cache_clear()
    assert run("generate", "a ball", "--model", folders["t2v"], *SMALL, "--num-frames", 1, "-o", "a.mp4") == 0
    err = capsys.readouterr().err
    assert "wanfast: installed without its C++ extension" in err
    assert "wanfast: wanfast:" not in err
    assert "32x32, 1 frame, " in err


def test_generate_prints_the_path_alone(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "a red ball", "--model", folders["t2v"], *SMALL, "--seed", 1, "-o", "clip.mp4") == 0
    out, err = capsys.readouterr()
    assert out == "clip.mp4\n"
    assert "seed 1" in err
    assert [p.name for p in Path().iterdir()] == ["clip.mp4"]
    clip = probe_video("clip.mp4")
    assert (clip["frames"], clip["width"], clip["height"], clip["fps"]) == (5, 32, 32, 16)


def test_without_a_model_the_built_in_one_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "a red circle moves left", "--seed", 0, *SMALL, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["model"] == "wan-tiny"
    assert result["settings"]["model_path"] == "wan-tiny"
    assert result["seed"] == 0
    assert set(result["seconds"]) == {"text", "steps", "decode", "total"}
    assert Path(result["path"]).stat().st_size > 0


def test_python_records_what_the_command_records(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 2, "seed": 0}
    assert wanfast.load().generate("a ball", **asked).settings["model_path"] == "wan-tiny"
    Image.new("RGB", (40, 30), "red").save("a.png")
    made = wanfast.load(folders["i2v"]).generate("a ball", image="a.png", **asked)
    assert made.settings["image"]["path"] == str(tmp_path / "a.png")
    assert made.settings["model_path"] == str(folders["i2v"])
    line = ["generate", "a ball", "--model", folders["i2v"], "--image", "a.png", *SMALL, "--steps", 2, "--seed", 0]
    assert run(*line, "-o", "a.mp4") == 0
    assert read_settings("a.mp4") == json.loads(json.dumps(made.settings))


def test_rerun_repeats_the_same_frames(folders: dict[str, Path]) -> None:
    assert run("generate", "a ball", "--model", folders["t2v"], *SMALL, "--guidance-low", 2.5, "-o", "a.mp4") == 0
    assert run("rerun", "a.mp4", "--device", "cpu", "--vram", "1GB", "-o", "b.mp4") == 0
    assert torch.equal(torch.as_tensor(read_video("a.mp4")), torch.as_tensor(read_video("b.mp4")))
    assert run("rerun", "a.mp4", "--device", "tpu", "-o", "c.mp4") == 2
    assert run("rerun", "a.mp4", "--vram", "much", "-o", "c.mp4") == 2
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
    theirs += ["--offload_model", "True", "--ulysses_size", 1, "--save_file", "theirs.mp4"]
    assert run(*ours, "-o", "ours.mp4") == 0
    assert run(*theirs) == 0
    assert Path("ours.mp4").read_bytes() == Path("theirs.mp4").read_bytes() or torch.equal(
        torch.as_tensor(read_video("ours.mp4")), torch.as_tensor(read_video("theirs.mp4"))
    )


@pytest.mark.parametrize("flag", ["--t5_cpu", "--convert_model_dtype", "--ulysses_size=1", "--offload_model=False"])
def test_an_official_flag_without_a_meaning_takes_no_prompt_away(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "--model", "t2v-A14B", flag, "a ball", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "a ball"


UNSUPPORTED = {
    "--t5_fsdp": "one GPU",
    "--dit_fsdp": "one GPU",
    "--ulysses_size=8": "one GPU",
    "--use_prompt_extend": "prompts are taken as they are",
    "--prompt_extend_method=local_qwen": "prompts are taken as they are",
    "--prompt_extend_model=qwen": "prompts are taken as they are",
    "--prompt_extend_target_lang=zh": "prompts are taken as they are",
}


@pytest.mark.parametrize("flag", UNSUPPORTED)
def test_an_official_flag_that_is_not_supported_says_why(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["a ball", flag], [*flag.split("="), "--prompt", "a ball"]):
        assert run("generate", *words) == 2
        err = capsys.readouterr().err
        assert "not supported" in err and UNSUPPORTED[flag] in err and flag.split("=")[0].replace("_", "-") in err
        assert "did you mean" not in err and len(err.strip().splitlines()) == 1


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"wanfast {wanfast.__version__}\n"


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


PLAN_MISTAKES = {
    "vram": (["--vram", "lots"], 2, "vram: "),
    "device": (["--device", "tpu"], 2, "device: must be cpu, cuda or cuda:N, got 'tpu'"),
    "output folder": (["-o", "nowhere/clip.mp4"], 1, "nowhere does not exist"),
    "output suffix": (["-o", "clip.avi"], 2, "output: "),
    "output there": (["-o", "there.mp4"], 2, "output: must not exist yet"),
    "task": (["--task", "i2v-A14B"], 2, "task: "),
}


@pytest.mark.parametrize("case", PLAN_MISTAKES)
def test_plan_by_name_refuses_what_generate_refuses(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("there.mp4").touch()
    words, code, named = PLAN_MISTAKES[case]
    assert run("plan", "a ball", "--model", "t2v-A14B", *words) == code
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1) and named in err
    assert [p.name for p in Path().iterdir()] == ["there.mp4"]


def test_plan_by_name_is_for_any_machine(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "a ball", "--model", "t2v-A14B", "--num-frames", 1]
    assert run(*line, "--device", "cuda:3", "--vram", "24GB", "-o", "clip.mp4") == 0
    out = capsys.readouterr().out
    assert "cuda:3" in out and "1 frame at" in out
    assert list(Path().iterdir()) == []


def test_inspect_says_what_things_are(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", folders["i2v"], "--json") == 0
    assert json.loads(capsys.readouterr().out)["task"] == "i2v"
    assert run("generate", "a ball", "--model", folders["t2v"], *SMALL, "-o", "a.mp4") == 0
    capsys.readouterr()
    assert run("inspect", "a.mp4", "--json") == 0
    clip = json.loads(capsys.readouterr().out)
    assert clip["settings"]["request"]["prompt"] == "a ball"
    assert run("inspect", "a.mp4") == 0
    labelled = re.findall(r"^(\w+)( +)", capsys.readouterr().out, re.MULTILINE)
    assert [label for label, _ in labelled][:3] == ["frames", "fps", "width"]
    assert {len(label + gap) for label, gap in labelled} == {len("pixel_format") + 2}
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
    "long name": (["-o", "n" * 300 + ".mp4"], 1, "too long"),
    "NUL in the name": (["-o", "a\0b.mp4"], 2, "output: must be a name a file can have"),
    "no encoding of the name": (["-o", "a\ud800.mp4"], 2, "output: must be a name a file can have"),
    "empty name": (["-o", ""], 2, "output: must not be empty"),
    "empty size": (["--size", ""], 2, "size: must not be empty"),
    "empty model": (["--model", ""], 2, "model: must not be empty"),
    "not a truth": (["--offload_model", "a ball"], 2, "--offload-model: must be True or False"),
    "picture cut off": (["--image", "cut.png"], 1, "cut.png: "),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words, code, named = MISTAKES[case]
    Image.new("RGB", (8, 8)).save("a.png")
    Image.effect_noise((64, 64), 50).save("cut.png")
    Path("cut.png").write_bytes(Path("cut.png").read_bytes()[:1000])
    line = ["generate", "a ball", "--num-frames", 5, "--size", "32x32", "--steps", 2, "--model", folders["t2v"], *words]
    assert run(*line) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(named, err), err
    assert len(err.strip().splitlines()) == 1, err
    assert {p.name for p in Path().iterdir()} == {"a.png", "cut.png"}


def test_a_task_without_a_model_is_not_the_tiny_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "a ball", "--task", "t2v-A14B", "-o", "a.mp4") == 2
    assert "model: must be given with --task" in capsys.readouterr().err


def test_a_home_folder_in_the_output_is_the_user_s(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert run("generate", "a ball", "--model", folders["t2v"], *SMALL, "-o", "~/a.mp4") == 0
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("kind", ["RGBA", "L", "EXIF"])
def test_pictures_of_any_kind_are_taken(kind: str, folders: dict[str, Path]) -> None:
    exif = Image.Exif()
    if kind == "EXIF":
        exif[0x0112] = 6  # lies on its side
    Image.linear_gradient("L").resize((64, 32)).convert("RGB" if kind == "EXIF" else kind).save("a.png", exif=exif)
    line = ["generate", "a ball", "--model", folders["i2v"], "--image", "a.png", *SMALL, "-o", "a.mp4"]
    assert run(*line) == 0
    recorded, clip = read_settings("a.mp4"), probe_video("a.mp4")
    assert recorded["request"]["image_size"] == ([32, 64] if kind == "EXIF" else [64, 32])
    assert (clip["height"] > clip["width"]) == (kind == "EXIF")
    assert recorded["image"]["sha256"] == image_digest(load_image("a.png"))


@pytest.mark.parametrize("prompt", ["", "   ", "&nbsp;", "\u200b\ufeff", "&amp;nbsp; &#8203;"])
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
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert "patch_embedding.weight" in err or "i2v" in err, err


def test_a_weight_that_is_not_a_number_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_family("t2v", tmp_path / "source").write_official(tmp_path / "model")
    file = next((folder / "low_noise_model").glob("*.safetensors"))
    weights = load_file(file)
    weights["blocks.0.ffn.0.weight"][0, 0] = torch.nan
    save_file(weights, file)
    assert run("generate", "a ball", "--model", folder, *SMALL, "-o", "a.mp4", "--quiet") == 1
    out, err = capsys.readouterr()
    assert (out, len(err.strip().splitlines())) == ("", 1)
    assert file.name in err and "blocks.0.ffn.0.weight" in err
    assert list(Path().glob("*a.mp4*")) == []


def test_a_disk_that_fills_up_while_writing_is_told(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "_PROBE_BYTES", 0)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, unlimited[1]))
    try:
        assert run("generate", "a ball", "--model", folders["t2v"], *SMALL, "-o", "a.mp4", "--quiet") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "a.mp4: cannot be written" in err
    assert list(Path().iterdir()) == []


def test_import_is_light() -> None:
    code = "import sys, wanfast; print(sorted({'diffusers', 'transformers', 'torch'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    code = "import sys, wanfast; wanfast.load; print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
