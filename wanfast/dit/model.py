"""The DiT from latents to velocity: patches, embeddings, blocks, head.

Source: Wan-Video/Wan2.2, wan/modules/model.py, WanModel.forward.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from wanfast.config import DiTConfig
from wanfast.dit.block import CHUNK_TOKENS, Run, dit_block, self_attention, text_key_values, token_runs
from wanfast.dit.block_8bit import dit_block_8bit, self_attention_8bit
from wanfast.dit.packed import PackedBlock
from wanfast.dit.text import TextMemory
from wanfast.dit.weights import BlockWeights, OuterWeights
from wanfast.errors import RequestError
from wanfast.kernels import layer_norm_modulate
from wanfast.linear import linear
from wanfast.rope import rope_rotations

MAX_PERIOD = 10_000.0


class _Sizes(TypedDict):
    """What every block is told alike."""

    num_heads: int
    eps: float
    first_tokens: int
    chunk_tokens: int


class _Later(TypedDict):
    """What blocks after the first do otherwise."""

    attends_to_itself: bool
    attention_density: float


@dataclass(frozen=True, slots=True)
class TimeEmbedding:
    """What the timestep tells the network; R is 1, or 2 where the first frame has a timestep of its own, in row 0."""

    embedding: Tensor  # [R, C], fp32; modulates the head
    projection: Tensor  # [R, 6, C], fp32; modulates the blocks


def predict_velocities(
    latents: Tensor,
    timestep: float,
    contexts: Sequence[Tensor],
    outer: OuterWeights,
    blocks: Iterable[BlockWeights | PackedBlock],
    config: DiTConfig,
    *,
    condition: Tensor | None = None,
    first_frame_timestep: float | None = None,
    text_memory: TextMemory | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    rotations: Tensor | None = None,
    order: Tensor | None = None,
    attention_density: float = 1.0,
) -> list[Tensor]:
    """Predict the velocity of the latents under each context, in one pass over the blocks.

    Args:
        latents: [B, C, F, H, W] fp32, rows and columns divisible by the patch.
        timestep: in [0, 1000].
        contexts: of [B, n, text_dim] each, n <= text_len; padded with zero rows, which are attended to like the others.
        outer: the weights around the blocks, on the latents' device.
        blocks: the blocks' weights in order, each on that device when it is its turn; packed ones compute in 8 bits.
        config: sizes of the DiT.
        condition: [B, in_channels - C, F, H, W], set behind the latents' channels (image to video).
        first_frame_timestep: of the tokens of the first latent frame, where it has one of its own.
        text_memory: of these blocks, from the step before: what is made of a context is then made once.
        chunk_tokens: tokens computed at a time, where tokens do not see one another.
        rotations: of `rope_rotations` for this grid, on that device, in `order`; made here where they are not given.
        order: of `token_order` for this grid, on that device: the order in which blocks have the tokens. That of the
            grid where it is not given.
        attention_density: share of the blocks of keys that each block of queries attends to, in every block of the DiT
            but the first; 1 is all.

    Returns:
        Per context the velocity [B, out_channels, F, H, W], fp32. Nothing is written to.

    Raises:
        RequestError: a shape does not fit the config, or `blocks` yields another number of blocks.
    """
    _check_inputs(latents, contexts, condition, config)
    batch, device = latents.shape[0], latents.device
    grid = patch_grid(latents, config)
    time = embed_timesteps(first_frame_timestep, timestep, outer, config)
    first_tokens = 0 if first_frame_timestep is None else grid[1] * grid[2]
    if rotations is None:
        rotations = rope_rotations(grid, config.head_dim).to(device)
        rotations = rotations if order is None else rotations[order]
    memory = TextMemory(limit=0) if text_memory is None else text_memory
    texts = memory.texts(contexts, outer, config)

    embedded = embed_latents(latents, condition, outer, config, order)
    streams = [embedded.to(torch.float32, copy=True)]
    stream_dtype = embedded.dtype
    del embedded
    num_blocks = 0
    sizes: _Sizes = {
        "num_heads": config.num_heads,
        "eps": config.eps,
        "first_tokens": first_tokens,
        "chunk_tokens": chunk_tokens,
    }
    for index, block in enumerate(blocks):
        num_blocks += 1
        modulation = (block.modulation + time.projection).expand(batch, -1, -1, -1)
        if index == 0:  # up to here the streams do not differ: the text enters after self-attention
            _attend_to_itself(streams[0], block, modulation, rotations, stream_dtype, sizes)
            streams += [streams[0].clone() for _ in texts[1:]]
        for hidden, text in zip(streams, texts, strict=True):
            make = partial(text_key_values, text.text, block.cross_attn, num_heads=config.num_heads, eps=config.eps)
            key_values = memory.key_values(text, index, make)
            later: _Later = {"attends_to_itself": index > 0, "attention_density": attention_density}
            if isinstance(block, PackedBlock):
                dit_block_8bit(hidden, block, modulation, key_values, rotations, **later, **sizes)
            else:
                dit_block(hidden, block, modulation, key_values, rotations, **later, **sizes)
    if num_blocks != config.num_layers:
        raise RequestError(f"blocks: must be all {config.num_layers} blocks of the model, got {num_blocks}")
    runs = list(token_runs(rotations.shape[0], chunk_tokens, first_tokens))
    return [_head(hidden, time.embedding, grid, runs, order, outer, config) for hidden in streams]


def _attend_to_itself(
    hidden: Tensor,
    block: BlockWeights | PackedBlock,
    modulation: Tensor,
    rotations: Tensor,
    stream_dtype: torch.dtype,
    sizes: _Sizes,
) -> None:
    if isinstance(block, PackedBlock):
        self_attention_8bit(hidden, block, modulation, rotations, **sizes)
    else:
        self_attention(hidden, block, modulation, rotations, stream_dtype=stream_dtype, **sizes)


def patch_grid(latents: Tensor, config: DiTConfig) -> tuple[int, int, int]:
    """Count the patches of [B, C, F, H, W] along frames, rows and columns."""
    frames, rows, columns = (size // patch for size, patch in zip(latents.shape[2:], config.patch_size, strict=True))
    return frames, rows, columns


def sinusoid(timesteps: Sequence[float], freq_dim: int) -> Tensor:
    """Spread timesteps over waves of falling frequency.

    Args:
        timesteps: R of them, in [0, 1000].
        freq_dim: width of the result, even.

    Returns:
        [R, freq_dim] fp32 on the CPU, computed in float64: cosines, then sines, of t * 10000 ** (-i / (freq_dim / 2)).
    """
    half = freq_dim // 2
    frequencies = MAX_PERIOD ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.tensor(timesteps, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def embed_timesteps(
    first_frame_timestep: float | None, timestep: float, outer: OuterWeights, config: DiTConfig
) -> TimeEmbedding:
    """Embed the timestep, in fp32 whatever the blocks compute in.

    Args:
        first_frame_timestep: of the first latent frame, which then takes row 0; None where it has none of its own.
        timestep: of all other tokens, the last row.
        outer: the weights around the blocks.
        config: sizes of the DiT.

    Returns:
        Both forms of the embedding, with one row or two.
    """
    timesteps = [timestep] if first_frame_timestep is None else [first_frame_timestep, timestep]
    waves = sinusoid(timesteps, config.freq_dim).to(outer.time_in.weight.device)
    embedding = linear(F.silu(linear(waves, outer.time_in)), outer.time_out)
    projection = linear(F.silu(embedding), outer.time_projection)
    return TimeEmbedding(embedding, projection.view(-1, 6, config.dim))


def embed_latents(
    latents: Tensor, condition: Tensor | None, outer: OuterWeights, config: DiTConfig, order: Tensor | None = None
) -> Tensor:
    """Cut latents and condition [B, c, F, H, W] into patches, in order, and embed them: [B, T, C], weights' dtype."""
    x = latents if condition is None else torch.cat([latents, condition.to(latents.dtype)], dim=1)
    pf, ph, pw = config.patch_size
    patches = rearrange(x, "b c (f pf) (h ph) (w pw) -> b (f h w) (c pf ph pw)", pf=pf, ph=ph, pw=pw)
    return linear(patches if order is None else patches[:, order], outer.patch_embedding)


