"""One forward of diffusers' transformer as one pass of wanfast's DiT."""

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from wanfast.config import DiTConfig, ExpertName
from wanfast.diffusers_backend.experts import Experts
from wanfast.dit.model import patch_grid, predict_velocities
from wanfast.dit.packed import PackedBlock
from wanfast.dit.weights import BlockWeights
from wanfast.errors import RequestError

_log = logging.getLogger("wanfast")

_EXPLODED = 1e3  # of a velocity, which is about 1
Timesteps = tuple[float | None, float]  # of the first latent frame, where it has its own; of the others


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
    if torch.is_grad_enabled() or torch.is_autocast_enabled(kind):
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            return _predict(experts, name, hidden, timestep, text, lora_scale)
    return _predict(experts, name, hidden, timestep, text, lora_scale)  # as in a pipeline; entering costs microseconds


def _predict(
    experts: Experts, name: ExpertName, hidden: Tensor, timestep: Tensor, text: Tensor, lora_scale: float
) -> Tensor:
    expert = experts.open(name, hidden.device, lora_scale=lora_scale)
    config = expert.config_for(text.shape[1])
    timesteps = split_timesteps(timestep, hidden, config)

    def predict(blocks: Callable[[], Iterator[BlockWeights | PackedBlock]]) -> Tensor:
        velocities = []
        for part, own_text, (first, rest) in parts:
            velocities += predict_velocities(
                part, rest, [own_text], expert.outer, blocks(), config, first_frame_timestep=first
            )
        return velocities[0] if len(velocities) == 1 else torch.cat(velocities)

    latents = hidden.float()
    if len(timesteps) == 1:
        parts = [(latents, text, timesteps[0])]
    else:
        parts = list(zip(torch.split(latents, 1), torch.split(text, 1), timesteps, strict=True))
    velocity = predict(expert.blocks)
    if expert.eight_bit is None or bool(velocity.abs().amax() < _EXPLODED):  # false for NaN too
        return velocity
    _log.warning("%s transformer: 8-bit numbers ran out of range; this forward is made again in 16 bits", name)
    return predict(expert.exact_blocks)


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
    if timestep.shape == (batch,):
        pairs: list[Timesteps] = [(None, value) for value in timestep.tolist()]
    else:
        frames, rows, columns = patch_grid(hidden, config)
        if timestep.shape != (batch, frames * rows * columns):
            raise RequestError(
                f"timestep: must be [{batch}] or [{batch}, {frames * rows * columns}], one per sample or per token, got"
                f" {list(timestep.shape)}"
            )
        pairs = _frame_timesteps(timestep, rows * columns)
    return pairs[:1] if batch == 1 or len(set(pairs)) == 1 else pairs


def _frame_timesteps(timestep: Tensor, per_frame: int) -> list[Timesteps]:
    """Read [B, tokens] timesteps; a frame's lowest and highest say whether all of it is at one."""
    extremes = timestep.reshape(len(timestep), -1, per_frame).aminmax(dim=2)  # two of [B, F]
    # On a GPU they are waited for once.
    both = torch.stack(tuple(extremes)).tolist() if timestep.is_cuda else [part.tolist() for part in extremes]
    pairs: list[Timesteps] = []
    for lows, highs in zip(*both, strict=True):
        first, rest = lows[0], lows[-1]
        low, high = min(lows[1:], default=rest), max(highs[1:], default=rest)
        if first != highs[0] or low != high:
            raise RequestError(
                "timestep: must be one value in the first latent frame and one in all others, as the pipelines give"
                f" them, got {first:g} to {highs[0]:g} and {low:g} to {high:g}"
            )
        pairs.append((None if first == low else first, low))
    return pairs
