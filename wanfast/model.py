"""A model's files become a model: which row of the table it is, with every size read from its own tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from wanfast.checkpoint.bind import check_names
from wanfast.checkpoint.files import TensorRef
from wanfast.checkpoint.layout import Checkpoint, dit_settings
from wanfast.checkpoint.lookup import Sources, find_checkpoint
from wanfast.checkpoint.reader import Reader
from wanfast.config import MODELS, Expert, ExpertName, ModelConfig, VAEConfig
from wanfast.dit import weights as dit_weights
from wanfast.errors import CheckpointError
from wanfast.text import weights as text_weights
from wanfast.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_of_sentencepiece
from wanfast.tiny import tiny_files
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
    found_at: str | None  # what `Sources.model` led to, an absolute path or a built-in name; None for files alone
    files: Mapping[str, str]  # the parts that were named one by one: absolute paths by names of `Sources`
    notes: tuple[str, ...] = ()  # what was decided by names and places of files
    preset_loras: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)  # the model's own LoRAs, by preset
    made_from: tuple[str, ...] = ()  # names of the files it was converted from
    written_for: str | None = None  # the precision it was converted for

    @property
    def readers(self) -> list[Reader]:
        """The open files of every part."""
        return [*self.experts.values(), self.text, self.vae]


def open_model(sources: str | Path | Sources) -> Model:
    """Open a model's files and hold every tensor's name and shape to what the model needs.

    Args:
        sources: what to open, or its `model` alone.

    Raises:
        RequestError: the sources contradict each other.
        CheckpointError: a part, tensor or setting is missing, unexpected or of the wrong shape; the message names it.
    """
    sources = sources if isinstance(sources, Sources) else Sources(model=sources)
    checkpoint = find_checkpoint(sources)
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
        tokenizer=_tokenizer(checkpoint.tokenizer),
        found_at=_model_path(sources, checkpoint),
        files=sources.parts,
        notes=checkpoint.notes,
        preset_loras={
            preset: tuple(checkpoint.path / file for file in files)
            for preset, files in (checkpoint.defaults.preset_loras or {}).items()
        },
        made_from=checkpoint.made_from,
        written_for=checkpoint.written_for,
    )


def _model_path(sources: Sources, checkpoint: Checkpoint) -> str | None:
    """The folder or file that `sources.model` led to."""
    if sources.model is None:
        return None
    path = Path(sources.model).expanduser()
    if tiny_files(sources.model) is not None:
        return str(sources.model).lower()  # every machine has its own: a clip must not name this one's folder
    return str((path if path.exists() else checkpoint.path).absolute())


def _tokenizer(place: Path | TensorRef) -> Tokenizer:
    if isinstance(place, Path):
        return load_tokenizer(place)
    data = place.load("cpu")
    assert isinstance(data, Tensor)
    return tokenizer_of_sentencepiece(data.numpy().tobytes(), place.file)


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
