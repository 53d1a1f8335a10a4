"""Softmax attention of 16-bit heads over listed blocks of keys alone.

    keep(t) = the tokens of the key blocks that BlockLists names for t's query block
    z[t, s] = scale * q[t] . k[s]
    out[t] = sum_{s in keep(t)} exp(z[t, s]) v[s] / sum_{s in keep(t)} exp(z[t, s]),   lse[t] = ln of the denominator

Grid       (ceil(T / queries), N, B), one program per block of queries and head, as in attention.py.
Tile       that of attention.py; its queries divide 128.
Numerics   those of attention.py, whose steps are called: with every block listed the result has the same bits.
Bounds     lists ascend, so a partial block of keys can only be the last of its list: the last is peeled, the others run
           without a mask. Block numbers are not looked at: who makes lists answers for them.
Traffic    as attention.py; work is that of attention.py times the share of blocks listed.
Reference  attention_sparse_reference, below: the softmax over the listed keys, gathered.
Source     block_mask.py, for the lists.
"""

import math
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attention_tiles import KEYS, AttentionTile, architecture, pick
from ._launch import on_device_of, tl, triton
from .attention import (
    attend_ahead,
    check_attention,
    fold_last_block,
    fold_scores,
    kernel_serves,
    nothing_yet,
    store_rows,
)
from .block_mask import QUERY_BLOCK, BlockLists, check_lists, token_mask


