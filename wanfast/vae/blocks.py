"""The blocks both VAEs are made of; the temporal ones take and return the frames they need from earlier chunks.

Activations are [B, C, T, H, W] in channels_last_3d. A block never writes to its input, but
to the history it is given: at 720p the histories of a video are 8 GB, and the next ones take their place.
Sources: Wan-Video/Wan2.2, wan/modules/vae2_1.py and vae2_2.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from wanfast import kernels
from wanfast.kernels.rms_norm_silu import pixel_strides
from wanfast.vae.conv import causal_conv3d
from wanfast.vae.weights import (
    AttentionWeights,
    CausalConv,
    DecoderWeights,
    DownsampleWeights,
    EncoderWeights,
    MiddleWeights,
    ResidualWeights,
    UpsampleWeights,
)

BlockHistory = tuple[Tensor | None, Tensor | None]  # one residual block: before its first and its second convolution

_EMPTY_BLOCK: BlockHistory = (None, None)
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True, slots=True)
class LevelHistory:
    """What one level remembers: its residual blocks, and the frames before its temporal resampling if it has one."""

    blocks: tuple[BlockHistory, ...]
    resample: Tensor | None


@dataclass(frozen=True, slots=True)
class History:
    """What an encoder or decoder remembers of earlier chunks: at most two input frames per convolution."""

    conv_in: Tensor | None
    middle: tuple[BlockHistory, BlockHistory]
    levels: tuple[LevelHistory, ...]
    conv_out: Tensor | None


def empty_history(weights: EncoderWeights | DecoderWeights) -> History:
    """Return the history before the first chunk."""
    return History(
        conv_in=None,
        middle=(_EMPTY_BLOCK, _EMPTY_BLOCK),
        levels=tuple(LevelHistory((_EMPTY_BLOCK,) * len(blocks), None) for blocks, _ in weights.levels),
        conv_out=None,
    )


def causal_conv(x: Tensor, conv: CausalConv, history: Tensor | None) -> tuple[Tensor, Tensor]:
    """Apply `causal_conv3d` with a layer's weights; the next history takes the memory of the given one."""
    return causal_conv3d(x, history, conv.weight, conv.bias, reuse_history=True)


def pointwise_conv(x: Tensor, conv: CausalConv) -> Tensor:
    """Apply a 1 x 1 x 1 convolution, which needs no history."""
    return causal_conv3d(x, None, conv.weight, conv.bias)[0]


def rms_norm(x: Tensor, weight: Tensor, *, overwrite: bool = False) -> Tensor:
    """Divide by the length of the channel vector, and multiply by the weight.

    Args:
        x: [B, C, ...]; written to if `overwrite`.
        weight: [C, 1, ...], times sqrt(C), in x's dtype.
        overwrite: return the result in x's memory.

    Returns:
        x's shape and dtype; the length is summed in fp32.
    """
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    scale = length.clamp_min_(_SMALLEST_NORM).reciprocal_().to(x.dtype)
    return torch.mul(x, scale, out=x if overwrite else None).mul_(weight)


def norm_silu(x: Tensor, weight: Tensor, *, overwrite: bool = False) -> Tensor:
    """Apply `rms_norm`, then SiLU, with no memory besides the result's."""
    if x.is_cuda and pixel_strides(x) is not None:  # on a CPU torch's chain is as fast, and faster in 16 bits
        return kernels.rms_norm_silu(x, weight, overwrite=overwrite)
    return F.silu(rms_norm(x, weight, overwrite=overwrite), inplace=True)


def residual_block(x: Tensor, weights: ResidualWeights, history: BlockHistory) -> tuple[Tensor, BlockHistory]:
    """Norm, SiLU, convolution, twice; plus the input, through a 1 x 1 x 1 convolution where channels change.

    Args:
        x: [B, C, T, H, W].
        weights: of a block from C to O channels.
        history: as the last chunk's call returned it.

    Returns:
        [B, O, T, H, W] in memory of its own, and the next chunk's history.
    """
    y, history_1 = causal_conv(norm_silu(x, weights.norm_1), weights.conv_1, history[0])
    y, history_2 = causal_conv(norm_silu(y, weights.norm_2, overwrite=True), weights.conv_2, history[1])
    y += x if weights.shortcut is None else pointwise_conv(x, weights.shortcut)
    return y, (history_1, history_2)


