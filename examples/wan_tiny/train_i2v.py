"""Makes the image-to-video pair: both experts learn on, with the first frame given in twenty more channels.

Usage: python train_i2v.py RUN_FOLDER conditions
       python train_i2v.py RUN_FOLDER high_noise
       python train_i2v.py RUN_FOLDER low_noise
       python train_i2v.py RUN_FOLDER evaluate

The channels are Wan's: four of mask, 1 in the latent frame that is known, then the latents of a clip that is the given
frame and otherwise grey. Their weights start at zero, so the experts start as they are.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from data import NUM_FRAMES, make_scene, render
from dit_model import DiTSizes, draw_sigmas, timestep_of
from evaluate import decode, sample, write_sheet
from evaluate_vae import load_vae
from latents import NUM_CLIPS, PIECE, load_latents, load_statistics
from latents import SEED as CLIPS_SEED
from optimizer import Both
from torch import Tensor
from train_dit import Model, captions_of, load_average
from training import INTERRUPTED, Average, Run, learning_rate, wait_while_paused
from vae22_model import VAE22
from vae_model import VAE

from wanfast.judge import Array, accuracies, judge

SEED = 5
BOUNDARY, SHIFT, GUIDANCE = 0.9, 5.0, (3.5, 3.5)
MASK_CHANNELS = 4
RANGES = {"high_noise": (BOUNDARY, 1.0), "low_noise": (0.0, BOUNDARY)}  # of sigma
NUM_STEPS, BATCH, PEAK, DECAY = 800, 64, 0.003, 0.998
NUM_JUDGED = 100
_BATCH = 20  # clips that are encoded or sampled at a time


def make_model(state: dict[str, Tensor] | None = None, sizes: DiTSizes | None = None) -> Model:
    """A transformer that takes a condition; its weights, or a text-to-video expert's, from which it starts."""
    torch.manual_seed(SEED)
    sizes = sizes or DiTSizes(in_channels=16 + MASK_CHANNELS + 16)
    model = Model(sizes)
    if state is not None:
        name = "dit.patch_embedding.weight"
        weight = torch.zeros_like(model.state_dict()[name])
        weight[:, : state[name].shape[1]] = state[name]
        model.load_state_dict({**state, name: weight})
    return model


def encode_first_frames(vae: VAE | VAE22, frames: Array, folder: Path) -> Tensor:
    """Encode pictures [B, H, W, 3] in [0, 1], each followed by grey frames, to normalised latents [B, 16, 5, 8, 8]."""
    video = torch.zeros(len(frames), 3, NUM_FRAMES, *frames.shape[1:3])
    video[:, :, 0] = torch.from_numpy(frames).permute(0, 3, 1, 2) * 2 - 1
    mean, deviation = (value[:, None, None, None] for value in load_statistics(folder))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(video.contiguous(memory_format=torch.channels_last_3d))[0].float()
    return (latents - mean) / deviation


def with_mask(latents: Tensor) -> Tensor:
    """Put the mask before encoded first frames: [B, 4 + 16, 5, 8, 8]."""
    mask = torch.zeros(len(latents), MASK_CHANNELS, *latents.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents.float()], dim=1)


def write_conditions(folder: Path) -> None:
    """Encode the first frame of every training clip; pieces that are there are kept."""
    vae = load_vae(folder)
    (folder / "conditions").mkdir(exist_ok=True)
    for first in range(0, NUM_CLIPS, PIECE):
        path = folder / "conditions" / f"{first:06}.pt"
        if path.exists():
            continue
        encoded = []
        for start in range(first, first + PIECE, _BATCH):
            wait_while_paused(folder)
            numbers = range(start, min(start + _BATCH, first + PIECE))
            frames = np.concatenate([render(make_scene(CLIPS_SEED, number), frames=[0]) for number in numbers])
            encoded.append(encode_first_frames(vae, frames, folder).half())
        torch.save(torch.cat(encoded), path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)


def loss(model: Model, clips: Tensor, conditions: Tensor, sigma_range: tuple[float, float], step: int) -> Tensor:
    """Mean squared error of the velocity on the batch of a step."""
    rng, generator = np.random.default_rng([SEED, step]), torch.Generator().manual_seed(step)
    numbers = rng.integers(len(clips), size=BATCH)
    captions = captions_of(rng, numbers)
    sigmas = draw_sigmas(BATCH, SHIFT, *sigma_range, generator)
    clean = clips[torch.from_numpy(numbers)]
    noise = torch.randn(clean.shape, generator=generator)
    noisy = torch.lerp(clean, noise, sigmas[:, None, None, None, None])
    inputs = torch.cat([noisy, with_mask(conditions[torch.from_numpy(numbers)])], dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model.dit(inputs, timestep_of(sigmas), model.read(captions))
    return (velocity - (noise - clean)).square().mean()


def train(folder: Path, name: str) -> bool:
    """Train one expert; whether it is done."""
    clips = load_latents(folder)
    pieces = range(0, NUM_CLIPS, PIECE)
    conditions = torch.cat([torch.load(folder / "conditions" / f"{n:06}.pt", weights_only=True) for n in pieces])
    model = make_model(load_average(folder, name))
    model.text.requires_grad_(False)
    optimizer = Both(
        model, ("dit.patch_embedding", "dit.head"), PEAK, PEAK / 5, weight_decay=0.01, dtype=torch.bfloat16
    )
    average = Average(model, DECAY)
    run = Run(folder, f"i2v_{name}", {"model": model, "optimizer": optimizer, "average": average})

    def take_step(step: int) -> dict[str, float]:
        value = loss(model, clips, conditions, RANGES[name], step)
        value.backward()
        optimizer.step(learning_rate(step, NUM_STEPS))
        average.update(step)
        return {"loss": value.item()}

    return run.train(NUM_STEPS, take_step)


def evaluate(folder: Path) -> dict[str, object]:
    """Let held-out clips go on from their first frame: is that frame kept, does the motion follow the caption?"""
    vae = load_vae(folder)
    experts = [make_model(load_average(folder, f"i2v_{name}")).eval() for name in RANGES]
    scenes = [make_scene(1003, index, kind="single", held_out=True) for index in range(NUM_JUDGED)]
    pictures = np.concatenate([render(scene, frames=[0]) for scene in scenes])
    clips: list[Array] = []
    for first in range(0, len(scenes), _BATCH):
        wait_while_paused(folder)
        condition = with_mask(encode_first_frames(vae, pictures[first : first + _BATCH], folder))
        captions = [scene.caption for scene in scenes[first : first + _BATCH]]
        latents = sample(
            experts, captions, steps=40, shift=SHIFT, guidance=GUIDANCE, seed=first, boundary=BOUNDARY,
            condition=condition,
        )  # fmt: skip
        clips += decode(vae, latents, folder)
    verdicts = [judge(clip, scene.caption) for clip, scene in zip(clips, scenes, strict=True)]
    error = np.mean([np.square(clip[0] - picture) for clip, picture in zip(clips, pictures, strict=True)])
    write_sheet(clips[:16], folder / "sheet_i2v.png")
    return {"following": accuracies(verdicts), "first frame PSNR": float(-10 * np.log10(error))}


def main() -> None:
    """Take one of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=["conditions", *RANGES, "evaluate"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.part == "conditions":
        write_conditions(options.folder)
    elif options.part == "evaluate":
        print(json.dumps(evaluate(options.folder), indent=1))
    elif not train(options.folder, options.part):
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
