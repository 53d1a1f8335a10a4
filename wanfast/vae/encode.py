"""Encodes video into latents: the first frame alone, then as many frames at a time as one latent frame stands for.

Where memory is short, the fine levels run on one strip of the picture after the other (`tiles.py`).

Source: Wan-Video/Wan2.2, wan/modules/vae2_1.py and vae2_2.py.
"""

from collections.abc import Iterable, Iterator, Sequence

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
    picture_conv,
    residual_block,
)
from wanfast.vae.norms import norm_silu
from wanfast.vae.patch import average_down, patchify
from wanfast.vae.sizes import PIXEL_CHANNELS
from wanfast.vae.tiles import cut_strips, encode_halo
from wanfast.vae.weights import EncoderWeights, VAEWeights


def encode(vae: VAEWeights, video: Tensor, num_tiles: int = 1) -> Tensor:
    """Encode a video to the mean of its latents, normalised.

    Args:
        vae: the weights; their dtype is that of the computation.
        video: [B, 3, F, H, W] in [-1, 1], any float dtype, on the weights' device; F = 4n + 1, H and W multiples of the
            VAE's spatial stride s.
        num_tiles: strips that the fine levels take the picture in; more take less memory and longer.

    Returns:
        fp32 [B, C, n + 1, H / s, W / s].

    Raises:
        RequestError: a video of another shape or kind.
        ValueError: more strips than the longer side has latents.
    """
    stride = vae.config.temporal_stride
    _check_video(vae, video)
    if (video.shape[2] - 1) % stride:
        nearest = max(round((video.shape[2] - 1) / stride), 0) * stride + 1
        raise RequestError(f"video: must have {stride}n + 1 frames, got {video.shape[2]}; the nearest is {nearest}")
    chunks = _split(video, stride)
    return _encode(vae, chunks) if num_tiles == 1 else _encode_strips(vae, list(chunks), num_tiles)


def encode_chunks(vae: VAEWeights, chunks: Iterable[Tensor], num_tiles: int = 1) -> Tensor:
    """Encode a video that is never whole in memory, such as a picture followed by the same grey frames again and again.

    Args:
        vae: the weights.
        chunks: one frame [B, 3, 1, H, W], then any number of [B, 3, 4, H, W]; otherwise as `encode`. For several
            strips they are gone through once for each, and listed before.
        num_tiles: as in `encode`.

    Returns:
        fp32 [B, C, number of chunks, H / s, W / s].

    Raises:
        RequestError: a chunk of another shape or kind, or no chunk.
        ValueError: as in `encode`.
    """
    checked = _checked(vae, chunks)
    return _encode(vae, checked) if num_tiles == 1 else _encode_strips(vae, list(checked), num_tiles)


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
    weights = _encoder(vae)
    x, history = _run_encoder(
        _laid_out(vae, frames),
        weights,
        history or empty_history(weights),
        range(len(weights.levels)),
        averages=_averages(vae),
    )
    return _normalised(vae, x), history


def _encoder(vae: VAEWeights) -> EncoderWeights:
    if vae.encoder is None:
        raise ValueError("vae: must hold an encoder, got one loaded without; load_vae(..., encoder=True) works")
    return vae.encoder


def _averages(vae: VAEWeights) -> bool:
    return vae.config.version == "2.2"


def _encode(vae: VAEWeights, chunks: Iterable[Tensor]) -> Tensor:
    latents = []
    history = None
    for frames in chunks:
        latent_frame, history = encode_chunk(vae, frames, history)
        latents.append(latent_frame)
    if not latents:
        raise _no_chunks()
    return torch.cat(latents, dim=2)


def _encode_strips(vae: VAEWeights, chunks: Sequence[Tensor], num_tiles: int) -> Tensor:
    """Run the fine levels strip by strip, each through the whole video, then the rest frame by frame."""
    if not chunks:
        raise _no_chunks()
    weights, stride = _encoder(vae), vae.config.spatial_stride
    batch, _, _, height, width = chunks[0].shape
    rows, columns, num_fine = height // stride, width // stride, len(weights.levels) - 1
    channels = vae.config.encoder_dim * (1, *vae.config.multipliers)[-2]
    made = [
        torch.empty(
            (batch, channels, 1, rows, columns),
            dtype=weights.to_mean.bias.dtype,
            device=frames.device,
            memory_format=torch.channels_last_3d,
        )
        for frames in chunks
    ]
    for strip in cut_strips(rows, columns, num_tiles, encode_halo(vae.config)):
        history = empty_history(weights)
        for frames, whole in zip(chunks, made, strict=True):
            x = _laid_out(vae, strip.read(frames, stride))
            x, history = _run_encoder(x, weights, history, range(num_fine), averages=_averages(vae))
            strip.place(whole, 1).copy_(strip.keep(x, 1))
    latents, history = [], empty_history(weights)
    for whole in made:
        x, history = _run_encoder(whole, weights, history, range(num_fine, num_fine + 1), averages=_averages(vae))
        latents.append(_normalised(vae, x))
    return torch.cat(latents, dim=2)


def _laid_out(vae: VAEWeights, frames: Tensor) -> Tensor:
    x = patchify(frames.to(_encoder(vae).to_mean.bias.dtype), vae.config.patch_size)
    return x.contiguous(memory_format=torch.channels_last_3d)


def _normalised(vae: VAEWeights, moments: Tensor) -> Tensor:
    latents = picture_conv(moments, _encoder(vae).to_mean).float()
    mean = latents.new_tensor(vae.config.latents_mean).view(-1, 1, 1, 1)
    std = latents.new_tensor(vae.config.latents_std).view(-1, 1, 1, 1)
    return (latents - mean) * (1.0 / std)


def _no_chunks() -> RequestError:
    return RequestError("chunks: must hold at least one frame, got none; give the first frame as [B, 3, 1, H, W]")


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


def _run_encoder(
    x: Tensor, weights: EncoderWeights, history: History, levels: range, *, averages: bool
) -> tuple[Tensor, History]:
    """Patched pixels to moments, or a part of the way, which takes and returns its part of the history.

    What stands before the first level and behind the last runs with it; `averages` adds each level's input, averaged,
    to its output.
    """
    conv_in, past_middle, conv_out = history.conv_in, history.middle, history.conv_out
    past_levels = list(history.levels)
    if levels.start == 0:
        x, conv_in = causal_conv(x, weights.conv_in, conv_in)
    for index in levels:
        (blocks, down), past = weights.levels[index], past_levels[index]
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
        past_levels[index] = LevelHistory(tuple(past_blocks), past_resample)
    if levels.stop == len(weights.levels):
        x, past_middle = middle(x, weights.middle, past_middle)
        x, conv_out = causal_conv(norm_silu(x, weights.norm_out, overwrite=True), weights.conv_out, conv_out)
    return x, History(conv_in, past_middle, tuple(past_levels), conv_out)


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
