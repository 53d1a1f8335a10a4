"""The model in the box shows what a prompt asks for, through the command, the library and diffusers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import wanfast
from wanfast.__main__ import main
from wanfast.errors import CheckpointError
from wanfast.judge import judge
from wanfast.tiny import tiny_folder
from wanfast.video import read_video

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


def test_it_is_small_and_says_what_it_is() -> None:
    folder = tiny_folder()
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    assert sum(sizes) <= 25_000_000
    assert (folder.parent / "README.md").is_file()
    for expert in ("high_noise", "low_noise"):
        tensors = load_file(folder / f"{expert}_model" / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_where_it_was_not_installed_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanfast.tiny.__file__", str(tmp_path / "tiny.py"))
    with pytest.raises(CheckpointError, match="wan-tiny is not there; install wanfast again"):
        wanfast.load(device="cpu")
