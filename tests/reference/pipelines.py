"""Small random diffusers pipelines of the three families, and one call of each that takes a tenth of a second."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from reference.families import NEGATIVE, PROMPT, Family, make_family
from torch import Tensor

import wanfast

# How a family is used: its task, and whether through WanImageToVideoPipeline.
USES = {"t2v": ("t2v", False), "i2v": ("i2v", True), "ti2v": ("ti2v", False), "ti2v with a picture": ("ti2v", True)}


@dataclass(frozen=True)
class Case:
    """A pipeline and the arguments of a short call."""

    family: Family
    pipe: Any
    arguments: Mapping[str, Any]

    def run(self, **changes: Any) -> Any:
        """Call the pipeline with its own seed; the frames, or what return_dict=False gives."""
        arguments = {"generator": torch.Generator().manual_seed(5), "output_type": "np"} | dict(self.arguments)
        output = self.pipe(**(arguments | changes))
        return output if isinstance(output, tuple) else output.frames

    @contextmanager
    def accelerated(self, **options: Any) -> Iterator[None]:
        """Accelerate the pipeline for a while."""
        wanfast.accelerate(self.pipe, **options)
        try:
            yield
        finally:
            wanfast.restore(self.pipe)

    @property
    def transformers(self) -> list[Any]:
        return [model for model in (self.pipe.transformer, self.pipe.transformer_2) if model is not None]


def make_case(use: str, folder: Path) -> Case:
    """Draw a family's model and build the pipeline for one use of it."""
    task, takes_picture = USES[use]
    family = make_family(task, folder)
    side = 64 if task == "ti2v" else 32
    arguments: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "height": side,
        "width": side + 32,
        "num_frames": 5,
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "max_sequence_length": 12,
    }
    if family.row.boundary is not None:
        arguments["guidance_scale_2"] = 2.5
    if takes_picture:
        pixels = np.random.default_rng(0).integers(0, 256, (side, side + 32, 3), dtype=np.uint8)
        arguments["image"] = Image.fromarray(pixels)
    return Case(family, family.pipeline(image_to_video=takes_picture), arguments)


def cast(model: Any, dtype: torch.dtype) -> None:
    """Cast a transformer as from_pretrained(torch_dtype=...) does; `to` would round its table of rotations too."""
    for name, parameter in model.named_parameters():
        is_kept = any(part in name.split(".") for part in model._keep_in_fp32_modules)
        parameter.data = parameter.data.to(torch.float32 if is_kept else dtype)


def as_array(frames: Any) -> np.ndarray:
    """Frames of any output_type as one fp32 array, pictures in [0, 1]."""
    if isinstance(frames, Tensor):
        return frames.float().numpy()
    if isinstance(frames, np.ndarray):
        return frames
    return np.stack([np.stack([np.asarray(image) / np.float32(255) for image in video]) for video in frames])


def furthest(got: Any, want: Any) -> float:
    """The largest difference of any value."""
    got, want = as_array(got), as_array(want)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    return float(np.abs(got - want).max())
