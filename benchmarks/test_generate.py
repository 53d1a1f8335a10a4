"""wan-tiny as it is shipped, beside diffusers' pipeline over the same weights: prompt in, frames out, fp32.

Run as a script with an engine and a folder, it makes the video once and prints its peak memory.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from side_by_side import compare, compare_memory, print_peak

SIZE, FRAMES, STEPS = 64, 17, 40  # wan-tiny's own
PROMPT, NEGATIVE = "a red circle moves left", "blurry"
ROUNDS = 5

Frames = Callable[[], np.ndarray]


def _noise() -> torch.Tensor:
    shape = (16, (FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _wanfast(folder: Path) -> Frames:
    import wanfast

    pipeline = wanfast.load(precision="fp32", device="cpu")

    def run() -> np.ndarray:
        video = pipeline.generate(
            PROMPT,
            negative_prompt=NEGATIVE,
            width=SIZE,
            height=SIZE,
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            latents=_noise(),
        )
        return video.frames.numpy()

    return run


def _diffusers(folder: Path) -> Frames:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(folder / "diffusers")
    pipeline.set_progress_bar_config(disable=True)

    def run() -> np.ndarray:
        return pipeline(
            PROMPT,
            NEGATIVE,
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            guidance_scale_2=3.0,
            latents=_noise()[None],
            output_type="np",
        ).frames[0]

    return run


ENGINES = {"wanfast": _wanfast, "diffusers": _diffusers}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wan-tiny as diffusers reads it, from the same tensors."""
    from reference.tiny import diffusers_pipeline

    from wanfast.model import open_model
    from wanfast.tiny import NAME

    path = tmp_path_factory.mktemp("tiny")
    diffusers_pipeline(open_model(NAME)).save_pretrained(path / "diffusers")
    return path


def test_tiny_pipeline(benchmark: BenchmarkFixture, folder: Path) -> None:
    ours, theirs = (build(folder) for build in ENGINES.values())
    want = np.trunc(theirs() * 255.0)
    assert np.abs(ours() - want).max() <= 1
    compare(benchmark, ours, theirs, peer="diffusers", rounds=ROUNDS)
    compare_memory(benchmark, __file__, str(folder), peer="diffusers")


if __name__ == "__main__":
    print_peak(sys.argv[1], lambda: ENGINES[sys.argv[1]](Path(sys.argv[2])))
