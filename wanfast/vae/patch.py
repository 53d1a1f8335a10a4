"""Parameter-free rearrangements of the Wan 2.2 VAE: pixels into channels, and the shortcuts around its levels.

Source: Wan-Video/Wan2.2, wan/modules/vae2_2.py.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def patchify(video: Tensor, size: int) -> Tensor:
    """Fold each size x size square of pixels into channels, ordered (channel, column, row), row fastest.

    Args:
        video: [B, C, F, H, W]; H and W multiples of size.
        size: pixels per side; 1 changes nothing.

    Returns:
        [B, C x size x size, F, H / size, W / size], laid out as channels_last_3d unless size is 1.
    """
    if size == 1:
        return video
    pattern = "b c f (h row) (w column) -> b f h w (c column row)"
    return rearrange(video, pattern, row=size, column=size).movedim(-1, 1)


def unpatchify(x: Tensor, size: int) -> Tensor:
    """Undo `patchify`.

    Args:
        x: [B, C x size x size, F, h, w].
        size: pixels per side; 1 changes nothing.

    Returns:
        [B, C, F, h x size, w x size], contiguous unless size is 1.
    """
    if size == 1:
        return x
    return rearrange(x, "b (c column row) f h w -> b c f (h row) (w column)", row=size, column=size)


def average_down(x: Tensor, out_channels: int, temporal_factor: int) -> Tensor:
    """Average 2 x 2 squares, and the frames that become one as well or else give each of them a channel.

    This is the encoder's shortcut (AvgDown3D). In general it puts the fine positions behind the channel, ordered
    (channel, frame, row, column), and averages runs of them; the two cases here are those whose runs are whole squares.

    Args:
        x: [B, C, T, H, W]; H and W even. A T that is no multiple of temporal_factor gets zero frames in front.
        out_channels: C (mean over the frames) or C x temporal_factor (output channel c x temporal_factor + frame).
        temporal_factor: 1 or 2.

    Returns:
        [B, out_channels, ceil(T / temporal_factor), H / 2, W / 2] in x's dtype.
    """
    squares = F.avg_pool2d(rearrange(x, "b c t h w -> (b t) c h w"), 2)
    squares = rearrange(squares, "(b t) c h w -> b c t h w", b=x.shape[0])
    if missing := -x.shape[2] % temporal_factor:
        squares = F.pad(squares, (0, 0, 0, 0, missing, 0))
    if out_channels == x.shape[1]:
        return rearrange(squares, "b c (f frame) h w -> b c f frame h w", frame=temporal_factor).mean(dim=3)
    pattern = "b c (f frame) h w -> b f h w (c frame)"
    return rearrange(squares, pattern, frame=temporal_factor).movedim(-1, 1)


def add_repeated_up_(x: Tensor, source: Tensor, temporal_factor: int) -> None:
    """Add source to x, each value repeated over rows, columns and frames as far as the channels allow.

    This is the decoder's shortcut (DupUp3D), never materialised: each channel of source is repeated until there is one
    entry for every channel and fine position of x, ordered (channel, frame, row, column).

    Args:
        x: [B, O, T, 2 H, 2 W], written to. T is temporal_factor x F, or fewer at the start of a video, whose first
            frame stands alone: then the first repeated frames are dropped.
        source: [B, C, F, H, W], C a multiple of O.
        temporal_factor: 1 or 2.
    """
    stride = source.shape[1] // x.shape[1]  # channels of source per channel of x
    repeats = temporal_factor * 4 // stride
    dropped = temporal_factor * source.shape[2] - x.shape[2]
    for frame in range(temporal_factor):
        skipped = 1 if frame < dropped else 0  # coarse frames whose fine frame here was dropped
        start = frame - dropped + skipped * temporal_factor
        for row in (0, 1):
            for column in (0, 1):
                first = (frame * 4 + row * 2 + column) // repeats
                x[:, :, start::temporal_factor, row::2, column::2] += source[:, first::stride, skipped:]
