"""Encodes the training clips once; what the transformer is trained on.

    python latents.py RUN_FOLDER
    python latents.py RUN_FOLDER --version 2.2    # for TI2V

Pieces that are there already are kept, so it can be stopped at any time.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from data import make_scene, render
from evaluate_vae import load_vae
from torch import Tensor
from training import wait_while_paused

SEED = 2
FOLDERS = {"2.1": "latents", "2.2": "latents22"}  # by version of the VAE
NUM_CLIPS = 8000
PIECE = 500
_BATCH = 4


def load_latents(folder: Path, version: str = "2.1") -> Tensor:
    """Latents of all clips with a mean of 0 and a deviation of 1 per channel, by number of the clip.

    [N, 16, 5, 8, 8] by the VAE of version 2.1, [N, 48, 5, 4, 4] by that of 2.2.
    """
    pieces = [torch.load(_path(folder, version, first), weights_only=True) for first in range(0, NUM_CLIPS, PIECE)]
    mean, deviation = load_statistics(folder, version)
    return (torch.cat(pieces).float() - mean[:, None, None, None]) / deviation[:, None, None, None]


def load_statistics(folder: Path, version: str = "2.1") -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every latent channel over the first piece, [C] each."""
    values = torch.load(_path(folder, version, 0), weights_only=True).float().transpose(0, 1).flatten(1)
    return values.mean(1), values.std(1)


def _path(folder: Path, version: str, first: int) -> Path:
    return folder / FOLDERS[version] / f"{first:06}.pt"


def main() -> None:
    """Encode what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--version", choices=FOLDERS, default="2.1")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    vae = load_vae(options.folder, options.version)
    (options.folder / FOLDERS[options.version]).mkdir(exist_ok=True)
    for first in range(0, NUM_CLIPS, PIECE):
        path = _path(options.folder, options.version, first)
        if path.exists():
            continue
        encoded = []
        for start in range(first, first + PIECE, _BATCH):
            wait_while_paused(options.folder)
            numbers = range(start, min(start + _BATCH, first + PIECE))
            clips = np.stack([render(make_scene(SEED, number)) for number in numbers])
            video = torch.from_numpy(clips).permute(0, 4, 1, 2, 3) * 2 - 1
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                encoded.append(vae.encode(video.contiguous(memory_format=torch.channels_last_3d))[0].half())
        temporary = path.with_suffix(".part")
        torch.save(torch.cat(encoded).contiguous(), temporary)
        os.replace(temporary, path)


if __name__ == "__main__":
    main()
