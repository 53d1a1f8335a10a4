"""Previews: one matrix that shows what the decoder would, and a file that follows a run and is never in its way."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reference.vae import golden_tensors, small_config
from torch import Tensor

import wanfast
from wanfast import preview as preview_module
from wanfast.__main__ import main
from wanfast.checkpoint.reader import memory_reader
from wanfast.config import VAEConfig
from wanfast.errors import MediaError, RequestError
from wanfast.preview import PreviewWriter, check_preview
from wanfast.solvers import Step
from wanfast.vae import preview as factors_module
from wanfast.vae.decode import decode
from wanfast.vae.preview import RGBFactors, fit_factors, latents_to_rgb
from wanfast.vae.weights import VAEWeights, expected_tensors, load_vae

SMALL = {"width": 32, "height": 48, "num_frames": 5, "num_inference_steps": 3, "seed": 1}


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("wanfast")] == []


CPU = torch.device("cpu")


def _vae(config: VAEConfig) -> VAEWeights:
    return load_vae(memory_reader(golden_tensors(expected_tensors(config))), config, encoder=False)


def _frames(seed: int, count: int = 3, height: int = 10, width: int = 16) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), generator=draw, dtype=torch.uint8)


def test_colours_are_one_matrix_and_clamped() -> None:
    factors = RGBFactors(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), torch.tensor([0.0, 0.0, -1.0]))
    latents = torch.tensor([[0.0, 1.0, -9.0, float("nan")], [0.5, -1.0, 9.0, 0.0]]).reshape(2, 1, 2, 2)
    got = latents_to_rgb(latents, factors)
    assert got.shape == (1, 2, 2, 3) and got.dtype == torch.uint8
    assert got.reshape(4, 3)[:3].tolist() == [[127, 191, 31], [255, 0, 0], [0, 255, 0]]


def test_a_decoder_that_is_a_matrix_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config("2.1", z_dim=7)
    matrix, bias = torch.randn(3, 7, generator=torch.Generator().manual_seed(3)), torch.tensor([0.1, -0.2, 0.3])

    def linear(_: VAEWeights, latents: Tensor) -> Iterator[Tensor]:
        for index, frame in enumerate(latents.unbind(2)):
            colours = torch.einsum("oc,bchw->bohw", matrix, frame) + bias[:, None, None]
            yield F.interpolate(colours, scale_factor=8)[:, :, None].expand(-1, -1, 4 if index else 1, -1, -1)

    monkeypatch.setattr(factors_module, "decode", linear)
    factors = fit_factors(VAEWeights(config, None, None), CPU)
    assert torch.allclose(factors.matrix, matrix, atol=1e-5)
    assert torch.allclose(factors.bias, bias, atol=1e-5)


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_a_fitted_preview_changes_as_the_frames_do(version: str) -> None:
    """A random decoder is far from a matrix, and nearest to one in a small range; 0.48 and 0.47 measured."""
    mean = (2.0, -2.0, 1.5, 2.5)
    vae = _vae(replace(small_config(version), latents_mean=mean, latents_std=(0.1,) * 4))
    factors, draw = fit_factors(vae, CPU), torch.Generator().manual_seed(5)
    one, other = (F.interpolate(torch.randn(1, 4, 1, 2, 8, generator=draw), scale_factor=(2, 8, 8)) for _ in range(2))

    def shown(latents: Tensor) -> Tensor:
        frames = [F.avg_pool2d(chunk.mean(2), vae.config.spatial_stride) for chunk in decode(vae, latents)]
        return torch.stack(frames, dim=2)[0].flatten(1)

    want, got = shown(one) - shown(other), torch.einsum("oc,bcfhw->obfhw", factors.matrix, one - other).flatten(1)
    assert torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(want, got, strict=True)]).mean() > 0.35


def test_a_run_shows_what_it_predicts() -> None:
    """The last prediction is what is decoded; each is uint8, in the latents' size, and changes nothing else."""
    pipeline = wanfast.load(device="cpu")
    seen: list[tuple[Step, Tensor]] = []
    latents = pipeline.generate(
        "a", output="latents", preview=lambda step, frames: seen.append((step, frames)), **SMALL
    )
    assert [step.index for step, _ in seen] == [0, 1, 2]
    assert all(frames.shape == (2, 6, 4, 3) and frames.dtype == torch.uint8 for _, frames in seen)
    assert torch.equal(latents, pipeline.generate("a", output="latents", **SMALL))
    model = pipeline.loaded.model
    factors = fit_factors(load_vae(model.vae, model.config.vae, encoder=False), CPU)
    last = latents_to_rgb(latents, factors)
    assert int((seen[-1][1].int() - last.int()).abs().max()) <= 1
    assert not torch.equal(seen[0][1], last)


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".WebP"])
def test_the_file_is_animated_and_replaced(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"preview{suffix}"
    file.write_bytes(b"an older one")
    with PreviewWriter(check_preview(file), seconds_per_frame=0.25) as writer:
        for seed in range(4):
            writer.update(_frames(seed))
    assert os.listdir(tmp_path) == [file.name]
    with Image.open(file) as image:
        assert image.size == (320, 200)
        assert image.n_frames == 3
        image.seek(1)
        image.load()
        assert image.info["duration"] == 250
        small = torch.from_numpy(np.array(image.convert("RGB").resize((16, 10), Image.Resampling.BOX)))
    want = _frames(3)[1]
    assert float(torch.corrcoef(torch.stack((small.flatten().float(), want.flatten().float())))[0, 1]) > 0.8


def test_a_single_frame_is_a_picture(tmp_path: Path) -> None:
    with PreviewWriter(tmp_path / "preview.webp", seconds_per_frame=0.25) as writer:
        writer.update(_frames(0, count=1, height=400, width=30))
    with Image.open(tmp_path / "preview.webp") as image:
        assert image.size == (30, 400)


def test_a_slow_disk_holds_nobody_back_and_gets_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, gate, written = threading.Event(), threading.Event(), list[int]()

    def write(self: PreviewWriter, frames: Tensor) -> None:
        begun.set()
        assert gate.wait(20)
        written.append(len(frames))

    monkeypatch.setattr(PreviewWriter, "_write", write)
    with PreviewWriter(tmp_path / "preview.webp", seconds_per_frame=0.25) as writer:
        started = time.monotonic()
        writer.update(_frames(0, count=1))
        assert begun.wait(20)
        for count in (2, 3, 4):
            writer.update(_frames(0, count=count))
        assert time.monotonic() - started < 15
        gate.set()
    assert written == [1, 4]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("cannot save"), MemoryError()])