def attention_sparse_reference(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, *, scale: float, out: Tensor | None = None
) -> Tensor:
    """The formula above in plain torch, one head and block of queries at a time, over copies of its listed keys."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    for b, n, i in torch.cartesian_prod(*(torch.arange(size) for size in lists.counts.shape)).reshape(-1, 3).tolist():
        rows = slice(i * QUERY_BLOCK, (i + 1) * QUERY_BLOCK)
        blocks = lists.columns[b, n, i, : lists.counts[b, n, i]].long()
        keys = (blocks[:, None] * KEYS + torch.arange(KEYS, device=q.device)).flatten()
        keys = keys[keys < k.shape[1]]
        out[b, rows, n] = F.scaled_dot_product_attention(
            q[b, rows, n][None], k[b, keys, n][None], v[b, keys, n][None], scale=scale
        )[0]
    return out


def sparse_log_sum_exp_reference(q: Tensor, k: Tensor, lists: BlockLists, *, scale: float) -> Tensor:
    """The logarithm of the denominators above in plain torch, [B, N, T] fp32."""
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), device=q.device)
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            scores = q[b, :, n].float() @ k[b, :, n].float().T * scale
            dropped = ~token_mask(lists, b, n, q.shape[1], k.shape[1])
            lse[b, n] = scores.masked_fill(dropped, -math.inf).logsumexp(-1)
    return lse


@triton.jit(do_not_specialize=["T", "S", "N", "M"])
def _attention_sparse_kernel(
    q_ptr,  # [B, T, N, D], channels adjacent
    k_ptr,  # [B, S, N, D], channels adjacent
    v_ptr,  # [B, S, N, D], channels adjacent
    columns_ptr,  # [B, N, ceil(T / 128), M], contiguous
    counts_ptr,  # [B, N, ceil(T / 128)], contiguous
    out_ptr,  # [B, T, N, D], channels adjacent
    lse_ptr,  # [B, N, T], contiguous
    T,
    S,  # at least 1
    N,
    M,  # at least 1
    q_stride_b,
    q_stride_t,
    q_stride_n,
    k_stride_b,
    k_stride_s,
    k_stride_n,
    v_stride_b,
    v_stride_s,
    v_stride_n,
    out_stride_b,
    out_stride_t,
    out_stride_n,
    scale,  # of scores, times log2 e: the softmax is taken in base 2
    D: tl.constexpr,
    QUERIES: tl.constexpr,  # power of two; divides QUERY_BLOCK
    KEYS: tl.constexpr,  # of a listed block
    PART: tl.constexpr,  # power of two; divides D
    AHEAD: tl.constexpr,  # whether scores are taken one block ahead
    QUERY_BLOCK: tl.constexpr,  # queries that share a list
):
    first = tl.program_id(0).to(tl.int64) * QUERIES
    n = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, QUERIES)
    key = tl.arange(0, KEYS)
    channel = tl.arange(0, D)
    live = row < T - first

    q_ptr += b * q_stride_b + n * q_stride_n + first * q_stride_t
    q = tl.load(q_ptr + row[:, None] * q_stride_t + channel[None, :], mask=live[:, None], other=0.0)
    k_ptr += b * k_stride_b + n * k_stride_n
    v_ptr += b * v_stride_b + n * v_stride_n
    k_at = key[None, :] * k_stride_s + channel[:, None]
    v_at = key[:, None] * v_stride_s + tl.arange(0, PART)[None, :]

    entry = (b * N + n) * tl.cdiv(T, QUERY_BLOCK) + first // QUERY_BLOCK
    columns_ptr += entry * M
    count = tl.load(counts_ptr + entry)  # in bounds: T > first, and a block of queries has one entry
    state = nothing_yet(QUERIES, D // PART, PART)
    if AHEAD:
        state = attend_ahead(
            state, q, k_ptr, v_ptr, k_at, v_at, k_stride_s, v_stride_s, columns_ptr, count, S, 0.0, scale
        )
    else:
        at = tl.load(columns_ptr).to(tl.int64) * KEYS  # in bounds: M >= 1
        for i in range(1, count):
            following = tl.load(columns_ptr + i)  # in bounds: i < count <= M; early, so that its block can be
            scores = tl.dot(q, tl.load(k_ptr + at * k_stride_s + k_at))  # in bounds: only a list's last can be partial
            state = fold_scores(state, scores, v_ptr + at * v_stride_s + v_at, None, scale)
            at = following.to(tl.int64) * KEYS
        k_last, v_last = k_ptr + at * k_stride_s + k_at, v_ptr + at * v_stride_s + v_at
        state = fold_last_block(state, q, k_last, v_last, S - at, 0.0, scale)

    out_ptr += b * out_stride_b + n * out_stride_n + first * out_stride_t
    store_rows(state, out_ptr, lse_ptr + (b * N + n) * T + first, out_stride_t, live)


def attention_sparse_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    out: Tensor | None = None,
    tile: AttentionTile | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel on checked arguments; the table's tile unless one is given. Returns the result and lse."""
    batch, tokens, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    tile = tile or pick(architecture(q), head_dim)
    grid = (triton.cdiv(tokens, tile.queries), heads, batch)
    with on_device_of(q):
        _attention_sparse_kernel[grid](
            q,
            k,
            v,
            lists.columns,
            lists.counts,
            out,
            lse,
            tokens,
            k.shape[1],
            heads,
            lists.columns.shape[3],
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            scale * math.log2(math.e),
            D=head_dim,
            QUERIES=tile.queries,
            KEYS=KEYS,
            PART=tile.part,
            AHEAD=tile.ahead,
            QUERY_BLOCK=QUERY_BLOCK,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out, lse


@overload
def attention_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float | None = ...,
    out: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def attention_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float | None = ...,
    out: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Let every query attend to the keys of the blocks listed for its block.

    Args:
        q: [B, T, N, D], channels adjacent, any other strides; float16, bfloat16, float32 or float64.
        k: [B, S, N, D], likewise, q's dtype; S at least 1.
        v: like k.
        lists: as `block_mask` makes them: ascending, at least one block each, every one a block of k. The lists'
            contents are not checked: a block beyond k's reads foreign memory.
        scale: of the scores; 1 / sqrt(D) where None.
        out: [B, T, N, D], q's dtype, channels adjacent: written to and returned; may not overlap q, k or v.
        return_lse: also return the logarithm of the softmax's denominator.

    Returns:
        [B, T, N, D], contiguous unless `out` is not; with return_lse that and lse [B, N, T], fp32, natural logarithm.

    Raises:
        ValueError: a shape, dtype, stride, device or number is not as above.
    """
    scale = check_attention(q, k, v, out, scale)
    check_lists(lists, q, k.shape[1])
    if kernel_serves(q):
        result, lse = attention_sparse_triton(q, k, v, lists, scale=scale, out=out)
        return (result, lse) if return_lse else result
    result = attention_sparse_reference(q, k, v, lists, scale=scale, out=out)
    return (result, sparse_log_sum_exp_reference(q, k, lists, scale=scale)) if return_lse else result