def _head(
    hidden: Tensor,
    embedding: Tensor,
    grid: tuple[int, int, int],
    runs: Sequence[Run],
    order: Tensor | None,
    outer: OuterWeights,
    config: DiTConfig,
) -> Tensor:
    """Turn the residual stream [B, T, C], whose tokens have `order`, into a velocity [B, out_channels, F, H, W]."""
    shift, scale = (outer.head_modulation + embedding[:, None])[None].unbind(2)
    patches = hidden.new_empty(*hidden.shape[:2], outer.head.weight.shape[0])
    for sample in range(len(hidden)):
        for run in runs:
            x = hidden[sample : sample + 1, run.tokens]
            x = layer_norm_modulate(x, scale, shift, eps=config.eps, first_tokens=run.first_tokens)
            patches[sample, run.tokens if order is None else order[run.tokens]] = linear(x, outer.head)[0]
    f, h, _ = grid
    pf, ph, pw = config.patch_size
    return rearrange(patches, "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)", f=f, h=h, pf=pf, ph=ph, pw=pw)


def _check_inputs(latents: Tensor, contexts: Sequence[Tensor], condition: Tensor | None, config: DiTConfig) -> None:
    shape = tuple(latents.shape)
    if latents.dim() != 5 or min(shape) < 1 or latents.dtype != torch.float32:
        raise RequestError(f"latents: must be fp32 [B, C, F, H, W], none of them 0, got {latents.dtype} {shape}")
    if any(size % patch for size, patch in zip(shape[2:], config.patch_size, strict=True)):
        raise RequestError(
            f"latents: frames, rows and columns must be multiples of {config.patch_size}, got {shape[2:]}"
        )
    channels = shape[1]
    if condition is not None:
        if condition.dim() != 5 or (condition.shape[0], *condition.shape[2:]) != (shape[0], *shape[2:]):
            raise RequestError(f"condition: must be [B, C, F, H, W] like latents {shape}, got {tuple(condition.shape)}")
        channels += condition.shape[1]
    if channels != config.in_channels:
        raise RequestError(
            f"latents: with the condition must have the model's {config.in_channels} channels, got {channels}; "
            "image-to-video models take a condition, the others none"
        )
    if not contexts:
        raise RequestError("contexts: must hold at least one, got none")
    for context in contexts:
        size = tuple(context.shape)
        if len(size) != 3 or size[0] != shape[0] or size[2] != config.text_dim or size[1] > config.text_len:
            raise RequestError(
                f"contexts: each must be [{shape[0]}, at most {config.text_len}, {config.text_dim}], got {size}"
            )
