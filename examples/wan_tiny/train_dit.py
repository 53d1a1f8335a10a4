"""Trains the transformers by flow matching: first one for all noise levels, then from it an expert for each side.

    python train_dit.py RUN_FOLDER base
    python train_dit.py RUN_FOLDER high_noise
    python train_dit.py RUN_FOLDER low_noise

The text encoder learns together with the first and then stays as it is, since both experts read the same text.
Stop it at any time (SIGTERM) and start it again: it goes on from its last checkpoint.
"""

import argparse
import sys
from pathlib import Path
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np
import torch
from data import describe, make_scene
from dit_model import BOUNDARY, DiT, DiTSizes, Text, draw_sigmas, timestep_of
from latents import SEED as CLIPS_SEED
from latents import load_latents
from numpy.typing import NDArray
from optimizer import Both
from text_model import TextEncoder, make_tokenizer, tokenize
from torch import Tensor, nn
from training import INTERRUPTED, Average, Run, learning_rate

SEED = 3
BATCH = 64
DROPPED = 0.1  # captions left away, for guidance
STRANGE = 0.1  # captions with a word of no meaning
DECAY = 0.998  # of the moving average


class Part(NamedTuple):
    """One training: on which noise levels, how long and how fast."""

    low: float  # sigma
    high: float
    shift: float
    num_steps: int
    peak: float


PARTS = {
    "base": Part(0.0, 1.0, 5.0, 3000, 0.006),
    "high_noise": Part(BOUNDARY, 1.0, 12.0, 1500, 0.003),
    "low_noise": Part(0.0, BOUNDARY, 5.0, 1500, 0.003),
}


class Model(nn.Module):
    """A transformer and the text encoder it reads."""

    def __init__(self, sizes: DiTSizes | None = None) -> None:
        super().__init__()
        self.dit = DiT(sizes or DiTSizes())
        self.text = TextEncoder()
        self.tokenizer = make_tokenizer()

    def read(self, captions: list[str]) -> Text:
        """Encode captions."""
        ids, lengths = tokenize(self.tokenizer, captions)
        return Text(self.text(ids, lengths), lengths)

    def forward(self, latents: Tensor, sigmas: Tensor, captions: list[str]) -> Tensor:
        """Predict the velocity of noisy latents [B, C, F, H, W] at noise levels [B]."""
        return self.dit(latents, timestep_of(sigmas), self.read(captions))


def make_model(name: str, folder: Path) -> Model:
    """A model to train: fresh, or for an expert what the common training came to."""
    torch.manual_seed(SEED)
    model = Model()
    if name != "base":
        model.load_state_dict(load_average(folder, "base"))
        model.text.requires_grad_(False)
    return model


def load_average(folder: Path, name: str) -> dict[str, Tensor]:
    """Averaged parameters of a training's newest checkpoint."""
    saved = torch.load(folder / f"{name}.pt", weights_only=True)
    average: dict[str, Tensor] = saved["average"]
    return average


def vary(rng: np.random.Generator, caption: str) -> str:
    """Leave a caption away now and then, or put a word of no meaning into it, so that unknown words do no harm."""
    if rng.random() < DROPPED:
        return ""
    words = caption.split(" ")
    if rng.random() < STRANGE:
        letters = rng.choice(list(ascii_lowercase), size=rng.integers(2, 8))
        words.insert(int(rng.integers(len(words) + 1)), "".join(letters))
    return " ".join(words)


def captions_of(rng: np.random.Generator, numbers: NDArray[np.int64]) -> list[str]:
    """Describe clips by number, as training wants it."""
    return [vary(rng, describe(rng, make_scene(CLIPS_SEED, int(number)))) for number in numbers]


def loss(model: Model, clips: Tensor, part: Part, step: int) -> Tensor:
    """Mean squared error of the velocity on the batch of a step."""
    rng, generator = np.random.default_rng([SEED, step]), torch.Generator().manual_seed(step)
    numbers = rng.integers(len(clips), size=BATCH)
    captions = captions_of(rng, numbers)
    sigmas = draw_sigmas(BATCH, part.shift, part.low, part.high, generator)
    clean = clips[torch.from_numpy(numbers)]
    noise = torch.randn(clean.shape, generator=generator)
    noisy = torch.lerp(clean, noise, sigmas[:, None, None, None, None])
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(noisy, sigmas, captions)
    return (velocity - (noise - clean)).square().mean()


def main() -> None:
    """Train until all steps are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    part = PARTS[options.part]
    clips = load_latents(options.folder)
    model = make_model(options.part, options.folder)
    adam = ("dit.patch_embedding", "dit.head", "text.token_embedding", "text.blocks.0.pos", "text.blocks.1.pos")
    optimizer = Both(model, adam, lr=part.peak, adam_lr=part.peak / 5, weight_decay=0.01, dtype=torch.bfloat16)
    average = Average(model, DECAY)
    run = Run(options.folder, options.part, {"model": model, "optimizer": optimizer, "average": average})

    def take_step(step: int) -> dict[str, float]:
        value = loss(model, clips, part, step)
        value.backward()
        optimizer.step(learning_rate(step, part.num_steps))
        average.update(step)
        return {"loss": value.item()}

    sys.exit(0 if run.train(part.num_steps, take_step) else INTERRUPTED)


if __name__ == "__main__":
    main()