def test_a_failure_is_one_warning_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    calls: list[int] = []

    def save(self: Image.Image, part: Path, **_: object) -> None:
        part.write_bytes(b"half")
        calls.append(1)
        raise error

    monkeypatch.setattr(preview_module.Image.Image, "save", save)
    with caplog.at_level(logging.WARNING), PreviewWriter(tmp_path / "p.gif", seconds_per_frame=0.1) as writer:
        for seed in range(5):
            writer.update(_frames(seed))
            time.sleep(0.01)
    assert len(calls) == 1
    assert caplog.text.count("the preview cannot be written") == 1
    assert os.listdir(tmp_path) == []


def test_the_command_keeps_a_preview_and_makes_the_same_clip(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["generate", "a", "--size", "32x48", "--num-frames", "5", "--steps", "2", "--seed", "1", "--quiet"]
    line += ["--device", "cpu"]
    assert main([*line, "-o", str(tmp_path / "plain.mp4")]) == 0
    preview = tmp_path / "p.webp"
    assert main([*line, "-o", str(tmp_path / "with.mp4"), "--preview", str(preview)]) == 0
    with Image.open(preview) as image:
        assert image.size == (212, 318) and image.n_frames == 2
        assert image.info["loop"] == 0
    monkeypatch.setattr(PreviewWriter, "_write", lambda self, frames: 1 / 0)
    assert main([*line, "-o", str(tmp_path / "broken.mp4"), "--preview", str(preview)]) == 0
    clips = {(tmp_path / f"{name}.mp4").read_bytes() for name in ("plain", "with", "broken")}
    assert len(clips) == 1
    assert "preview cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("p.mp4", RequestError, r"preview: must end in \.webp or \.gif, got .*preview\.webp would work"),
        ("p", RequestError, "preview: must end in"),
        ("gone/p.gif", MediaError, "gone does not exist; create it first"),
    ],
)
def test_what_cannot_be_a_preview_is_refused_before_anything_is_loaded(
    tmp_path: Path, name: str, error: type, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(error, match=words):
        check_preview(tmp_path / name)
    assert main(["generate", "a", "--model", "/nowhere", "--preview", str(tmp_path / name)]) != 0
    assert "nowhere" not in capsys.readouterr().err


def test_several_clips_have_no_preview(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--prompts", "x.txt", "-o", str(tmp_path), "--preview", "p.gif"])
    assert "preview: must be left out with --prompts" in capsys.readouterr().err
