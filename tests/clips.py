"""Clips that video tests write and read."""

import torch
from torch import Tensor

from wanfast.config import DEFAULT_NEGATIVE_PROMPT

SETTINGS = {"prompt": 'a "red" ball\nrolls', "negative_prompt": DEFAULT_NEGATIVE_PROMPT, "seed": 2**63, "shift": 12.0}


def smooth(frames: int = 9, height: int = 48, width: int = 80) -> Tensor:
    """Moving waves of colour, uint8 [F, H, W, 3]."""
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    waves = (((x + 3 * t) / 37).sin(), ((y + 2 * t) / 29).cos(), ((x + y + t) / 51).sin())
    return (127 + 100 * torch.stack(waves, -1)).to(torch.uint8)


def noise(frames: int, height: int = 96, width: int = 96) -> Tensor:
    """What no encoder can make small."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (frames, height, width, 3), generator=draw, dtype=torch.uint8)


def psnr(got: Tensor, want: Tensor) -> float:
    return float(10 * torch.log10(255**2 / (got.double() - want.double()).square().mean()))
