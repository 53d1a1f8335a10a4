"""The three model families, small and random: as checkpoints in both layouts and as diffusers pipelines."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from reference import checkpoints, dit, text, vae
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from wanfast.config import MODELS, ModelConfig, TextConfig

TEXT = TextConfig(
    vocab_size=64,
    dim=24,
    attention_dim=24,
    ffn_dim=40,
    num_heads=2,
    num_layers=2,
    num_buckets=32,
    max_distance=128,
    eps=1e-6,
)
PROMPT, NEGATIVE = "a red ball rolling left", "the cat"


@dataclass(frozen=True)
class Family:
    """One random model: its diffusers modules and a tokenizer file."""

    task: str
    row: ModelConfig
    transformers: list[WanTransformer3DModel]  # high-noise expert first
    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel
    tokenizer: Path

    @property
    def vae_version(self) -> Any:
        return "2.2" if self.task == "ti2v" else "2.1"

    def write_official(self, folder: Path, *, shards: int = 1) -> Path:
        names = [expert.name for expert in self.row.experts]
        experts = {name: dit.official_state(model) for name, model in zip(names, self.transformers, strict=True)}
        return checkpoints.write_official(
            folder,
            task=self.task,
            experts=experts,
            vae=vae.official_state(self.vae, self.vae_version),
            text=text.official_state(self.text_encoder),
            num_heads=2,
            shards=shards,
            tokenizer=self.tokenizer,
        )

    def write_diffusers(self, folder: Path) -> Path:
        self.pipeline().save_pretrained(folder)
        return folder

    def pipeline(self, *, image_to_video: bool = False, shift: float | None = None) -> WanPipeline:
        """Build diffusers' pipeline over the same modules."""
        kind = WanImageToVideoPipeline if image_to_video or self.task == "i2v" else WanPipeline
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift or self.row.shift
        )
        pipeline = kind(
            tokenizer=PreTrainedTokenizerFast(
                tokenizer_file=str(self.tokenizer), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
            ),
            text_encoder=self.text_encoder,
            vae=self.vae,
            scheduler=scheduler,
            transformer=self.transformers[0],
            transformer_2=self.transformers[1] if len(self.transformers) > 1 else None,
            boundary_ratio=self.row.boundary,
            expand_timesteps=self.task == "ti2v",
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def make_family(task: str, folder: Path, *, seed: int = 0) -> Family:
    """Draw a random model of a family; `folder` gets its tokenizer."""
    row = next(model for model in MODELS.values() if model.task == task)
    z_dim, version = row.vae.z_dim, row.vae.version
    vae_config = vae.small_config(version, z_dim=z_dim)
    model = vae.diffusers_vae(vae_config, seed=seed)
    model.register_to_config(latents_mean=list(row.vae.latents_mean), latents_std=list(row.vae.latents_std))
    config = dit.small_config(task, text_dim=TEXT.dim)
    return Family(
        task=task,
        row=row,
        transformers=[dit.diffusers_dit(config, seed=seed + index) for index in range(len(row.experts))],
        vae=model,
        text_encoder=text.umt5_encoder(TEXT, seed=seed),
        tokenizer=text.write_tokenizer(folder / "tokenizer-source"),
    )


def official_by_task(folder: Path) -> Callable[[str], Path]:
    """Give a small official checkpoint of a task, written into a folder when it is first asked for."""

    @cache
    def of(task: str) -> Path:
        return make_family(task, folder / task).write_official(folder / task / "model")

    return of


def noise(plan_shape: tuple[int, ...], seed: int = 7) -> torch.Tensor:
    """Draw initial latents [C, F, H, W]."""
    return torch.randn(plan_shape, generator=torch.Generator().manual_seed(seed))
