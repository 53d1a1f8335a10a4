"""Measures what guidance and the negative prompt do to the built-in model, by what its clips show.

Usage: python steering.py > results/steering.json

Guidance: held-out captions at several strengths; how many clips follow theirs. Negative prompt: a caption that leaves
the background open, and the same with each background in the negative prompt; how often that background appears.
"""

import argparse
import json
from collections import Counter

import numpy as np
import torch
from data import BACKGROUNDS

import wanfast
from wanfast.judge import Array, accuracies, judge
from wanfast.verify import held_out_captions

STRENGTHS = (1.0, 2.0, 4.0)
CAPTION = "a red circle moves left"


def clip_of(pipeline: wanfast.Pipeline, prompt: str, seed: int, **settings: object) -> Array:
    """One clip in [0, 1]."""
    video = pipeline.generate(prompt, seed=seed, **settings)  # type: ignore[arg-type]
    assert isinstance(video, wanfast.Video)
    return video.frames.numpy().astype(np.float32) / 255


def background_of(clip: Array) -> str:
    """The name of the background's colour: that of the pixels nearest to it on the whole."""
    middle = np.median(clip.reshape(-1, 3), axis=0)
    return min(BACKGROUNDS, key=lambda name: float(np.abs(middle - np.array(BACKGROUNDS[name])).sum()))


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = wanfast.load(device="cpu")
    captions = list(enumerate(held_out_captions()))[: options.captions]
    following = {
        f"guidance {strength:g}": accuracies(
            [judge(clip_of(pipeline, text, seed, guidance=strength), text) for seed, text in captions]
        )
        for strength in STRENGTHS
    }
    shown = {}
    for name in (None, *BACKGROUNDS):
        avoided = None if name is None else f"{CAPTION} on a {name} background"
        clips = (clip_of(pipeline, CAPTION, seed, negative_prompt=avoided) for seed in range(options.seeds))
        shown["no negative prompt" if name is None else f"not {name}"] = dict(Counter(map(background_of, clips)))
    print(json.dumps({"captions": len(captions), "following": following, "backgrounds": shown}, indent=1))


if __name__ == "__main__":
    main()
