"""One forward of diffusers' transformer as one pass of wanfast's DiT."""

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from wanfast.config import DiTConfig, ExpertName
from wanfast.diffusers_backend.experts import Experts
from wanfast.dit.model import patch_grid, predict_velocities
from wanfast.errors import RequestError

Timesteps = tuple[float | None, float]  # of the first latent frame, where it has its own; of the others


@torch.no_grad()
def predict_sample(
    experts: Experts, name: ExpertName, hidden: Tensor, timestep: Tensor, text: Tensor, *, lora_scale: float
) -> Tensor:
    """Predict the velocity [B, out_channels, F, H, W], fp32.

    Args:
        experts: whose weights.
        name: of the expert.
        hidden: [B, in_channels, F, H, W], any float dtype.
        timestep: [B] or [B, tokens].
        text: [B, S, text_dim].
        lora_scale: multiplies the strength of every LoRA.

    Raises:
        RequestError: a shape does not fit, or the timesteps of a frame differ.
    """
    kind = hidden.device.type
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        expert = experts.open(name, hidden.device, lora_scale=lora_scale)
        config = replace(expert.config, text_len=text.shape[1])  # diffusers attends to what it is given, unpadded
        timesteps = split_timesteps(timestep, hidden, config)
        size = len(hidden) if len(timesteps) == 1 else 1
        parts = zip(torch.split(hidden, size), torch.split(text, size), timesteps, strict=True)
        velocities = []
        for part, own_text, (first, rest) in parts:
            velocities += predict_velocities(
                part.float(), rest, [own_text], expert.outer, expert.blocks(), config, first_frame_timestep=first
            )
    return velocities[0] if len(velocities) == 1 else torch.cat(velocities)


def split_timesteps(timestep: Tensor, hidden: Tensor, config: DiTConfig) -> list[Timesteps]:
    """Read the timestep of each sample, once for all where they agree.

    Args:
        timestep: [B], or [B, tokens] as of a pipeline with expand_timesteps.
        hidden: [B, C, F, H, W].
        config: sizes of the DiT.

    Returns:
        One pair for the whole batch, or one per sample.

    Raises:
        RequestError: another shape, or more than one timestep in the first latent frame or in the others.
    """
    batch = hidden.shape[0]
    frames, rows, columns = patch_grid(hidden, config)
    per_frame = rows * columns
    if tuple(timestep.shape) == (batch,):
        pairs: list[Timesteps] = [(None, value) for value in timestep.tolist()]
    elif tuple(timestep.shape) == (batch, frames * per_frame):
        pairs = _frame_timesteps(timestep, per_frame)
    else:
        raise RequestError(
            f"timestep: must be [{batch}] or [{batch}, {frames * per_frame}], one per sample or per token, got"
            f" {list(timestep.shape)}"
        )
    return pairs[:1] if len(set(pairs)) == 1 else pairs


def _frame_timesteps(timestep: Tensor, per_frame: int) -> list[Timesteps]:
    first, rest = timestep[:, :per_frame], timestep[:, per_frame:]
    rest = rest if rest.shape[1] else first
    extremes = torch.stack([first.amin(1), first.amax(1), rest.amin(1), rest.amax(1)], dim=1)
    pairs: list[Timesteps] = []
    for first_low, first_high, low, high in extremes.tolist():
        if first_low != first_high or low != high:
            raise RequestError(
                "timestep: must be one value in the first latent frame and one in all others, as the pipelines give"
                f" them, got {first_low:g} to {first_high:g} and {low:g} to {high:g}"
            )
        pairs.append((None if first_low == low else first_low, low))
    return pairs
