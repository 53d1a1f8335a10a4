"""Trains a VAE: first on single frames, where most of what it must learn is cheap, then on clips.

    python train_vae.py RUN_FOLDER
    python train_vae.py RUN_FOLDER --version 2.2    # the one for TI2V

Both are cut out around the objects, which is where there is something to learn; the last steps see whole clips.
Stop it at any time (SIGTERM) and start it again: it goes on from its last checkpoint.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from data import NUM_FRAMES, SIDE, make_scene, render
from optimizer import Both
from torch import Tensor, nn
from torch.nn import functional
from training import INTERRUPTED, Run, learning_rate
from vae22_model import VAE22
from vae_model import VAE, CausalConv, Down, Residual, Up

from wanfast.judge import DIRECTIONS, SPEEDS, Array

NAMES = {"2.1": "vae", "2.2": "vae22"}  # of the trainings
BASES = {"2.1": 8, "2.2": 16}  # channels of the finest level, which for 2.2 has half the rows and columns
SEED = 1
PEAK = 0.03
KL_WEIGHT = 3e-4
EDGE_WEIGHT = 4.0  # shapes are made of edges, and edges are few


class Stage(NamedTuple):
    """Steps on videos of one size."""

    num_steps: int
    batch: int
    num_frames: int
    side: int  # pixels, cut from frames of SIDE


STAGES = (Stage(1200, 48, 1, 32), Stage(900, 4, NUM_FRAMES, 32), Stage(150, 2, NUM_FRAMES, SIDE))


def make_vae(version: str = "2.1", base: int | None = None) -> VAE | VAE22:
    """A fresh VAE that treats every frame alone: what single frames teach it is its start on clips."""
    torch.manual_seed(SEED)
    base = base or BASES[version]
    vae: VAE | VAE22 = VAE(base) if version == "2.1" else VAE22(base, base)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, CausalConv) and module.kernel_size[0] == 3:
                module.weight[:, :, :-1] = 0
            if isinstance(module, Residual):
                last = module.residual[-1]
                assert isinstance(last, CausalConv)
                last.weight.zero_()
            if isinstance(module, Down) and hasattr(module, "time_conv"):
                _copy_frames(module.time_conv, copies=1)
            if isinstance(module, Up) and hasattr(module, "time_conv"):
                _copy_frames(module.time_conv, copies=2)
        assert vae.conv1.bias is not None
        vae.conv1.bias[vae.conv1.out_channels // 2 :] = -4  # the log variance: hardly any noise at first
    channels_last(vae)
    return vae


def _copy_frames(conv: nn.Conv3d, copies: int) -> None:
    """Start a convolution over time as one that repeats the newest frame."""
    conv.weight.zero_()
    conv.weight[:, :, -1, 0, 0] = torch.eye(conv.in_channels).repeat(copies, 1)
    conv.bias.zero_()  # type: ignore[union-attr]


def channels_last(vae: nn.Module) -> None:
    """Lay the weights out as CPU convolutions like them: faster by a tenth."""
    for parameter in vae.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)


def batch(step: int, stages: Sequence[Stage] = STAGES) -> Tensor:
    """The videos of a step, [B, 3, F, H, W] in [-1, 1]."""
    first = 0  # number of the stage's first clip
    for stage in stages:
        if step < stage.num_steps:
            break
        step, first = step - stage.num_steps, first + stage.num_steps * stage.batch
    numbers = range(first + step * stage.batch, first + (step + 1) * stage.batch)
    pixels = torch.from_numpy(np.stack([_cut_out(number, stage) for number in numbers])).permute(0, 4, 1, 2, 3)
    return (pixels * 2 - 1).contiguous(memory_format=torch.channels_last_3d)


def _cut_out(number: int, stage: Stage) -> Array:
    """A window around one of the objects of a clip, where it is in the middle of the frames taken."""
    rng = np.random.default_rng([SEED, number, 1])
    scene = make_scene(SEED, number)
    first = int(rng.integers(NUM_FRAMES - stage.num_frames + 1))
    subject = scene.subjects[rng.integers(len(scene.subjects))]
    travel = SPEEDS[subject.speed] * SIDE * (first + stage.num_frames // 2)
    middle = np.array(subject.centre) + np.array(DIRECTIONS[subject.direction]) * travel + rng.uniform(-12, 12, 2)
    x, y = np.clip(middle.round().astype(int) - stage.side // 2, 0, SIDE - stage.side)
    video = render(scene, frames=range(first, first + stage.num_frames))
    return video[:, y : y + stage.side, x : x + stage.side]


def edge_weight(video: Tensor) -> Tensor:
    """Weight of every pixel in the loss, [B, 1, F, H, W]: more where neighbours differ."""
    across = functional.pad((video[..., 1:] - video[..., :-1]).abs().amax(1, keepdim=True), (0, 1))
    down = functional.pad((video[..., 1:, :] - video[..., :-1, :]).abs().amax(1, keepdim=True), (0, 0, 0, 1))
    edges = functional.max_pool3d(torch.maximum(across, down), (1, 3, 3), stride=1, padding=(0, 1, 1))
    return 1 + EDGE_WEIGHT * edges.clamp_max(1)


def losses(vae: VAE | VAE22, video: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
    """What training lowers, and its parts for the log."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_variance = vae.encode(video)
    mean, log_variance = mean.float(), log_variance.float()
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(step))
    with torch.autocast("cpu", torch.bfloat16):
        decoded = vae.decode(mean + noise * (0.5 * log_variance).exp())
    error = decoded.float() - video
    fit = (edge_weight(video) * (error.abs() + error.square())).mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return fit + KL_WEIGHT * kl, {"fit": fit.item(), "kl": kl.item(), "mse": error.square().mean().item()}


def main() -> None:
    """Train until all steps are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--version", choices=NAMES, default="2.1")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    vae = make_vae(options.version)
    # A latent of 2.2 covers twice the rows and columns.
    stages = [stage._replace(side=min(SIDE, stage.side * (1 + (options.version == "2.2")))) for stage in STAGES]
    optimizer = Both(vae, adam=("encoder.conv1", "decoder.head"), lr=PEAK, adam_lr=PEAK)
    num_steps = sum(stage.num_steps for stage in stages)
    run = Run(options.folder, NAMES[options.version], {"model": vae, "optimizer": optimizer})

    def take_step(step: int) -> dict[str, float]:
        loss, values = losses(vae, batch(step, stages), step)
        loss.backward()
        optimizer.step(learning_rate(step, num_steps))
        return values

    sys.exit(0 if run.train(num_steps, take_step) else INTERRUPTED)


if __name__ == "__main__":
    main()
