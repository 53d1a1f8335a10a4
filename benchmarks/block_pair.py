"""One whole DiT block in 8 bits beside the same block in bf16: diffusers' where there is one, and wanfast's exact."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from wan_shapes import HEAD_DIM, Wan

from wanfast.dit.block import dit_block
from wanfast.dit.block_8bit import dit_block_8bit
from wanfast.dit.packed import pack_block, prepare_block
from wanfast.dit.text import KeyValues
from wanfast.dit.weights import AttentionWeights, BlockWeights
from wanfast.linear import Linear
from wanfast.rope import rope_rotations

EPS = 1e-6
TEXT_TOKENS = 512
SMALL = 1e-3  # of what is added to the stream, which each run writes to: it must not grow


def _weights(wan: Wan, device: torch.device) -> BlockWeights:
    generator = torch.Generator(device).manual_seed(0)

    def matrix(out: int, width: int, scale: float = 1.0) -> Linear:
        weight = torch.randn(out, width, generator=generator, device=device) * (scale * width**-0.5)
        return Linear(weight.bfloat16(), torch.zeros(out, device=device, dtype=torch.bfloat16))

    def attention() -> AttentionWeights:
        width = wan.channels
        ones = torch.ones(width, device=device)
        last = matrix(width, width, SMALL)
        return AttentionWeights(*(matrix(width, width) for _ in range(3)), last, ones, ones)

    return BlockWeights(
        modulation=torch.zeros(1, 6, wan.channels, device=device),
        self_attn=attention(),
        norm3_weight=torch.ones(wan.channels, device=device),
        norm3_bias=torch.zeros(wan.channels, device=device),
        cross_attn=attention(),
        ffn_up=matrix(wan.hidden, wan.channels),
        ffn_down=matrix(wan.channels, wan.hidden, SMALL),
    )


def block_operations(wan: Wan) -> float:
    """Two for each multiply-add: self-attention, attention to the text, and all projections of the video's tokens."""
    attended = 4.0 * wan.tokens * (wan.tokens + TEXT_TOKENS) * wan.channels
    return attended + 2.0 * wan.tokens * (6 * wan.channels**2 + 2 * wan.channels * wan.hidden)


def block_runs(wan: Wan, device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The 8-bit block as an operation, and its peers by name; each has a stream of its own."""
    weights = _weights(wan, device)
    packed = pack_block(prepare_block(weights, dtype), dtype)
    generator = torch.Generator(device).manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    keys, values = (randn(1, TEXT_TOKENS, wan.heads, HEAD_DIM).bfloat16() for _ in range(2))
    text = KeyValues(keys, values, 1)
    rotations = rope_rotations(wan.grid, HEAD_DIM).to(device)
    modulation, stream = randn(1, 1, 6, wan.channels), randn(1, wan.tokens, wan.channels)
    sizes: dict[str, Any] = {"num_heads": wan.heads, "eps": EPS}
    exact = stream.clone()
    peers = {"exact": lambda: dit_block(exact, weights, modulation, text, rotations, **sizes)}
    with suppress(ImportError):
        peers["diffusers"] = _diffusers(wan, device, modulation[0])
    return lambda: dit_block_8bit(stream, packed, modulation, text, rotations, **sizes), peers


def _diffusers(wan: Wan, device: torch.device, modulation: Tensor) -> Any:
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    with device:
        block = WanTransformerBlock(
            wan.channels, wan.hidden, wan.heads, qk_norm="rms_norm_across_heads", cross_attn_norm=True, eps=EPS
        )
    block = block.to(torch.bfloat16).eval()
    stream = torch.randn(1, wan.tokens, wan.channels, device=device, dtype=torch.bfloat16)
    text = torch.randn(1, TEXT_TOKENS, wan.channels, device=device, dtype=torch.bfloat16)
    angles = torch.randn(1, wan.tokens, 1, HEAD_DIM, device=device)
    rotary = (angles.cos(), angles.sin())
    return lambda: block(stream, text, modulation, rotary)
