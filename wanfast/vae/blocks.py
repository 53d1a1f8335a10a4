"""The blocks both VAEs are made of; the temporal ones take and return the frames they need from earlier chunks.

Activations are [B, C, T, H, W] in channels_last_3d. A block never writes to its input, but
to the history it is given: at 720p the histories of a video are 8 GB, and the next ones take their place.
Sources: Wan-Video/Wan2.2, wan/modules/vae2_1.py and vae2_2.py.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from wanfast.vae.conv import causal_conv3d
from wanfast.vae.norms import norm_silu, rms_norm
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


def causal_conv(
    x: Tensor, conv: CausalConv, history: Tensor | None, *, norm: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Apply `causal_conv3d` with a layer's weights; the next history takes the memory of the given one."""
    return causal_conv3d(x, history, conv.weight, conv.bias, norm=norm, reuse_history=True)


def picture_conv(x: Tensor, conv: CausalConv) -> Tensor:
    """Apply a convolution of one frame, which needs no history."""
    return causal_conv3d(x, None, conv.weight, conv.bias)[0]


def residual_block(x: Tensor, weights: ResidualWeights, history: BlockHistory) -> tuple[Tensor, BlockHistory]:
    """Norm, SiLU, convolution, twice; plus the input, through a 1 x 1 x 1 convolution where channels change.

    Args:
        x: [B, C, T, H, W].
        weights: of a block from C to O channels.
        history: as the last chunk's call returned it.

    Returns:
        [B, O, T, H, W] in memory of its own, and the next chunk's history.
    """
    y, history_1 = causal_conv(norm_silu(x, weights.norm_1), weights.conv_1, history[0], norm=weights.norm_2)
    y, history_2 = causal_conv3d(
        y,
        history[1],
        weights.conv_2.weight,
        weights.conv_2.bias,
        residual=x if weights.shortcut is None else picture_conv(x, weights.shortcut),
        overwrite_residual=weights.shortcut is not None,
        reuse_history=True,
    )
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
    y = picture_conv(x, weights.space)
    if weights.time is None:
        return y, None
    if history is None:
        return y, y[:, :, -1:].clone()
    return causal_conv(y, weights.time, history)


def upsample(x: Tensor, weights: UpsampleWeights, history: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Double frames, if it is temporal, with a causal convolution, then rows and columns with a 3 x 3 convolution.

    The video's first frame skips the temporal convolution and is not remembered by it.

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
            x, history = causal_conv(x, weights.time, history)
    return picture_conv(x, weights.space), history


def _fold_frames(x: Tensor) -> Tensor:
    return rearrange(x, "b c t h w -> (b t) c h w")


def _unfold_frames(x: Tensor, batch: int) -> Tensor:
    return rearrange(x, "(b t) c h w -> b c t h w", b=batch)
