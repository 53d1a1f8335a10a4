"""Latents to pixels on the host: whole pictures as they come, or strip by strip where memory is short.

A strip is decoded through the whole video before the next, so that only one strip's history is held: the histories are
what a decoder needs most memory for. Its pixels wait on the host, one byte per colour, and with the last strip whole
frames come as they are finished.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from wanfast.pixels import on_host
from wanfast.vae.decode import decode
from wanfast.vae.tiles import cut_strips, decode_halo
from wanfast.vae.weights import VAEWeights


def decode_pixels(
    vae: VAEWeights,
    latents: Tensor,
    num_tiles: int = 1,
    *,
    skip: int = 0,
    on_frames: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """Decode a video to pixels on the host, chunk by chunk.

    Args:
        vae: the weights.
        latents: [1, C, F, H, W], as in `decode`.
        num_tiles: strips that the picture is decoded in; more take less memory and longer.
        skip: frames at the start that are not given out; 0, or 1 and a multiple of the temporal stride more.
        on_frames: called after each chunk with the frames done by then, those of a strip as a share.

    Yields:
        uint8 [1 or 4, s H, s W, 3], contiguous; as one chunk is yielded the next is already being computed on a GPU.

    Raises:
        RequestError: as in `decode`.
        NotFiniteError: a frame is not finite.
        ValueError: more strips than the longer side has latents.
    """
    config = vae.config
    num_chunks, rows, columns = latents.shape[2:]
    num_frames = 1 + (num_chunks - 1) * config.temporal_stride
    whole = None
    for index, strip in enumerate(cut_strips(rows, columns, num_tiles, decode_halo(config))):
        done = 0
        for pixels in on_host(decode(vae, latents, strip if num_tiles > 1 else None)):
            start, done = done, done + len(pixels)
            if num_tiles > 1:
                if whole is None:
                    size = (num_frames, rows * config.spatial_stride, columns * config.spatial_stride, 3)
                    whole = torch.empty(size, dtype=torch.uint8)
                strip.place(whole[start:done], config.spatial_stride, axis=strip.axis + 3).copy_(pixels)
                pixels = whole[start:done]
            if on_frames is not None:
                on_frames((index * num_frames + done) // num_tiles)
            if index == num_tiles - 1 and done > skip:
                yield pixels
