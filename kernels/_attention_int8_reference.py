"""8-bit attention in plain torch, rounding where the kernel rounds: its truth in tests, and the path without a GPU.

The same steps of `flush` keys in the same order (the step that is not whole comes first), with the largest exponent so
far, weights rounded to e4m3 or fp16, and sums over 64 keys rounded to fp16 where the kernel keeps them in fp16. What
differs from the kernel on a GPU is the order of sums, and the last bits of exp2, which now and then round a weight the
other way.
"""

from math import log2

import torch
from torch import Tensor

from ._attention_int8_tiles import LARGEST_WEIGHT
from .block_mask import QUERY_BLOCK, BlockLists
from .quantize_keys import KEY_BLOCK, KEY_GROUPS, QuantizedKeys
from .quantize_queries import QuantizedQueries
from .quantize_values import QuantizedValues, stored_tokens


def attention_int8_reference(
    q: QuantizedQueries,
    k: QuantizedKeys,
    v: QuantizedValues,
    *,
    flush: int,
    accumulate: torch.dtype,
    lists: BlockLists | None = None,
) -> Tensor:
    """Attention [B, T, N, D] in fp32, before its one rounding.

    Args:
        q: of B samples, T tokens, N heads.
        k: of S tokens.
        v: of S tokens.
        flush: keys that are added up before fp32, 64 or 128.
        accumulate: dtype of those sums, float16 or float32.
        lists: which key blocks each block of queries attends to; all where None.

    Returns:
        What the formula of attention_int8.py says.
    """
    keys, values = k.values.float(), _in_order(v)
    step = flush // KEY_BLOCK
    if lists is None:
        blocks = torch.arange(k.values.shape[2], device=k.values.device)
        return _attend(q, keys, k.scale, values, v, blocks, step, accumulate)
    out = torch.empty(q.values.shape, dtype=torch.float32, device=q.values.device)
    for b, n, i in torch.cartesian_prod(*(torch.arange(size) for size in lists.counts.shape)).tolist():
        rows, head = slice(i * QUERY_BLOCK, (i + 1) * QUERY_BLOCK), slice(n, n + 1)
        of_head = (slice(b, b + 1), head)
        some = QuantizedQueries(q.values[b : b + 1, rows, head], q.scale[b : b + 1, rows, head])
        one = QuantizedValues(v.values, v.scale[of_head], v.mean[of_head], v.tokens)
        blocks = lists.columns[b, n, i, : lists.counts[b, n, i]].long()
        out[b : b + 1, rows, head] = _attend(
            some, keys[of_head], k.scale[of_head], values[of_head], one, blocks, step, accumulate
        )
    return out


def _in_order(v: QuantizedValues) -> Tensor:
    """Values [B, N, blocks, 64, D] fp32, in the order of tokens."""
    order = stored_tokens(KEY_BLOCK, v.values.dtype).argsort().to(v.values.device)
    return v.values.float()[..., order].transpose(3, 4)


def _attend(
    q: QuantizedQueries,
    keys: Tensor,
    k_scale: Tensor,
    values: Tensor,
    v: QuantizedValues,
    blocks: Tensor,
    step: int,
    accumulate: torch.dtype,
) -> Tensor:
    """Attention to some key blocks, `step` of them at a time."""
    queries, q_scale = q.values.float().transpose(1, 2), q.scale.transpose(1, 2)[..., None]  # [B, N, T, D or 1]
    out = torch.zeros_like(queries)
    total = torch.zeros_like(q_scale)
    largest = torch.full_like(q_scale, float("-inf"))
    shift = log2(LARGEST_WEIGHT[v.values.dtype])
    for some in _steps(blocks, step, v.tokens):
        exponents = [_exponents(queries, q_scale, keys, k_scale, j, v.tokens) for j in some]
        before, largest = largest, torch.stack([x.amax(-1, keepdim=True) for x in exponents]).amax(0)
        largest = torch.maximum(before, largest)
        shrink = torch.exp2(before - largest)
        out, total = out * shrink, total * shrink
        added = torch.zeros_like(out, dtype=accumulate)
        for j, x in zip(some, exponents, strict=True):
            weights = torch.exp2(x - (largest - shift))
            total += weights.sum(-1, keepdim=True)
            added += (weights.to(v.values.dtype).float() @ values[:, :, j]).to(accumulate)
        out += added
    return (out / total * v.scale[:, :, None] + v.mean[:, :, None]).transpose(1, 2)


def _steps(blocks: Tensor, step: int, tokens: int) -> list[Tensor]:
    """Which blocks are taken together: the step that is not whole first, if there is one."""
    whole = len(blocks) // step * step
    if whole == len(blocks) and (int(blocks[-1]) + 1) * KEY_BLOCK > tokens:
        whole -= step
    rest = [blocks[whole:]] if whole < len(blocks) else []
    return rest + list(blocks[:whole].split(step) if whole else ())


def _exponents(queries: Tensor, q_scale: Tensor, keys: Tensor, k_scale: Tensor, j: Tensor, tokens: int) -> Tensor:
    """Exponents of one key block, [B, N, T, 64]; sums of int8 products are exact in fp32."""
    scores = queries @ keys[:, :, j].transpose(-1, -2)
    of_keys = k_scale[:, :, j, None, :, None].expand(-1, -1, KEY_BLOCK // (2 * KEY_GROUPS), -1, 2).flatten(2)
    exponents = scores * (q_scale * of_keys[:, :, None])
    live = j * KEY_BLOCK + torch.arange(KEY_BLOCK, device=keys.device) < tokens
    return exponents.masked_fill(~live, float("-inf"))
