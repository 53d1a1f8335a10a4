"""Judges the VAE alone: what can still be read from clips that it has encoded and decoded.

python evaluate_vae.py RUN_FOLDER
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from data import make_scene, render
from train_vae import NAMES, make_vae
from vae22_model import VAE22
from vae_model import VAE

from wanfast.judge import accuracies, judge, see, wanted

SEED = 1001  # no clip of the training
REQUIRED = 0.97  # of shapes; what the VAE loses, no transformer can bring back
RANGES = {"0": slice(0, 1), "1-4": slice(1, 5), "5-12": slice(5, 13), "13-16": slice(13, 17)}
KINDS = (("single", True), ("pair", False), ("camera", False))  # and whether of held-out combinations


def load_vae(folder: Path, version: str = "2.1") -> VAE | VAE22:
    """The VAE of a run's newest checkpoint."""
    state = torch.load(folder / f"{NAMES[version]}.pt", weights_only=True)["model"]
    vae = make_vae(version, base=state["encoder.conv1.bias"].shape[0])
    vae.load_state_dict(state)
    return vae.eval()


def main() -> None:
    """Print accuracies by kind of clip and by range of frames."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--still", action="store_true", help="encode every frame alone; single objects only")
    parser.add_argument("--require", action="store_true", help=f"fail where shapes are below {REQUIRED}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--version", choices=NAMES, default="2.1")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    vae = load_vae(options.folder, options.version)
    shapes = []
    for kind, held_out in KINDS[: 1 if options.still else None]:
        scenes = [make_scene(SEED, index, kind=kind, held_out=held_out) for index in range(options.clips)]
        clips = [render(scene) for scene in scenes]
        decoded = [reconstruct(vae, clip, still=options.still) for clip in clips]
        captions = [scene.caption for scene in scenes]
        rates = accuracies([judge(clip, caption) for clip, caption in zip(decoded, captions, strict=True)])
        errors = np.stack([np.square(a - b) for a, b in zip(decoded, clips, strict=True)])
        print(f"{kind:7} PSNR {_psnr(errors)}  " + " ".join(f"{key} {value:.3f}" for key, value in rates.items()))
        shapes.append(rates["shape"])
        for name, frames in RANGES.items() if kind == "single" else ():
            right = np.mean([_shapes_right(*pair, frames) for pair in zip(decoded, captions, strict=True)])
            print(f"        frames {name:6} PSNR {_psnr(errors[:, frames])}  colour and shape {right:.3f}")
            shapes.append(float(right))
    sys.exit(1 if options.require and min(shapes) < REQUIRED else 0)


def _psnr(errors: np.ndarray) -> str:
    return f"{-10 * np.log10(errors.mean()):.1f} dB"


def _shapes_right(clip: np.ndarray, caption: str, frames: slice) -> float:
    """Fraction of frames that show the wanted shape in the wanted colour."""
    want = wanted(caption)[0]
    found = [object_ for object_ in see(clip[frames]) if object_.colour == want.colour]
    return float(np.mean([shape == want.shape for shape in found[0].shapes])) if found else 0.0


def reconstruct(vae: VAE | VAE22, clip: np.ndarray, *, still: bool = False) -> np.ndarray:
    """Encode and decode a clip [F, H, W, 3] in [0, 1], or every frame alone."""
    video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None] * 2 - 1
    if still:
        video = video[0].transpose(0, 1)[:, :, None]
    with torch.no_grad():
        decoded = vae.decode(vae.encode(video.contiguous(memory_format=torch.channels_last_3d))[0])
    if still:
        decoded = decoded[:, :, 0].transpose(0, 1)[None]
    pixels: np.ndarray = (decoded[0].permute(1, 2, 3, 0).clamp(-1, 1) / 2 + 0.5).numpy()
    return pixels


if __name__ == "__main__":
    main()
