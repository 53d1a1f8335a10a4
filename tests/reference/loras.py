"""Random LoRA files for the small models, in every dialect, and the dense change each stands for."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from wanfast.checkpoint.names import dit_to_diffusers
from wanfast.config import DiTConfig
from wanfast.dit.weights import expected_tensors

RANK = 4

# Dialect -> key of (official layer, part), part one of down, up, alpha.
SUFFIXES = {
    "kohya": {"down": ".lora_down.weight", "up": ".lora_up.weight"},
    "peft": {"down": ".lora_A.weight", "up": ".lora_B.weight"},
    "peft default": {"down": ".lora_A.default.weight", "up": ".lora_B.default.weight"},
    "dotted": {"down": ".lora.down.weight", "up": ".lora.up.weight"},
    "underscored": {"down": "_lora.down.weight", "up": "_lora.up.weight"},
    "linear layer": {"down": ".lora_linear_layer.down.weight", "up": ".lora_linear_layer.up.weight"},
}
DIALECTS = {
    "comfyui": ("diffusion_model.", "official", "kohya"),
    "comfyui whole": ("model.diffusion_model.", "official", "kohya"),
    "comfyui peft": ("diffusion_model.", "official", "peft"),
    "bare": ("", "official", "kohya"),
    "diffusers": ("transformer.", "diffusers", "peft"),
    "peft model": ("base_model.model.", "diffusers", "peft default"),
    "diffsynth": ("pipe.dit.", "official", "peft default"),
    "musubi": ("lora_unet_", "joined", "kohya"),
    "kohya": ("lora_unet__", "joined", "kohya"),
    "kohya diffusers": ("lora_unet_", "diffusers joined", "kohya"),
    "lycoris": ("lycoris_", "joined", "kohya"),
    "dotted": ("transformer.", "diffusers", "dotted"),
    "processor": ("transformer.", "processor", "underscored"),
    "linear layer": ("transformer.", "diffusers", "linear layer"),
}


def linear_layers(config: DiTConfig, *, blocks_only: bool = True) -> dict[str, tuple[int, ...]]:
    """Official names and weight shapes of the layers that LoRAs are trained on."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in expected_tensors(config).items()
        if name.endswith(".weight") and len(shape) > 1 and (name.startswith("blocks.") or not blocks_only)
    }


def random_factors(
    layers: Mapping[str, tuple[int, ...]], *, seed: int = 0, rank: int = RANK
) -> dict[str, tuple[Tensor, Tensor]]:
    """Draw (down, up) per layer, large enough that a run without them is another run."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, (out, *inner) in layers.items():
        down = torch.randn(rank, *inner, generator=generator) / torch.Size(inner).numel() ** 0.5
        factors[name] = (down, 0.3 * torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator))
    return factors


def write_lora(
    path: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    dialect: str = "comfyui",
    alpha: float | None = None,
    more: Mapping[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a LoRA file; `more` is added as it is."""
    prefix, naming, suffixes = DIALECTS[dialect]
    tensors = dict(more or {})
    for name, pair in factors.items():
        layer = prefix + spelled(name, naming)
        for part, factor in zip(("down", "up"), pair, strict=True):
            tensors[layer + SUFFIXES[suffixes][part]] = factor.to(dtype).contiguous()
        if alpha is not None:
            tensors[f"{layer}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
    save_file(tensors, path, metadata=metadata)
    return path


def spelled(name: str, naming: str) -> str:
    if naming == "official":
        return name
    if naming == "joined":
        return name.replace(".", "_")
    other = dit_to_diffusers(f"{name}.weight").removesuffix(".weight")
    if naming == "processor":
        return re.sub(r"(attn\d)\.(to_[a-z]+)(\.0)?$", r"\1.processor.\2", other)
    return other.replace(".", "_") if naming == "diffusers joined" else other


def merged(
    state: Mapping[str, Tensor], factors: Mapping[str, tuple[Tensor, Tensor]], scale: float
) -> dict[str, Tensor]:
    """Add scale * up @ down to an official state dict, in float64, rounded once."""
    result = dict(state)
    for name, (down, up) in factors.items():
        base = state[f"{name}.weight"]
        product = up.double().flatten(1) @ down.double().flatten(1)
        result[f"{name}.weight"] = (base.double() + scale * product.view(base.shape)).to(base.dtype)
    return result
