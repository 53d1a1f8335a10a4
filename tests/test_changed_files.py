"""Files that change while they are used: a named error or the right video, never other frames."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference.tiny import random_tiny

import wanfast
from wanfast.errors import CheckpointError

SMALL = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 4, "seed": 1}
HIGH, LOW = (f"{name}_noise_model/diffusion_pytorch_model.safetensors" for name in ("high", "low"))


@pytest.fixture(scope="module")
def want(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return (
        wanfast.load(random_tiny(tmp_path_factory.mktemp("tiny") / "tiny"), device="cpu").generate("a", **SMALL).frames
    )


def changing_at(step: int, change: Callable[[], None]) -> Callable[[object, torch.Tensor], None]:
    def on_step(taken: object, latents: torch.Tensor) -> None:
        if taken.index == step:  # type: ignore[attr-defined]
            change()

    return on_step


def overwrite(path: Path) -> None:
    """Write other numbers over the last half of a file, in place."""
    size = path.stat().st_size // 4 * 2
    with path.open("r+b") as file:
        file.seek(-size, os.SEEK_END)
        file.write(b"\x12\x3c" * (size // 2))


@pytest.mark.parametrize("vram", [None, "7MB"])
@pytest.mark.parametrize("file", [HIGH, LOW, "Wan2.1_VAE.pth"])
def test_weights_written_over_in_use_are_refused(file: str, vram: str | None, tmp_path: Path) -> None:
    folder = random_tiny(tmp_path / "tiny")
    pipeline = wanfast.load(folder, device="cpu", vram=vram)
    with pytest.raises(CheckpointError, match=rf"{Path(file).name}: .*written to while in use"):
        pipeline.generate("a", on_step=changing_at(0, lambda: overwrite(folder / file)), **SMALL)


@pytest.mark.parametrize("file", [HIGH, LOW])
def test_a_file_put_in_its_place_is_refused(file: str, tmp_path: Path) -> None:
    folder = random_tiny(tmp_path / "tiny")

    def replace() -> None:
        other = folder / "other"
        other.write_bytes((folder / file).read_bytes())
        overwrite(other)
        other.rename(folder / file)

    pipeline = wanfast.load(folder, device="cpu")
    with pytest.raises(CheckpointError, match=rf"{Path(file).name}: .*written to while in use"):
        pipeline.generate("a", on_step=changing_at(0, replace), **SMALL)


def test_a_file_that_is_deleted_in_use_still_serves(tmp_path: Path, want: torch.Tensor) -> None:
    folder = random_tiny(tmp_path / "tiny")
    pipeline = wanfast.load(folder, device="cpu")
    video = pipeline.generate("a", on_step=changing_at(0, (folder / HIGH).unlink), **SMALL)
    assert torch.equal(video.frames, want)
