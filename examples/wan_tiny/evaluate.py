"""Asks the judge how well the transformers follow captions that training never saw.

    python evaluate.py RUN_FOLDER                      both experts
    python evaluate.py RUN_FOLDER --parts base         one network for all noise levels
    python evaluate.py RUN_FOLDER --parts low_noise    one expert over all of them

It samples many captions at a time, and writes a sheet of the first clips.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from data import NUM_FRAMES, SIDE, make_scene
from dit_model import BOUNDARY
from evaluate_vae import load_vae
from latents import load_statistics
from PIL import Image
from torch import Tensor
from train_dit import Model, load_average
from training import wait_while_paused
from vae22_model import VAE22, Z_DIM
from vae_model import VAE

from wanfast.judge import Array, accuracies, background_change, flicker, judge

SEED = 1002  # of the captions
SHEET_FRAMES = (0, 5, 10, 16)
_BATCH = 25


def load_model(folder: Path, part: str) -> Model:
    """The averaged network of one training."""
    model = Model()
    model.load_state_dict(load_average(folder, part))
    return model.eval()


def sample(
    experts: Sequence[Model],
    captions: list[str],
    *,
    steps: int,
    shift: float,
    guidance: Sequence[float],
    seed: int,
    boundary: float = BOUNDARY,
    condition: Tensor | None = None,
    first_frame: Tensor | None = None,
) -> Tensor:
    """Draw latents for captions, [B, C, F, H, W] in the size the experts were trained for.

    Args:
        experts: high noise and low noise; one stands for both.
        captions: B of them.
        steps: of the solver.
        shift: of the schedule.
        guidance: of each expert.
        seed: of the noise; caption number i starts from the noise of seed + i.
        boundary: sigma from which on the first expert works.
        condition: channels that stand behind the latents, [B, C, F, H, W].
        first_frame: latents to begin with, [B, C, 1, H, W], for which it is timestep 0 throughout.

    The solver is DPM-Solver++ 2M: it carries the clean latents that a velocity implies on along a straight line.
    Source: arXiv 2211.01095.
    """
    shape = latent_shape(experts[0])
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(captions))]
    latents, before, step_before = torch.stack(noise), None, math.inf
    for sigma, next_sigma in pairwise(noise_levels(steps, shift)):
        expert, scale = (experts[0], guidance[0]) if sigma >= boundary else (experts[-1], guidance[-1])
        times = torch.full((2 * len(captions),), float(int(1000 * sigma)))
        if first_frame is not None:
            latents[:, :, :1] = first_frame
            times = times_per_token(times, torch.ones_like(times, dtype=torch.bool), shape)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            text = expert.read(captions + [""] * len(captions))
            inputs = latents if condition is None else torch.cat([latents, condition], dim=1)
            with_text, without = expert.dit(inputs.repeat(2, 1, 1, 1, 1), times, text).chunk(2)
        clean = latents - sigma * (without + scale * (with_text - without))
        step = _log_ratio(next_sigma) - _log_ratio(sigma)
        slope = 0.0 if before is None or math.isinf(step) else (clean - before) * (step / step_before)
        latents = next_sigma / sigma * latents + (1 - next_sigma) * (1 - math.exp(-step)) * (clean + 0.5 * slope)
        before, step_before = clean, step
    if first_frame is not None:
        latents[:, :, :1] = first_frame
    return latents


def latent_shape(model: Model) -> tuple[int, int, int, int]:
    """[C, F, H, W] of the latents a model was trained on: those of the VAE with 48 channels are half as wide."""
    channels = model.dit.sizes.out_channels
    side = SIDE // (16 if channels == Z_DIM else 8)
    return channels, (NUM_FRAMES - 1) // 4 + 1, side, side


def times_per_token(times: Tensor, is_given: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Timesteps [B, L] of tokens from those of clips [B]; where the first frame is given, its tokens' are 0."""
    in_frame = shape[2] // 2 * (shape[3] // 2)
    spread = times[:, None].repeat(1, shape[1] * in_frame)
    spread[is_given, :in_frame] = 0
    return spread


def noise_levels(steps: int, shift: float) -> list[float]:
    """Sigmas from 1 to 0, denser near 1 the larger the shift is."""
    levels = [1 - index / steps for index in range(steps + 1)]
    return [shift * level / (1 + (shift - 1) * level) for level in levels]


def _log_ratio(sigma: float) -> float:
    """Signal to noise: its differences are the lengths of steps."""
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0.0 else -math.inf
    return math.log((1 - sigma) / sigma)


def decode(vae: VAE | VAE22, latents: Tensor, folder: Path) -> list[Array]:
    """Turn normalised latents into clips [F, H, W, 3] in [0, 1]."""
    mean, deviation = load_statistics(folder, "2.2" if isinstance(vae, VAE22) else "2.1")
    clips = []
    for one in latents * deviation[:, None, None, None] + mean[:, None, None, None]:
        with torch.no_grad():
            video = vae.decode(one[None])[0].clamp(-1, 1) / 2 + 0.5
        clips.append(video.permute(1, 2, 3, 0).numpy())
    return clips


def write_sheet(clips: Sequence[Array], path: Path) -> None:
    """Write a picture with a few frames of every clip in a row."""
    rows = [np.concatenate([clip[frame] for frame in SHEET_FRAMES], axis=1) for clip in clips]
    half = (len(rows) + 1) // 2
    rows += [np.zeros_like(rows[0])] * (2 * half - len(rows))
    sheet = np.concatenate([np.concatenate(rows[:half]), np.concatenate(rows[half:])], axis=1)
    image = Image.fromarray((sheet * 255).round().astype(np.uint8))
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Sample, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="+", default=["high_noise", "low_noise"])
    parser.add_argument("--kind", default="single", choices=["single", "pair", "camera"])
    parser.add_argument("--seen", action="store_true", help="combinations of the training instead of held-out ones")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--shift", type=float, default=12.0)
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0, 3.0], help="high noise, low noise")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    experts = [load_model(options.folder, part) for part in options.parts]
    vae = load_vae(options.folder)
    scenes = [make_scene(SEED, i, kind=options.kind, held_out=not options.seen) for i in range(options.captions)]
    captions = [scene.caption for scene in scenes]
    start, clips = time.process_time(), []
    for first in range(0, len(captions), _BATCH):
        wait_while_paused(options.folder)
        latents = sample(
            experts, captions[first : first + _BATCH], steps=options.steps, shift=options.shift,
            guidance=options.guidance, seed=first,
        )  # fmt: skip
        clips += decode(vae, latents, options.folder)
    verdicts = [judge(clip, caption) for clip, caption in zip(clips, captions, strict=True)]
    shuffled = [judge(clip, caption) for clip, caption in zip(clips, captions[7:] + captions[:7], strict=True)]
    result = {
        "settings": vars(options) | {"folder": None},
        "following": accuracies(verdicts),
        "shuffled captions": accuracies(shuffled),
        "flicker": float(np.mean([flicker(clip) for clip in clips])),
        "background change": float(np.nanmean([background_change(clip) for clip in clips])),
        "CPU seconds": round(time.process_time() - start),
    }
    print(json.dumps(result, indent=1))
    write_sheet(clips[:16], options.folder / f"sheet_{'_'.join(options.parts)}_{options.kind}.png")


if __name__ == "__main__":
    main()
