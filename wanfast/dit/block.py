"""One DiT block: three steps, each added to the residual stream.

    hidden += gate_attn * self_attention(norm(hidden) * (1 + scale_attn) + shift_attn)
    hidden += cross_attention(norm3(hidden), text)
    hidden += gate_ffn * ffn(norm(hidden) * (1 + scale_ffn) + shift_ffn)

Norms, modulation, gates and the residual stream are fp32; projections and attention run in the dtype of the weights.
A video's stream is gigabytes, so each step goes over it in runs of tokens and adds in place: of full length there are
the stream, and queries, keys and values while self-attention needs them.
Source: Wan-Video/Wan2.2, wan/modules/model.py, WanAttentionBlock.forward.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from wanfast.dit.attention import attention
from wanfast.dit.chunking import CHUNKINGS
from wanfast.dit.text import KeyValues, Text
from wanfast.dit.weights import AttentionWeights, BlockWeights
from wanfast.kernels import block_mask, gated_residual, layer_norm, layer_norm_modulate, lists_of_run, rms_norm
from wanfast.linear import Linear, expand, linear
from wanfast.rope import apply_rope

CHUNK_TOKENS = CHUNKINGS[0].tokens


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens that are computed together."""

    tokens: slice
    first_tokens: int  # the first of them, those that take modulation row 0


def token_runs(num_tokens: int, chunk_tokens: int, first_tokens: int = 0) -> Iterator[Run]:
    """Cut tokens [0, num_tokens), of which [0, first_tokens) take modulation row 0, into runs of chunk_tokens."""
    for start in range(0, num_tokens, chunk_tokens):
        stop = min(start + chunk_tokens, num_tokens)
        yield Run(slice(start, stop), min(max(first_tokens - start, 0), stop - start))


def dit_block(
    hidden: Tensor,
    block: BlockWeights,
    modulation: Tensor,
    text: KeyValues,
    rotations: Tensor,
    *,
    num_heads: int,
    eps: float,
    first_tokens: int = 0,
    chunk_tokens: int = CHUNK_TOKENS,
    attends_to_itself: bool = True,
    attention_density: float = 1.0,
) -> Tensor:
    """Run one block in the memory of its stream.

    Args:
        hidden: [B, T, C] fp32, contiguous: the residual stream. Written to.
        block: its weights, on hidden's device.
        modulation: [B, R, 6, C] fp32: shift, scale and gate of self-attention, then of the FFN. R is 1, or 2 where the
            first tokens have a timestep of their own.
        text: keys and values of the text in this block, from `text_key_values`.
        rotations: [T, D / 2] complex64, from `rope_rotations`.
        num_heads: attention heads N; C = N * D.
        eps: added to the variance in every norm.
        first_tokens: tokens [0, first_tokens) take modulation row 0, the others the last row.
        chunk_tokens: tokens computed at a time; another number changes nothing but the order of a product's sums.
        attends_to_itself: False where `self_attention` has been run on hidden already.
        attention_density: as in `self_attention`.

    Returns:
        hidden.
    """
    if attends_to_itself:
        self_attention(
            hidden,
            block,
            modulation,
            rotations,
            num_heads=num_heads,
            eps=eps,
            first_tokens=first_tokens,
            chunk_tokens=chunk_tokens,
            attention_density=attention_density,
        )
    runs = list(token_runs(hidden.shape[1], chunk_tokens, first_tokens))
    dtype = block.ffn_up.weight.dtype
    for sample, (stream, rows) in enumerate(zip(torch.split(hidden, 1), torch.split(modulation, 1), strict=True)):
        weights = block.cross_attn
        q_layer, o_layer = _plain(weights.q), _plain(weights.o)
        k, v = text.keys[sample : sample + 1], text.values[sample : sample + 1]
        for run in runs:
            x = layer_norm(stream[:, run.tokens], block.norm3_weight, block.norm3_bias, eps=eps, out_dtype=dtype)
            q = _heads(x, q_layer, weights.norm_q, num_heads, eps).to(dtype)
            stream[:, run.tokens] += linear(attention(q, k, v, last_count=text.last_count), o_layer)
        del q_layer, o_layer  # of no use to the next step, and large

        shift, scale, gate = rows[:, :, 3:].unbind(2)
        up, down = _plain(block.ffn_up), _plain(block.ffn_down)
        for run in runs:
            x, first = stream[:, run.tokens], run.first_tokens
            x = layer_norm_modulate(x, scale, shift, eps=eps, first_tokens=first, out_dtype=dtype)
            x = linear(F.gelu(linear(x, up), approximate="tanh"), down)
            _add(stream, x, gate, run)
    return hidden


