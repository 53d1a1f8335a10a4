"""Decodes latents into frames, one latent frame at a time: the first gives one frame, each later one four.

Where memory is short, one strip of the picture after the other is decoded like that (`tiles.py`).

Source: Wan-Video/Wan2.2, wan/modules/vae2_1.py and vae2_2.py.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from wanfast.errors import RequestError
from wanfast.vae.blocks import (
    History,
    LevelHistory,
    causal_conv,
    empty_history,
    middle,
    picture_conv,
    residual_block,
    upsample,
)
from wanfast.vae.norms import norm_silu
from wanfast.vae.patch import add_repeated_up_, unpatchify
from wanfast.vae.tiles import WHOLE_LEVELS, Strip
from wanfast.vae.weights import DecoderWeights, ResidualWeights, UpsampleWeights, VAEWeights

DecoderLevel = tuple[tuple[ResidualWeights, ...], UpsampleWeights | None]

FINE_FRAMES = 1  # at a time where the picture is large: two take up to 1.4 times the memory, and as long


def decode(vae: VAEWeights, latents: Tensor, strip: Strip | None = None) -> Iterator[Tensor]:
    """Decode a video, chunk by chunk; each chunk is made when it is asked for.

    Args:
        vae: the weights; their dtype is that of the computation.
        latents: [B, C, F, H, W], F >= 1, normalised, any float dtype, on the weights' device.
        strip: decode only this part of the picture, cut with `decode_halo`; None is all of it.

    Returns:
        An iterator over fp32 chunks in [-1, 1]: [B, 3, 1, s H, s W] first, then F - 1 times [B, 3, 4, s H, s W];
        s is the VAE's spatial stride. Of a strip, H or W is what it keeps.

    Raises:
        RequestError: latents of another shape or kind; raised at the call, before the first chunk.
    """
    _check_latents(vae, latents)
    return _chunks(vae, latents, strip)


def _chunks(vae: VAEWeights, latents: Tensor, strip: Strip | None) -> Iterator[Tensor]:
    history = None
    for index in range(latents.shape[2]):
        frames, history = decode_frame(vae, latents[:, :, index : index + 1], history, strip)
        yield frames.clamp_(-1.0, 1.0)


def decode_frame(
    vae: VAEWeights, latent_frame: Tensor, history: History | None, strip: Strip | None = None
) -> tuple[Tensor, History]:
    """Decode one latent frame, not clamped.

    Args:
        vae: the weights.
        latent_frame: [B, C, 1, H, W], normalised. After the first, several at once give the same at a higher peak.
        history: None for the video's first frame, else as the last call, for the same strip, returned it; its memory
            is used again.
        strip: as in `decode`.

    Returns:
        fp32 [B, 3, 1 or 4, s H, s W], and the history for the next frame.

    Raises:
        ValueError: the VAE was loaded without its decoder.
    """
    config = vae.config
    if vae.decoder is None:
        raise ValueError("vae: must hold a decoder, got one loaded without; load_vae(..., decoder=True) works")
    weights = vae.decoder
    mean = latent_frame.new_tensor(config.latents_mean, dtype=torch.float32).view(-1, 1, 1, 1)
    std = latent_frame.new_tensor(config.latents_std, dtype=torch.float32).view(-1, 1, 1, 1)
    x = latent_frame.float() / (1.0 / std) + mean  # the reference divides by the reciprocal
    x = x.to(weights.from_latents.bias.dtype, memory_format=torch.channels_last_3d)
    x = picture_conv(x, weights.from_latents)
    repeats = config.version == "2.2"
    x, history = _run_decoder(x, weights, history or empty_history(weights), strip, repeats=repeats)
    x = unpatchify(x, config.patch_size)
    x = x if strip is None else strip.keep(x, config.spatial_stride)
    return x.to(torch.float32, memory_format=torch.contiguous_format).contiguous(), history


def _run_decoder(
    x: Tensor, weights: DecoderWeights, history: History, strip: Strip | None, *, repeats: bool
) -> tuple[Tensor, History]:
    """[B, C, 1, H, W] to patched pixels; `repeats` adds each level's input, repeated, to its output."""
    x, conv_in = causal_conv(x, weights.conv_in, history.conv_in)
    x, past_middle = middle(x, weights.middle, history.middle)
    x, whole = _run_levels(x, weights.levels[:WHOLE_LEVELS], history.levels[:WHOLE_LEVELS], repeats=repeats)
    if strip is not None:
        x = strip.read(x, 2**WHOLE_LEVELS).contiguous(memory_format=torch.channels_last_3d)
    cut = max(_count_coarse(weights), WHOLE_LEVELS)
    x, coarse = _run_levels(x, weights.levels[WHOLE_LEVELS:cut], history.levels[WHOLE_LEVELS:cut], repeats=repeats)
    # From here on no frame is added, and tensors are largest: a few frames at a time take the least memory.
    fine, conv_out, pixels = history.levels[cut:], history.conv_out, []
    for some in torch.split(x, FINE_FRAMES, dim=2):
        frames, fine = _run_levels(some, weights.levels[cut:], fine, repeats=repeats)
        frames, conv_out = causal_conv(norm_silu(frames, weights.norm_out, overwrite=True), weights.conv_out, conv_out)
        pixels.append(frames)
    x = pixels[0] if len(pixels) == 1 else torch.cat(pixels, dim=2)
    return x, History(conv_in, past_middle, (*whole, *coarse, *fine), conv_out)


def _count_coarse(weights: DecoderWeights) -> int:
    """How many levels there are up to the last that doubles the frames."""
    return max((index + 1 for index, (_, up) in enumerate(weights.levels) if up is not None and up.time), default=0)


def _run_levels(
    x: Tensor, levels: Sequence[DecoderLevel], pasts: Sequence[LevelHistory], *, repeats: bool
) -> tuple[Tensor, tuple[LevelHistory, ...]]:
    """Residual blocks, then the doubling of the picture if the level has one, level by level."""
    following = []
    for (blocks, up), past in zip(levels, pasts, strict=True):
        source = x if repeats and up is not None else None
        past_blocks = []
        for block, past_block in zip(blocks, past.blocks, strict=True):
            x, past_block = residual_block(x, block, past_block)
            past_blocks.append(past_block)
        past_resample = None
        if up is not None:
            x, past_resample = upsample(x, up, past.resample)
            if source is not None:
                add_repeated_up_(x, source, 1 if up.time is None else 2)
        following.append(LevelHistory(tuple(past_blocks), past_resample))
    return x, tuple(following)


def _check_latents(vae: VAEWeights, latents: Tensor) -> None:
    channels = vae.config.z_dim
    if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
        raise RequestError(
            f"latents: must be [B, {channels}, F, H, W] with at least one frame, got {list(latents.shape)}; "
            f"this VAE decodes what a model with {channels} latent channels makes"
        )
    if not latents.is_floating_point():
        raise RequestError(f"latents: must be of a float dtype, got {latents.dtype}; float32 works")