def attention_block(x: Tensor, weights: AttentionWeights) -> Tensor:
    """Let the pixels of each frame attend to one another, and add the input.

    Args:
        x: [B, C, T, H, W]; frames do not see one another.
        weights: of width C, one head.

    Returns:
        [B, C, T, H, W] in memory of its own.
    """
    frames = _fold_frames(x)
    height = frames.shape[2]
    qkv = F.conv2d(rms_norm(frames, weights.norm), weights.to_qkv.weight, weights.to_qkv.bias)
    q, k, v = rearrange(qkv, "n (three c) h w -> three n 1 (h w) c", three=3)
    attended = rearrange(F.scaled_dot_product_attention(q, k, v), "n 1 (h w) c -> n c h w", h=height)
    y = F.conv2d(attended, weights.proj.weight, weights.proj.bias)
    return _unfold_frames(y, x.shape[0]).add_(x)


def middle(
    x: Tensor, weights: MiddleWeights, history: tuple[BlockHistory, BlockHistory]
) -> tuple[Tensor, tuple[BlockHistory, BlockHistory]]:
    """Apply the coarsest blocks: residual, attention, residual; [B, C, T, H, W] to the same shape."""
    x, history_1 = residual_block(x, weights.block_1, history[0])
    x, history_2 = residual_block(attention_block(x, weights.attention), weights.block_2, history[1])
    return x, (history_1, history_2)


def downsample(x: Tensor, weights: DownsampleWeights, history: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Halve rows and columns with a 3 x 3 convolution, then frames, if it is temporal, with one of 3 frames.

    The video's first frame skips the temporal convolution. Later chunks see the frame before them.

    Args:
        x: [B, C, T, H, W]; H and W even; T = 1 in the first chunk, even in later ones if temporal.
        weights: of a level with C channels.
        history: None in the first chunk, else [B, C, 1, H / 2, W / 2] as the last call returned it.

    Returns:
        [B, C, T or T / 2, H / 2, W / 2], and the next chunk's history (None if not temporal).
    """
    frames = F.pad(_fold_frames(x), (0, 1, 0, 1))  # zeros on the right and at the bottom only
    y = _unfold_frames(F.conv2d(frames, weights.space.weight, weights.space.bias, stride=2), x.shape[0])
    if weights.time is None:
        return y, None
    last = y[:, :, -1:].clone()
    if history is not None:
        y = F.conv3d(torch.cat((history, y), dim=2), weights.time.weight, weights.time.bias, stride=(2, 1, 1))
    return y, last


def upsample(x: Tensor, weights: UpsampleWeights, history: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Double frames, if it is temporal, with a causal convolution, then rows and columns with a 3 x 3 convolution.

    The video's first frame skips the temporal convolution and is not remembered by it.

    Where a picture doubled by repetition meets a 3 x 3 convolution, each output reads only 2 x 2 different pixels: four
    2 x 2 convolutions with summed taps, one per parity of row and column, give the same with 4/9 of the products and no
    doubled picture.

    Args:
        x: [B, C, T, H, W]; T = 1 in the first chunk.
        weights: of an upsampling from C to O channels.
        history: None in the first chunk, else [B, C, <= 2, H, W] as the last call returned it.

    Returns:
        [B, O, T or 2 T, 2 H, 2 W] in memory of its own, and the next chunk's history (None if not temporal).
    """
    if weights.time is not None:
        if history is None:
            history = x.new_empty((*x.shape[:2], 0, *x.shape[3:]))
        else:
            y, history = causal_conv(x, weights.time, history)
            x = rearrange(y, "b (parity c) t h w -> b (t parity) h w c", parity=2).movedim(-1, 1)
    frames = _fold_frames(x)
    count, _, height, width = frames.shape
    y = frames.new_empty((count, 2 * height, 2 * width, len(weights.bias))).movedim(-1, 1)
    for phase, (row, column) in zip(weights.phases, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        part = F.conv2d(frames, phase, weights.bias, padding=1)  # one row and column more than this phase has
        y[:, :, row::2, column::2] = part[:, :, row : row + height, column : column + width]
    return _unfold_frames(y, x.shape[0]), history


def _fold_frames(x: Tensor) -> Tensor:
    return rearrange(x, "b c t h w -> (b t) c h w")


def _unfold_frames(x: Tensor, batch: int) -> Tensor:
    return rearrange(x, "(b t) c h w -> b c t h w", b=batch)
