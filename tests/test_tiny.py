"""The models in the box show what a prompt asks for, through the command, the library and diffusers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from reference.tiny import diffusers_pipeline
from safetensors.torch import load_file

import wanfast
from wanfast.__main__ import main
from wanfast.config import DEFAULT_NEGATIVE_PROMPT
from wanfast.errors import CheckpointError
from wanfast.judge import BACKGROUNDS, COLOURS, judge
from wanfast.model import open_model
from wanfast.tiny import NAME, tiny_folder
from wanfast.video import read_settings, read_video

CAPTIONS = (
    "a red circle moves left",
    "a large yellow square slides down on a dotted navy background",
    "a small white triangle stands still",
)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_video_shows_what_its_caption_says(caption: str) -> None:
    video = wanfast.load(device="cpu").generate(caption, seed=1)
    assert video.frames.shape == (17, 64, 64, 3)
    verdict = judge(video.frames.numpy().astype(np.float32) / 255, caption)
    assert verdict.follows and verdict.count
    assert not judge(video.frames.numpy()[::-1].astype(np.float32) / 255, "a green circle moves up").follows


def test_the_command_shows_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = tmp_path / "clip.mp4"
    assert main(["generate", "a blue square moves right", "--seed", "3", "-o", str(clip), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(clip)
    assert judge(read_video(clip).numpy().astype(np.float32) / 255, "a blue square moves right").follows


def test_the_sibling_for_both_needs_no_picture() -> None:
    pipeline = wanfast.load("wan-tiny-ti2v", device="cpu")
    for caption in CAPTIONS:
        video = pipeline.generate(caption, seed=2)
        assert video.frames.shape == (17, 64, 64, 3)
        assert judge(video.frames.numpy().astype(np.float32) / 255, caption).follows


@pytest.mark.parametrize(
    ("named", "used", "kept"),
    [
        ([], "wan-tiny-i2v", 24),  # its VAE gives clips back at 31 to 33 dB
        (["--model", "wan-tiny-ti2v"], "wan-tiny-ti2v", 22),  # and this one's, of four times fewer latents, at 28
    ],
    ids=["i2v", "ti2v"],
)
def test_a_picture_moves_as_its_caption_says(named: list[str], used: str, kept: float, tmp_path: Path) -> None:
    """Without a model's name, the built-in one that takes pictures is used."""
    caption = "a red circle moves right on a gray background"
    picture = Image.new("RGB", (256, 256), tuple(round(255 * value) for value in BACKGROUNDS["gray"]))
    red = tuple(round(255 * value) for value in COLOURS["red"])
    ImageDraw.Draw(picture).ellipse((50, 90, 120, 160), fill=red)
    picture = picture.resize((64, 64), Image.Resampling.BOX)
    picture.save(tmp_path / "picture.png")
    words = ["generate", caption, *named, "--image", str(tmp_path / "picture.png"), "--seed", "2", "--quiet"]
    assert main([*words, "-o", str(tmp_path / "clip.mp4")]) == 0
    assert read_settings(tmp_path / "clip.mp4")["model"] == used
    video = read_video(tmp_path / "clip.mp4").numpy().astype(np.float32) / 255
    verdict = judge(video, caption)
    assert verdict.follows and verdict.count
    error = np.square(video[0] - np.asarray(picture, dtype=np.float32) / 255).mean()
    assert -10 * np.log10(error) > kept


def test_its_name_means_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that happens to be called like it changes neither the default nor a clip's rerun."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wan-tiny").mkdir()
    for name in (None, "wan-tiny", "Wan-Tiny"):
        pipeline = wanfast.load(name, device="cpu")
        assert pipeline.loaded.model.path == tiny_folder()
        assert pipeline.loaded.model.found_at == "wan-tiny"
    for path in ("./wan-tiny", Path("wan-tiny")):
        with pytest.raises(CheckpointError, match="is an empty folder"):
            wanfast.load(path, device="cpu")


@pytest.mark.parametrize("name", ["wan-tiny", "wan-tiny-i2v", "wan-tiny-ti2v"])
def test_it_can_be_inspected_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", name, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["path"], told["defaults"]["name"]) == (name, name)
    assert all(part["num_parameters"] > 10**5 for part in told["parts"].values())


def test_pictures_of_a_batch_are_for_the_model_that_takes_them(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "gray").save(tmp_path / "picture.png")
    line = {"prompt": "a red circle moves up", "image": "picture.png", "output": "clip.mp4"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line) + "\n")
    words = ["generate", "--prompts", str(tmp_path / "prompts.jsonl"), "--steps", "2", "--quiet"]
    assert main([*words, "-o", str(tmp_path)]) == 0
    assert read_settings(tmp_path / "clip.mp4")["model"] == "wan-tiny-i2v"


def test_diffusers_makes_the_same_clip_of_it() -> None:
    noise = torch.randn(16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = wanfast.load(device="cpu", precision="fp32").generate(CAPTIONS[0], num_inference_steps=6, latents=noise)
    pipeline = diffusers_pipeline(open_model(NAME))
    pipeline.set_progress_bar_config(disable=True)
    asked = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 6, "output_type": "np"}
    guidance = {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
    theirs = pipeline(CAPTIONS[0], DEFAULT_NEGATIVE_PROMPT, latents=noise[None], **asked, **guidance).frames[0]
    assert np.abs(ours.frames.numpy() - np.trunc(theirs * 255.0)).max() <= 1


def test_verify_asks_it_where_no_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", "--captions", "2", "--tiers", "int8", "--steps", "20", "--json", "--quiet", "--device", "cpu"]
    assert main(words) == 0
    exact, eight = json.loads(capsys.readouterr().out)
    assert exact["following"]["follows"] == eight["following"]["follows"] == 1
    assert 30 < eight["psnr"] < 60


def test_it_is_small_and_says_what_it_is() -> None:
    folder = tiny_folder()
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    assert sum(sizes) <= 25_000_000
    siblings = [path for name in ("i2v", "ti2v") for path in (folder.parent / name).rglob("*") if path.is_file()]
    assert 20_000_000 <= sum(path.stat().st_size for path in siblings) <= 25_000_000
    assert (folder.parent / "README.md").is_file()
    for expert in ("high_noise", "low_noise"):
        tensors = load_file(folder / f"{expert}_model" / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_where_it_was_not_installed_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanfast.tiny.__file__", str(tmp_path / "tiny.py"))
    with pytest.raises(CheckpointError, match="wan-tiny is not there; install wanfast again"):
        wanfast.load(device="cpu")