def self_attention(
    hidden: Tensor,
    block: BlockWeights,
    modulation: Tensor,
    rotations: Tensor,
    *,
    num_heads: int,
    eps: float,
    first_tokens: int = 0,
    stream_dtype: torch.dtype = torch.float32,
    chunk_tokens: int = CHUNK_TOKENS,
    attention_density: float = 1.0,
) -> None:
    """Run the first step of a block, which knows nothing of the text, in the memory of its stream.

    Args:
        hidden: [B, T, C] fp32, contiguous. Written to.
        block: as in `dit_block`, like the arguments that are not named here.
        modulation: [B, R, 6, C] fp32.
        rotations: [T, D / 2] complex64.
        num_heads: attention heads.
        eps: added to the variance in every norm.
        first_tokens: that take modulation row 0.
        stream_dtype: of the numbers in the stream; before the first block they are a projection's, in the weights'
            dtype, and their first norm is rounded to it.
        chunk_tokens: tokens computed at a time; a multiple of 128 where attention is sparse.
        attention_density: share of the blocks of keys, above 0, that each block of queries attends to; 1 is all.
    """
    dtype = block.self_attn.q.weight.dtype
    runs = list(token_runs(hidden.shape[1], chunk_tokens, first_tokens))
    layers = _expanded(block.self_attn)
    for stream, rows in zip(torch.split(hidden, 1), torch.split(modulation, 1), strict=True):
        shift, scale, gate = rows[:, :, :3].unbind(2)
        q, k, v = (_empty_heads(stream, num_heads, dtype) for _ in range(3))
        for run in runs:
            at = run.tokens
            x = _modulated_norm(stream[:, at], scale, shift, run, eps=eps, dtypes=(stream_dtype, dtype))
            apply_rope(_heads(x, layers.q, layers.norm_q, num_heads, eps), rotations[at], out=q[:, at])
            apply_rope(_heads(x, layers.k, layers.norm_k, num_heads, eps), rotations[at], out=k[:, at])
            v[:, at] = _split_heads(linear(x, layers.v), num_heads)
        lists = block_mask(q, k, density=attention_density) if attention_density < 1 else None
        for run in runs:
            listed = None if lists is None else lists_of_run(lists, run.tokens.start, run.tokens.stop)
            x = linear(attention(q[:, run.tokens], k, v, lists=listed), layers.o)
            _add(stream, x, gate, run)


def text_key_values(text: Text, weights: AttentionWeights, *, num_heads: int, eps: float) -> KeyValues:
    """Project a text to what the tokens of a video attend to in one block.

    Args:
        text: embedded, on the weights' device.
        weights: of the block's cross-attention.
        num_heads: attention heads.
        eps: added to the variance in the norm of the keys.
    """
    k = _heads(text.rows, weights.k, weights.norm_k, num_heads, eps).to(weights.k.weight.dtype)
    return KeyValues(k, _split_heads(linear(text.rows, weights.v), num_heads), text.last_count)


def _modulated_norm(
    stream: Tensor, scale: Tensor, shift: Tensor, run: Run, *, eps: float, dtypes: tuple[torch.dtype, torch.dtype]
) -> Tensor:
    """Norm and modulate a run of a stream of `dtypes[0]` into `dtypes[1]`; 16 bits are rounded to between the two."""
    stream_dtype, dtype = dtypes
    if stream_dtype != torch.float32:
        normed = F.layer_norm(stream.to(stream_dtype), stream.shape[-1:], eps=eps)
        first, rest = normed[:, : run.first_tokens], normed[:, run.first_tokens :]
        modulated = [first * (1 + scale[:, :1]) + shift[:, :1], rest * (1 + scale[:, -1:]) + shift[:, -1:]]
        return torch.cat(modulated, dim=1).to(dtype)
    return layer_norm_modulate(stream, scale, shift, eps=eps, first_tokens=run.first_tokens, out_dtype=dtype)


def _add(stream: Tensor, x: Tensor, gate: Tensor, run: Run) -> None:
    gated_residual(stream[:, run.tokens], x, gate, first_tokens=run.first_tokens, overwrite=True)


def _heads(x: Tensor, projection: Linear, norm: Tensor, num_heads: int, eps: float) -> Tensor:
    """Project to queries or keys, normalise over all heads together, then split them: [B, T, N, D], fp32."""
    return _split_heads(rms_norm(linear(x, projection), norm, eps=eps), num_heads)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.view(*x.shape[:-1], num_heads, -1)


def _empty_heads(stream: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    return _split_heads(torch.empty_like(stream, dtype=dtype), num_heads)


def _plain(layer: Linear) -> Linear:
    """Expand a stored weight once for all runs; a plain one is shared."""
    return replace(layer, weight=expand(layer.weight))


def _expanded(weights: AttentionWeights) -> AttentionWeights:
    q, k, v, o = (_plain(layer) for layer in (weights.q, weights.k, weights.v, weights.o))
    return replace(weights, q=q, k=k, v=v, o=o)
