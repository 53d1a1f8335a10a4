"""A model's files become a model: which row of the table it is, with every size read from its own tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wanfast.checkpoint.bind import check_names
from wanfast.checkpoint.layout import Checkpoint, dit_settings, open_checkpoint
from wanfast.checkpoint.reader import Reader
from wanfast.config import MODELS, Expert, ExpertName, ModelConfig, VAEConfig
from wanfast.dit import weights as dit_weights
from wanfast.errors import CheckpointError
from wanfast.text import weights as text_weights
from wanfast.text.tokenizer import Tokenizer, load_tokenizer
from wanfast.vae import weights as vae_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One Wan 2.2 model: its numbers and its open files. No weight is in memory yet."""

    path: Path
    config: ModelConfig
    experts: Mapping[ExpertName, Reader]
    vae: Reader
    text: Reader
    tokenizer: Tokenizer


def open_model(path: str | Path) -> Model:
    """Open a checkpoint folder and hold every tensor's name and shape to what the model needs.

    Args:
        path: folder in the official or the Diffusers layout.

    Raises:
        CheckpointError: a part, tensor or setting is missing, unexpected or of the wrong shape; the message names it.
    """
    checkpoint = open_checkpoint(path)
    config = _model_config(checkpoint)
    for name, reader in checkpoint.experts.items():
        check_names(reader, dit_weights.expected_tensors(config.dit), part=f"{name} diffusion transformer")
    check_names(checkpoint.vae, vae_weights.expected_tensors(config.vae), part="VAE")
    check_names(checkpoint.text, text_weights.expected_tensors(config.text), part="text encoder")
    return Model(
        path=checkpoint.path,
        config=config,
        experts=checkpoint.experts,
        vae=checkpoint.vae,
        text=checkpoint.text,
        tokenizer=load_tokenizer(checkpoint.tokenizer),
    )


def vae_parameters(config: VAEConfig) -> int:
    """Count the parameters of a VAE."""
    return sum(math.prod(shape) for shape in vae_weights.expected_tensors(config).values())


def _model_config(checkpoint: Checkpoint) -> ModelConfig:
    """Take the task's row of the table, sizes from the tensors, the folder's sampling defaults if it has any."""
    row = next(model for model in MODELS.values() if model.task == checkpoint.task)
    first = next(iter(checkpoint.experts))
    settings = dit_settings(checkpoint, first)
    defaults = checkpoint.defaults
    own = {
        name: value
        for name in ("name", "width", "height", "num_frames", "num_inference_steps", "shift", "fps")
        if (value := getattr(defaults, name)) is not None
    }
    dit = dit_weights.dit_config(
        checkpoint.experts[first], num_heads=settings.num_heads, eps=settings.eps, text_len=settings.text_len
    )
    return replace(
        row,
        experts=_experts(checkpoint, row),
        boundary=_boundary(checkpoint, row),
        dit=dit,
        vae=vae_weights.vae_config(checkpoint.vae, **_latent_statistics(checkpoint)),
        text=text_weights.text_config(checkpoint.text, **_text_settings(checkpoint)),
        **own,
    )


def _experts(checkpoint: Checkpoint, row: ModelConfig) -> tuple[Expert, ...]:
    given = {
        "high_noise": checkpoint.defaults.guidance_high,
        "low_noise": checkpoint.defaults.guidance_low,
        "single": checkpoint.defaults.guidance,
    }
    usual = {expert.name: expert.guidance for expert in row.experts}
    experts = []
    for name in checkpoint.experts:
        guidance = given[name] if given[name] is not None else usual.get(name)
        if guidance is None:
            raise CheckpointError(
                f"{checkpoint.path}: a {row.task} model has the experts {', '.join(usual)}, this folder has {name};"
                " use the folder as published"
            )
        experts.append(Expert(name=name, guidance=guidance))
    return tuple(experts)


def _boundary(checkpoint: Checkpoint, row: ModelConfig) -> float | None:
    if len(checkpoint.experts) == 1:
        return None
    stated = (checkpoint.defaults.boundary, checkpoint.boundary, row.boundary)
    return next(value for value in stated if value is not None)


def _latent_statistics(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.configs.get("vae", {})
    return {key: config[key] for key in ("latents_mean", "latents_std") if config.get(key) is not None}


def _text_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Diffusers states these two; the official files leave them to the code."""
    config = checkpoint.configs.get("text", {})
    named = {"max_distance": "relative_attention_max_distance", "eps": "layer_norm_epsilon"}
    return {ours: config[theirs] for ours, theirs in named.items() if theirs in config}
