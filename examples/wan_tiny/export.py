"""Writes the trained parts as a checkpoint in the layout of Wan-AI/Wan2.2-T2V-A14B, in bf16.

Usage: python export.py RUN_FOLDER CHECKPOINT_FOLDER
       python export.py RUN_FOLDER CHECKPOINT_FOLDER --task i2v
       python export.py RUN_FOLDER CHECKPOINT_FOLDER --task ti2v

The official layout has no place for the latents' statistics: every reader of it takes Wan's own. They are folded into
the two 1 x 1 x 1 convolutions next to the latents instead, so that Wan's statistics become true of this VAE.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from dit_model import EPS, FREQ_DIM, HEAD_DIM, TEXT_LEN
from evaluate_vae import load_vae
from latents import load_statistics
from safetensors.torch import save_file
from text_model import make_tokenizer
from torch import Tensor
from train_dit import load_average

from wanfast.config import T2V_A14B, VAE_2_1, VAE_2_2, VAEConfig

DEFAULTS = {"width": 64, "height": 64, "num_frames": 17, "num_inference_steps": 40}


def export(run: Path, target: Path, task: str = "t2v") -> None:
    """Write a checkpoint folder.

    Args:
        run: folder of the trainings, all of them with a checkpoint.
        target: to write; may exist, its files of these names are replaced.
        task: "t2v", or "i2v" or "ti2v", whose transformers are in trainings of their own.
    """
    target.mkdir(parents=True, exist_ok=True)
    name = "wan-tiny" if task == "t2v" else f"wan-tiny-{task}"
    (target / "wanfast.json").write_text(json.dumps({"name": name, **DEFAULTS}, indent=1))
    for training, folder in _transformers(task).items():
        (target / folder).mkdir(exist_ok=True)
        dit = _part(load_average(run, training), "dit.")
        (target / folder / "config.json").write_text(json.dumps(official_config(dit, task), indent=1))
        save_file(_rounded(dit), target / folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    text = _rounded(_part(load_average(run, "base"), "text."))
    torch.save(text, target / "models_t5_umt5-xxl-enc-bf16.pth")
    row = VAE_2_2 if task == "ti2v" else VAE_2_1
    vae = fold_statistics(load_vae(run, row.version).state_dict(), *load_statistics(run, row.version), row)
    torch.save(_rounded(vae), target / f"Wan{row.version}_VAE.pth")
    tokenizer = target / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save(str(tokenizer / "tokenizer.json"))


def _transformers(task: str) -> dict[str, str]:
    """Folders of a checkpoint's transformers by the trainings they come from."""
    if task == "ti2v":
        return {"ti2v": ""}
    prefix = "" if task == "t2v" else f"{task}_"
    return {prefix + expert.name: f"{expert.name}_model" for expert in T2V_A14B.experts}


def fold_statistics(vae: Mapping[str, Tensor], mean: Tensor, deviation: Tensor, row: VAEConfig) -> dict[str, Tensor]:
    """Make a VAE's latents have Wan's mean and deviation where they had their own.

    Args:
        vae: tensors by official name.
        mean: of the latents it gives, [C].
        deviation: likewise.
        row: Wan's own VAE of its kind.

    Returns:
        All tensors; the same function from pixels to pixels.
    """
    wan_mean, wan_deviation = torch.tensor(row.latents_mean), torch.tensor(row.latents_std)
    gain = wan_deviation / deviation
    folded = {name: tensor.detach().clone() for name, tensor in vae.items()}
    half = len(mean)  # the first half of the moments is the latents' mean, the other is not used by anyone
    folded["conv1.weight"][:half] *= gain.view(-1, 1, 1, 1, 1)
    folded["conv1.bias"][:half] = (folded["conv1.bias"][:half] - mean) * gain + wan_mean
    weight = folded["conv2.weight"].flatten(1)
    folded["conv2.bias"] += weight @ (mean - wan_mean / gain)
    folded["conv2.weight"] = (weight / gain).view_as(folded["conv2.weight"])
    return folded


def official_config(dit: Mapping[str, Tensor], task: str) -> dict[str, Any]:
    """What config.json of the official layout says of a transformer."""
    dim, in_dim = dit["patch_embedding.weight"].shape[:2]
    return {
        "_class_name": "WanModel",
        "dim": dim,
        "eps": EPS,
        "ffn_dim": len(dit["blocks.0.ffn.0.bias"]),
        "freq_dim": FREQ_DIM,
        "in_dim": in_dim,
        "model_type": task,
        "num_heads": dim // HEAD_DIM,
        "num_layers": sum(name.endswith("norm3.bias") for name in dit),
        "out_dim": len(dit["head.head.bias"]) // 4,
        "text_len": TEXT_LEN,
    }


def _part(parameters: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def _rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().bfloat16().contiguous() for name, tensor in tensors.items()}


def main() -> None:
    """Export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--task", choices=["t2v", "i2v", "ti2v"], default="t2v")
    options = parser.parse_args()
    export(options.run, options.target, options.task)
    size = sum(path.stat().st_size for path in options.target.rglob("*") if path.is_file())
    print(f"{options.target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
