"""Encodes video into latents: the first frame alone, then as many frames at a time as one latent frame stands for.

Source: Wan-Video/Wan2.2, wan/modules/vae2_1.py and vae2_2.py.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from wanfast.errors import RequestError
from wanfast.vae.blocks import (
    History,
    LevelHistory,
    causal_conv,
    downsample,
    empty_history,
    middle,
    norm_silu,
    pointwise_conv,
    residual_block,
)
from wanfast.vae.patch import average_down, patchify
from wanfast.vae.sizes import PIXEL_CHANNELS
from wanfast.vae.weights import EncoderWeights, VAEWeights


def encode(vae: VAEWeights, video: Tensor) -> Tensor:
    """Encode a video to the mean of its latents, normalised.

    Args:
        vae: the weights; their dtype is that of the computation.
        video: [B, 3, F, H, W] in [-1, 1], any float dtype, on the weights' device; F = 4n + 1, H and W multiples of the
            VAE's spatial stride s.

    Returns:
        fp32 [B, C, n + 1, H / s, W / s].

    Raises:
        RequestError: a video of another shape or kind.
    """
    stride = vae.config.temporal_stride
    _check_video(vae, video)
    if (video.shape[2] - 1) % stride:
        nearest = max(round((video.shape[2] - 1) / stride), 0) * stride + 1
        raise RequestError(f"video: must have {stride}n + 1 frames, got {video.shape[2]}; the nearest is {nearest}")
    return _encode(vae, _split(video, stride))


def encode_chunks(vae: VAEWeights, chunks: Iterable[Tensor]) -> Tensor:
    """Encode a video that is never whole in memory, such as a picture followed by the same grey frames again and again.

    Args:
        vae: the weights.
        chunks: one frame [B, 3, 1, H, W], then any number of [B, 3, 4, H, W]; otherwise as `encode`.

    Returns:
        fp32 [B, C, number of chunks, H / s, W / s].

    Raises:
        RequestError: a chunk of another shape or kind, or no chunk.
    """
    return _encode(vae, _checked(vae, chunks))


def encode_chunk(vae: VAEWeights, frames: Tensor, history: History | None) -> tuple[Tensor, History]:
    """Encode the frames of one latent frame.

    Args:
        vae: the weights.
        frames: [B, 3, 1, H, W] at the start of a video, [B, 3, 4, H, W] later; in [-1, 1]. Later, several chunks at
            once give the same at a higher peak.
        history: None for the video's first frame, else as the last call returned it; its memory is used again.

    Returns:
        fp32 [B, C, 1, H / s, W / s], normalised, and the history for the next chunk.

    Raises:
        ValueError: the VAE was loaded without its encoder.
    """
    config = vae.config
    if vae.encoder is None:
        raise ValueError("vae: must hold an encoder, got one loaded without; load_vae(..., encoder=True) works")
    weights = vae.encoder
    x = patchify(frames.to(weights.to_mean.bias.dtype), config.patch_size)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    x, history = _run_encoder(x, weights, history or empty_history(weights), averages=config.version == "2.2")
    latents = pointwise_conv(x, weights.to_mean).float()
    mean = latents.new_tensor(config.latents_mean).view(-1, 1, 1, 1)
    std = latents.new_tensor(config.latents_std).view(-1, 1, 1, 1)
    return (latents - mean) * (1.0 / std), history


def _encode(vae: VAEWeights, chunks: Iterable[Tensor]) -> Tensor:
    latents = []
    history = None
    for frames in chunks:
        latent_frame, history = encode_chunk(vae, frames, history)
        latents.append(latent_frame)
    if not latents:
        raise RequestError("chunks: must hold at least one frame, got none; give the first frame as [B, 3, 1, H, W]")
    return torch.cat(latents, dim=2)


def _split(video: Tensor, stride: int) -> Iterator[Tensor]:
    yield video[:, :, :1]
    for start in range(1, video.shape[2], stride):
        yield video[:, :, start : start + stride]


def _checked(vae: VAEWeights, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    expected = 1
    for index, frames in enumerate(chunks):
        _check_video(vae, frames)
        if frames.shape[2] != expected:
            raise RequestError(
                f"chunks: chunk {index} must be of length {expected} in frames, got {frames.shape[2]}; "
                f"give 1 frame first, then {vae.config.temporal_stride} at a time"
            )
        yield frames
        expected = vae.config.temporal_stride


def _run_encoder(x: Tensor, weights: EncoderWeights, history: History, *, averages: bool) -> tuple[Tensor, History]:
    """Patched pixels to moments; `averages` adds each level's input, averaged, to its output."""
    x, conv_in = causal_conv(x, weights.conv_in, history.conv_in)
    levels = []
    for (blocks, down), past in zip(weights.levels, history.levels, strict=True):
        source = x if averages else None
        past_blocks = []
        for block, past_block in zip(blocks, past.blocks, strict=True):
            x, past_block = residual_block(x, block, past_block)
            past_blocks.append(past_block)
        past_resample = None
        if down is not None:
            x, past_resample = downsample(x, down, past.resample)
            if source is not None:
                source = average_down(source, x.shape[1], 1 if down.time is None else 2)
        if source is not None:
            x += source
        levels.append(LevelHistory(tuple(past_blocks), past_resample))
    x, past_middle = middle(x, weights.middle, history.middle)
    x, conv_out = causal_conv(norm_silu(x, weights.norm_out, overwrite=True), weights.conv_out, history.conv_out)
    return x, History(conv_in, past_middle, tuple(levels), conv_out)


def _check_video(vae: VAEWeights, video: Tensor) -> None:
    stride = vae.config.spatial_stride
    if video.ndim != 5 or video.shape[1] != PIXEL_CHANNELS or 0 in video.shape:
        raise RequestError(
            f"video: must be [B, {PIXEL_CHANNELS}, F, H, W], got {list(video.shape)}; "
            "put batch and colour channels first, and drop an alpha channel"
        )
    if not video.is_floating_point():
        raise RequestError(f"video: must be of a float dtype, got {video.dtype}; scale 0..255 to -1..1 in float32")
    height, width = video.shape[3:]
    if height % stride or width % stride:
        fitting = " x ".join(str(max(side // stride, 1) * stride) for side in (height, width))
        raise RequestError(
            f"video: height and width must be multiples of {stride}, got {height} x {width}; {fitting} works"
        )
