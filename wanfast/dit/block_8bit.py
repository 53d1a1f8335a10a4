"""One DiT block in 8 bits: the steps of `block.py`, each product from 8-bit tokens with a scale of their own.

Norms write the 8 bits that the next product reads, products add to the residual stream themselves, and attention takes
int8 queries and keys. The stream, norms, softmax and sums are fp32; attention to the text is 16-bit.
Source: docs/numerics.md.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import log
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from wanfast import kernels
from wanfast.dit.attention import attention
from wanfast.dit.block import CHUNK_TOKENS, token_runs
from wanfast.dit.packed import PackedBlock, PackedLinear, multiplies_e4m3
from wanfast.dit.text import KeyValues
from wanfast.kernels import (
    GROUP,
    BlockLists,
    Quantized,
    QuantizedKeys,
    QuantizedQueries,
    QuantizedValues,
    QuantizedWeight,
)

_COMPUTE_DTYPE = torch.bfloat16  # of what is not 8-bit
# From the queries of a run, as they were made for it, and the lists of their blocks.
Attend: TypeAlias = Callable[[Any, BlockLists | None], Quantized]


def dit_block_8bit(
    hidden: Tensor,
    block: PackedBlock,
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
    """Run one block in the memory of its stream; arguments and result as in `dit_block`."""
    if attends_to_itself:
        self_attention_8bit(
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
    for sample, (stream, rows) in enumerate(zip(torch.split(hidden, 1), torch.split(modulation, 1), strict=True)):
        k, v = text.keys[sample : sample + 1], text.values[sample : sample + 1]
        shift, scale, gate = rows[:, :, 3:].unbind(2)
        for run in runs:
            part, first = stream[:, run.tokens], run.first_tokens
            _add(part, _attended_to_text(part, block, k, v, text.last_count, eps), block.text_attended, None, 0)
            x = kernels.layer_norm_modulate_quantize(
                part, scale, shift, block.dtype, eps=eps, first_tokens=first, rotated=_rotated(block.ffn_up)
            )
            _add(part, _hidden_layer(x, block), block.ffn_down, gate, first)
    return hidden


def self_attention_8bit(
    hidden: Tensor,
    block: PackedBlock,
    modulation: Tensor,
    rotations: Tensor,
    *,
    num_heads: int,
    eps: float,
    first_tokens: int = 0,
    chunk_tokens: int = CHUNK_TOKENS,
    attention_density: float = 1.0,
) -> None:
    """Run the first step of a block in the memory of its stream; arguments as in `self_attention`.

    Runs are of whole blocks of keys where heads have a width that 8-bit attention has.
    """
    in_8_bits = rotations.shape[1] * 2 in kernels.HEAD_DIMS
    if in_8_bits:
        chunk_tokens = -(-chunk_tokens // kernels.KEY_BLOCK) * kernels.KEY_BLOCK
    runs = list(token_runs(hidden.shape[1], chunk_tokens, first_tokens))
    for stream, rows in zip(torch.split(hidden, 1), torch.split(modulation, 1), strict=True):
        gate = rows[:, :, 2]
        heads = (1, stream.shape[1], num_heads, stream.shape[2] // num_heads)
        mean = _mean_of_keys(stream, block, rows, rotations, eps, first_tokens) if in_8_bits else None
        values = torch.empty(heads, dtype=_COMPUTE_DTYPE, device=stream.device)
        keys = torch.empty_like(values) if mean is None else kernels.empty_keys(heads, stream.device)
        queries: list[Tensor | QuantizedQueries] = []
        for run in runs:
            x = _normed(stream[:, run.tokens], block, rows, eps, run.first_tokens)
            _product(x, block.values, out=values[:, run.tokens].flatten(2))
            both = _product(x, block.queries_keys)
            queries.append(_turned(both, block, rotations, keys, mean, run.tokens, eps))
            del x, both
        lists = _chosen(queries, keys, attention_density) if attention_density < 1 else None
        attend: Attend
        if isinstance(keys, QuantizedKeys):
            rounded = torch.float8_e4m3fn if multiplies_e4m3(hidden.device) else torch.float16
            attend = partial(_attend_in_8_bits, block, keys, kernels.quantize_values(values, dtype=rounded))
            del values  # of full length, and of no use any more
        else:
            attend = partial(_attend_in_16_bits, block, keys, values)
        for run, of_run in zip(runs, queries, strict=True):
            listed = None if lists is None else kernels.lists_of_run(lists, run.tokens.start, run.tokens.stop)
            _add(stream[:, run.tokens], attend(of_run, listed), block.attended, gate, run.first_tokens)


def _normed(part: Tensor, block: PackedBlock, modulation: Tensor, eps: float, first_tokens: int) -> Quantized:
    """Give what self-attention's projections read of some tokens, of which the first take modulation row 0."""
    return kernels.layer_norm_modulate_quantize(
        part,
        modulation[:, :, 1],
        modulation[:, :, 0],
        block.dtype,
        eps=eps,
        first_tokens=first_tokens,
        rotated=_rotated(block.values),
    )


