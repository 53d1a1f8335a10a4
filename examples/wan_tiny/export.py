"""Writes the trained parts as a checkpoint in the layout of Wan-AI/Wan2.2-T2V-A14B, in bf16.

Usage: python export.py RUN_FOLDER CHECKPOINT_FOLDER
       python export.py RUN_FOLDER CHECKPOINT_FOLDER --task i2v
       python export.py RUN_FOLDER CHECKPOINT_FOLDER --task ti2v
       python export.py RUN_FOLDER PACKAGE_FOLDER --package

`--package` writes the folder of the wanfast package: text to video as the others read it, and what the siblings have of
their own, their transformers in GGUF's Q8_0.

The official layout has no place for the latents' statistics: every reader of it takes Wan's own. They are folded into
the two 1 x 1 x 1 convolutions next to the latents instead, so that Wan's statistics become true of this VAE.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dit_model import EPS, FREQ_DIM, HEAD_DIM, TEXT_LEN
from evaluate_vae import load_vae
from latents import load_statistics
from safetensors.torch import save_file
from text_model import make_tokenizer
from torch import Tensor
from train_dit import load_average

from wanfast.config import T2V_A14B, VAE_2_1, VAE_2_2, VAEConfig

Write = Callable[[Mapping[str, Tensor], Path], None]  # tensors, and where but for the suffix

DEFAULTS = {"width": 64, "height": 64, "num_frames": 17, "num_inference_steps": 40}


def export(run: Path, target: Path, task: str = "t2v") -> None:
    """Write a checkpoint folder.

    Args:
        run: folder of the trainings, all of them with a checkpoint.
        target: to write; may exist, its files of these names are replaced.
        task: "t2v", or "i2v" or "ti2v", whose transformers are in trainings of their own.
    """
    export_transformers(run, target, task)
    if task == "t2v" and (run / "lightning").is_dir():
        shutil.copytree(run / "lightning", target / "lightning", dirs_exist_ok=True)
    _write_defaults(target, task)
    text = _rounded(_part(load_average(run, "base"), "text."))
    torch.save(text, target / "models_t5_umt5-xxl-enc-bf16.pth")
    export_vae(run, target, VAE_2_2 if task == "ti2v" else VAE_2_1)
    tokenizer = target / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save(str(tokenizer / "tokenizer.json"))


def export_package(run: Path, target: Path) -> None:
    """Write the built-in models: the siblings have the text encoder, and I2V the VAE, of text to video.

    Args:
        run: folder of the trainings; a sibling that was not trained is left out.
        target: to write, as in `export`.
    """
    export(run, target / "t2v")
    for task in ("i2v", "ti2v"):
        if all((run / f"{training}.pt").exists() for training in _transformers(task)):
            export_transformers(run, target / task, task, write=_write_q8_0)
            _write_defaults(target / task, task)
            if task == "ti2v":
                export_vae(run, target / task, VAE_2_2)


def export_transformers(run: Path, target: Path, task: str, write: Write | None = None) -> None:
    """Write a task's transformers with their configs; in bf16, or as `write` does it."""
    for training, folder in _transformers(task).items():
        (target / folder).mkdir(parents=True, exist_ok=True)
        dit = _part(load_average(run, training), "dit.")
        (target / folder / "config.json").write_text(json.dumps(official_config(dit, task), indent=1))
        (write or _write_bf16)(dit, target / folder / "diffusion_pytorch_model")


def export_vae(run: Path, target: Path, row: VAEConfig) -> None:
    """Write the VAE of a kind, in bf16, with Wan's own statistics."""
    vae = fold_statistics(load_vae(run, row.version).state_dict(), *load_statistics(run, row.version), row)
    torch.save(_rounded(vae), target / f"Wan{row.version}_VAE.pth")


def _write_bf16(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file(_rounded(tensors), path.with_suffix(".safetensors"), metadata={"format": "pt"})


def _write_q8_0(tensors: Mapping[str, Tensor], path: Path) -> None:
    """The blocks' matrices in Q8_0, vectors and modulation in fp32, the matrices around the blocks in bf16."""
    import gguf

    writer = gguf.GGUFWriter(path.with_suffix(".gguf"), "wan")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in tensors.items():
        values = tensor.detach().float().numpy()
        is_matrix = tensor.dim() >= 2 and name.endswith(".weight")
        kind = gguf.GGMLQuantizationType[("Q8_0" if name.startswith("blocks.") else "BF16") if is_matrix else "F32"]
        packed = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, packed if kind.name == "F32" else packed.view(np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_defaults(target: Path, task: str) -> None:
    """What wanfast is to know: name, size, steps, and the LoRAs of a preset that are there."""
    defaults: dict[str, Any] = {"name": "wan-tiny" if task == "t2v" else f"wan-tiny-{task}", **DEFAULTS}
    loras = [f"lightning/{expert.name}_model.safetensors" for expert in T2V_A14B.experts]
    if all((target / lora).exists() for lora in loras):
        defaults["preset_loras"] = {"lightning4": loras}
    (target / "wanfast.json").write_text(json.dumps(defaults, indent=1))


def _transformers(task: str) -> dict[str, str]:
    """Folders of a checkpoint's transformers by the trainings they come from."""
    if task == "ti2v":
        return {"ti2v_refined": ""}
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
    parser.add_argument("--package", action="store_true", help="the built-in models, all that were trained")
    options = parser.parse_args()
    if options.package:
        export_package(options.run, options.target)
    else:
        export(options.run, options.target, options.task)
    size = sum(path.stat().st_size for path in options.target.rglob("*") if path.is_file())
    print(f"{options.target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
