"""Batches of wan-tiny: three clips, through the engine and through the command."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

import wanfast
from wanfast.batch import Job, generate_batch
from wanfast.generation import Inputs
from wanfast.request import Request
from wanfast.tiny import tiny_folder

SMALL: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 4, "seed": 1}
FLAGS = ["--size", "32x32", "--num-frames", "5", "--quiet", "--seed", "5"]
TEXTS = ["a red ball", "the cat jumps", "a blue box rolls"]


def load(num_slots: int | None) -> wanfast.Pipeline:
    """wan-tiny on the CPU, with so many slots for blocks, or with blocks in place."""
    size = wanfast.load(tiny_folder(), device="cpu").loaded.block_bytes
    return wanfast.load(tiny_folder(), device="cpu", vram=None if num_slots is None else num_slots * size)


def jobs_of(pipeline: wanfast.Pipeline, **more: Any) -> list[Job]:
    """A job for each text."""
    return [Job(plan=pipeline.plan(Request(text, **SMALL)), inputs=Inputs(), **more) for text in TEXTS]


def finish(pipeline: wanfast.Pipeline, jobs: list[Job]) -> tuple[list[Tensor], list[Exception | None]]:
    """Make all clips: the videos that there are, and each clip's error."""
    videos, errors = [], []
    for made in generate_batch(pipeline.loaded, jobs):
        errors.append(made.error)
        if made.frames is not None:
            videos.append(torch.cat(list(made.frames)))
    return videos, errors


@cache
def undisturbed(num_slots: int | None) -> list[Tensor]:
    """The videos of a batch that nothing happens to."""
    pipeline = load(num_slots)
    videos, errors = finish(pipeline, jobs_of(pipeline))
    assert errors == [None] * len(TEXTS)
    return videos


def line(folder: str, *more: str, steps: int = 4) -> list[str]:
    """The command that makes them from prompts.txt."""
    return ["generate", "--prompts", "prompts.txt", "-o", folder, "--steps", str(steps), *FLAGS, *more]
