"""Machines with less memory than was thought: wan-tiny in slots for its blocks, and calls that fail for want of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.tiny import random_folder
from safetensors.torch import save_file

import wanfast
from wanfast.plan import Plan
from wanfast.request import Request
from wanfast.residency import Residency

SMALL: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 4, "seed": 1}
ERRORS: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    "torch": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    "python": MemoryError,
    "numpy": lambda: MemoryError("Unable to allocate 2.00 GiB for an array with shape (1, 2) and data type float32"),
}
KINDS = pytest.mark.parametrize("kind", ["cuda", "python"])
BLOCKS = 4  # of each of wan-tiny's experts


TEXTS = ["a red ball", "the cat jumps", "a blue box rolls", "a dog", "one"]


@pytest.fixture(autouse=True)
def blocks_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, and never used where they were loaded: those sum in another order."""
    monkeypatch.setattr(Residency, "_is_in_place", lambda self, experts: False)


def load(num_slots: int) -> wanfast.Pipeline:
    """A model of random weights on the CPU with so many slots."""
    size = wanfast.load(random_folder(), device="cpu").loaded.block_bytes
    return wanfast.load(random_folder(), device="cpu", vram=num_slots * size)


def failing(own: Callable[..., Any], error: Callable[[], Exception], calls: set[int] | None) -> Callable[..., Any]:
    """Let some calls fail, or all."""
    made: list[int] = []

    def call(*arguments: Any, **more: Any) -> Any:
        made.append(1)
        if calls is None or len(made) in calls:
            raise error()
        return own(*arguments, **more)

    return call


def plans(pipeline: wanfast.Pipeline, texts: list[str]) -> list[Plan]:
    """Of one small clip each."""
    return [pipeline.plan(Request(text, **SMALL)) for text in texts]


def write_lora(file: Path, rank: int) -> Path:
    """Of one layer of both experts."""
    dim = wanfast.load(random_folder(), device="cpu").loaded.config.dit.dim
    factors = {"lora_A.weight": torch.full((rank, dim), 0.01), "lora_B.weight": torch.full((dim, rank), 0.01)}
    save_file({f"diffusion_model.blocks.0.self_attn.q.{name}": t for name, t in factors.items()}, file)
    return file
