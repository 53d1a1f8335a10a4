"""Makes the sibling of TI2V-5B: one transformer on the latents of the 2.2 VAE, from a caption alone or with a picture.

Usage: python train_vae.py RUN_FOLDER --version 2.2
       python latents.py RUN_FOLDER --version 2.2
       python train_ti2v.py RUN_FOLDER ti2v
       python train_ti2v.py RUN_FOLDER ti2v_refined
       python train_ti2v.py RUN_FOLDER evaluate

A picture is the first latent frame, given clean with a timestep of 0 for its tokens; half of a batch has one.
The text encoder is the one that the text-to-video model brought up. Where things are is learnt first, from noise levels
as the sampler visits them; `ti2v_refined` goes on with more of the lower ones, at which shapes are decided.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from data import make_scene, render
from dit_model import DiTSizes, draw_sigmas, timestep_of
from evaluate import decode, latent_shape, sample, times_per_token, write_sheet
from evaluate_vae import load_vae
from latents import load_latents, load_statistics
from optimizer import Both
from torch import Tensor
from train_dit import Model, Part, captions_of, load_average
from training import INTERRUPTED, Average, Run, learning_rate, wait_while_paused
from vae22_model import VAE22, Z_DIM
from vae_model import VAE

from wanfast.judge import Array, accuracies, judge

SEED = 6
SHIFT, GUIDANCE = 5.0, (5.0,)
BATCH, DECAY = 64, 0.998
NUM_JUDGED = 100
_BATCH = 20  # clips that are sampled at a time

PARTS = {"ti2v": Part(0.0, 1.0, SHIFT, 4000, 0.006), "ti2v_refined": Part(0.0, 1.0, 2.0, 2500, 0.004)}


def make_model(text: dict[str, Tensor], sizes: DiTSizes | None = None) -> Model:
    """A fresh transformer with a text encoder that stays as it is."""
    torch.manual_seed(SEED)
    model = Model(sizes or DiTSizes(in_channels=Z_DIM, out_channels=Z_DIM))
    model.text.load_state_dict(text)
    model.text.requires_grad_(False)
    return model


def loss(model: Model, clips: Tensor, part: Part, step: int) -> Tensor:
    """Mean squared error of the velocity on the batch of a step, but for frames that are given."""
    rng, generator = np.random.default_rng([SEED, step]), torch.Generator().manual_seed(step)
    numbers = rng.integers(len(clips), size=BATCH)
    captions = captions_of(rng, numbers)
    sigmas = draw_sigmas(BATCH, part.shift, part.low, part.high, generator)
    clean = clips[torch.from_numpy(numbers)]
    noise = torch.randn(clean.shape, generator=generator)
    noisy = torch.lerp(clean, noise, sigmas[:, None, None, None, None])
    is_given = torch.arange(BATCH) % 2 == 0
    noisy[is_given, :, 0] = clean[is_given, :, 0]
    times = times_per_token(timestep_of(sigmas), is_given, latent_shape(model))
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model.dit(noisy, times, model.read(captions))
    error = (velocity - (noise - clean)).square()
    error[is_given, :, 0] = 0
    return error.mean()


def train(folder: Path, name: str) -> bool:
    """Train, or go on from what the first training came to; whether it is done."""
    part = PARTS[name]
    clips = load_latents(folder, "2.2")
    base = load_average(folder, "base")
    model = make_model({name.removeprefix("text."): value for name, value in base.items() if name.startswith("text.")})
    taken = 0
    if name == "ti2v_refined":
        model.load_state_dict(load_average(folder, "ti2v"))
        taken = PARTS["ti2v"].num_steps  # its batches were others
    optimizer = Both(
        model, ("dit.patch_embedding", "dit.head"), part.peak, part.peak / 5, weight_decay=0.01, dtype=torch.bfloat16
    )
    average = Average(model, DECAY)
    run = Run(folder, name, {"model": model, "optimizer": optimizer, "average": average})

    def take_step(step: int) -> dict[str, float]:
        value = loss(model, clips, part, taken + step)
        value.backward()
        optimizer.step(learning_rate(step, part.num_steps))
        average.update(step)
        return {"loss": value.item()}

    return run.train(part.num_steps, take_step)


def encode_pictures(vae: VAE | VAE22, frames: Array, folder: Path) -> Tensor:
    """Encode pictures [B, H, W, 3] in [0, 1] to normalised latents [B, 48, 1, 4, 4]."""
    mean, deviation = (value[:, None, None, None] for value in load_statistics(folder, "2.2"))
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)[:, :, None] * 2 - 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(video.contiguous(memory_format=torch.channels_last_3d))[0].float()
    return (latents - mean) / deviation


def evaluate(folder: Path) -> dict[str, object]:
    """Judge held-out captions, from the caption alone and with the first frame given."""
    vae = load_vae(folder, "2.2")
    model = make_model({name: value for name, value in Model().text.state_dict().items()})
    model.load_state_dict(load_average(folder, "ti2v_refined"))
    model.eval()
    scenes = [make_scene(1004, index, kind="single", held_out=True) for index in range(NUM_JUDGED)]
    captions = [scene.caption for scene in scenes]
    pictures = np.concatenate([render(scene, frames=[0]) for scene in scenes])
    clips: dict[str, list[Array]] = {"caption": [], "picture": []}
    for first in range(0, len(scenes), _BATCH):
        wait_while_paused(folder)
        given = encode_pictures(vae, pictures[first : first + _BATCH], folder)
        for kind, first_frame in (("caption", None), ("picture", given)):
            latents = sample(
                [model], captions[first : first + _BATCH], steps=40, shift=SHIFT, guidance=GUIDANCE, seed=first,
                first_frame=first_frame,
            )  # fmt: skip
            clips[kind] += decode(vae, latents, folder)
    judged: dict[str, object] = {}
    for kind, made in clips.items():
        judged[kind] = accuracies([judge(clip, caption) for clip, caption in zip(made, captions, strict=True)])
        write_sheet(made[:16], folder / f"sheet_ti2v_{kind}.png")
    error = np.mean([np.square(clip[0] - one) for clip, one in zip(clips["picture"], pictures, strict=True)])
    return judged | {"first frame PSNR": float(-10 * np.log10(error))}


def main() -> None:
    """Take one of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=[*PARTS, "evaluate"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.part == "evaluate":
        print(json.dumps(evaluate(options.folder), indent=1))
    elif not train(options.folder, options.part):
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