def _mean_of_keys(
    stream: Tensor, block: PackedBlock, modulation: Tensor, rotations: Tensor, eps: float, first_tokens: int
) -> Tensor:
    """Give what is subtracted from all keys of a head, [1, N, D] fp32: the mean of a few, which are computed ahead.

    So the keys themselves can be rounded run by run, and are never there in 16 bits.
    """
    num_tokens = stream.shape[1]
    some = kernels.sampled_tokens(num_tokens, stream.device)
    of_row_0 = -(-first_tokens * len(some) // num_tokens)  # those of them that are below first_tokens
    x = _normed(stream[:, some], block, modulation, eps, of_row_0)
    keys = _product(x, _lower_half(block.queries_keys))
    turned = kernels.rms_norm_rope(keys, block.norm_k, rotations[some], eps=eps, out_dtype=torch.float32)
    return turned.mean(1)


def _lower_half(layer: PackedLinear) -> PackedLinear:
    """See the second of two layers of one height that were packed together."""
    weight, first = layer.weight, layer.weight.shape[0] // 2
    return PackedLinear(
        QuantizedWeight(weight.values[first:], weight.scale[first:], weight.rotated),
        None if layer.bias is None else layer.bias[first:],
        None if layer.low_rank is None else (layer.low_rank[0], layer.low_rank[1][first:]),
    )


def _turned(
    both: Tensor,
    block: PackedBlock,
    rotations: Tensor,
    keys: Tensor | QuantizedKeys,
    mean: Tensor | None,
    run: slice,
    eps: float,
) -> Tensor | QuantizedQueries:
    """Norm and turn a run's queries and keys; the keys are written to those of all tokens, less a mean if in 8 bits."""
    (q, k), turns = both.chunk(2, -1), rotations[run]
    if isinstance(keys, Tensor):
        kernels.rms_norm_rope(k, block.norm_k, turns, eps=eps, out=keys[:, run])
        return kernels.rms_norm_rope(q, block.norm_q, turns, eps=eps)
    assert mean is not None
    kernels.rms_norm_rope_quantize_keys(k, block.norm_k, turns, mean, eps=eps, out=keys, first_token=run.start)
    return kernels.rms_norm_rope_quantize(q, block.norm_q, turns, eps=eps)


def _chosen(queries: Sequence[Tensor | QuantizedQueries], keys: Tensor | QuantizedKeys, density: float) -> BlockLists:
    """Choose the blocks of keys for all queries, which lie in runs; in 8 bits the softmax's factor is in them."""
    if isinstance(keys, QuantizedKeys):  # what was subtracted from all keys of a head is nothing to a softmax
        values, of_rows = keys.rows
        k_mean, scale = kernels.block_means(values, kernels.KEY_BLOCK, of_rows), log(2)
        del of_rows
        tokens = keys.tokens
    else:
        k_mean, scale = kernels.block_means(keys, kernels.KEY_BLOCK), keys.shape[3] ** -0.5
        tokens = keys.shape[1]
    means = [
        kernels.block_means(q.values, kernels.QUERY_BLOCK, q.scale)
        if isinstance(q, QuantizedQueries)
        else kernels.block_means(q, kernels.QUERY_BLOCK)
        for q in queries
    ]
    return kernels.choose_blocks(torch.cat(means, 2), k_mean, queries=tokens, keys=tokens, density=density, scale=scale)


def _attend_in_8_bits(
    block: PackedBlock, k: QuantizedKeys, v: QuantizedValues, q: QuantizedQueries, lists: BlockLists | None
) -> Quantized:
    rotated = _rotated(block.attended)
    if q.values.shape[3] == GROUP:  # a scale per head is then one per group of channels
        return kernels.attention_int8_quantized(q, k, v, block.dtype, rotated=rotated, lists=lists)
    attended = kernels.attention_int8(q, k, v, lists=lists).flatten(2)
    return kernels.quantize_rows(attended, block.dtype, rotated=rotated)


def _attend_in_16_bits(block: PackedBlock, k: Tensor, v: Tensor, q: Tensor, lists: BlockLists | None) -> Quantized:
    """For heads of a width that no 8-bit kernel has."""
    return kernels.quantize_rows(attention(q, k, v, lists=lists), block.dtype, rotated=_rotated(block.attended))


def _attended_to_text(part: Tensor, block: PackedBlock, k: Tensor, v: Tensor, last_count: int, eps: float) -> Quantized:
    """Let a run of the stream attend to the text: what the output projection reads."""
    rotated = _rotated(block.text_queries)
    x = kernels.layer_norm_quantize(part, block.norm3_weight, block.norm3_bias, block.dtype, eps=eps, rotated=rotated)
    q = kernels.rms_norm(_product(x, block.text_queries), block.cross_attn.norm_q, eps=eps)
    q = q.view(*q.shape[:2], k.shape[2], -1).to(k.dtype)
    attended = attention(q, k, v, last_count=last_count)
    return kernels.quantize_rows(attended, block.dtype, rotated=_rotated(block.text_attended))


def _hidden_layer(x: Quantized, block: PackedBlock) -> Quantized:
    """Give the FFN's hidden layer in 8 bits, with a scale per 128 channels where it has whole groups of them."""
    layer, rotated = block.ffn_up, _rotated(block.ffn_down)
    if layer.weight.shape[0] % GROUP == 0:
        return kernels.linear_8bit_gelu(x, layer.weight, layer.bias, rotated=rotated, low_rank=_low_rank(x, layer))
    hidden = F.gelu(_product(x, layer), approximate="tanh")
    return kernels.quantize_rows(hidden, block.dtype, rotated=rotated)


def _product(x: Quantized, layer: PackedLinear, out: Tensor | None = None) -> Tensor:
    return kernels.linear_8bit(x, layer.weight, layer.bias, low_rank=_low_rank(x, layer), out=out)


def _add(stream: Tensor, x: Quantized, layer: PackedLinear, gate: Tensor | None, first_tokens: int) -> None:
    kernels.linear_8bit_residual(
        x, layer.weight, layer.bias, stream, gate, first_tokens=first_tokens, low_rank=_low_rank(x, layer)
    )


def _low_rank(x: Quantized, layer: PackedLinear) -> tuple[Tensor, Tensor] | None:
    if layer.low_rank is None:
        return None
    down, up = layer.low_rank
    return kernels.linear_8bit(x, down, None, out_dtype=up.dtype), up


def _rotated(layer: PackedLinear) -> bool:
    return layer.weight.rotated
