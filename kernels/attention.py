"""Softmax attention of 16-bit heads, without a mask.

    z[t, s] = scale * q[t] . k[s]                   + ln(last_count) for the last key
    out[t] = sum_s exp(z[t, s]) v[s] / sum_s exp(z[t, s]),   lse[t] = ln sum_s exp(z[t, s])

Grid       (ceil(T / queries), N, B), one program per block of queries and head; blocks of a head run side by side, so
           that its k and v are read from memory once and then from L2.
Tile       queries x 64 keys, the D channels of v and of the result in parts, see _attention_tiles.py.
Numerics   scores, softmax and sums in fp32, in base 2, with a running maximum; what was summed is rescaled exactly each
           time it rises. p is rounded to v's dtype before it meets v, the result once, on the store.
Bounds     all blocks of keys but the last run without a mask; the last, whole or partial, is peeled.
Traffic    (2 T + 2 S) N D elements per sample, and 4 T N bytes of lse; bound by the tensor cores, 4 T S N D operations.
Reference  attention_reference, below.
Source     FlashAttention-2 (Dao, 2023); the online softmax of Milakov and Gimelshein (2018).
"""

import math
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attention_tiles import HEAD_DIMS, KEYS, AttentionTile, architecture, pick
from ._checks import require
from ._launch import on_device_of, runs_triton, tl, triton

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_TOKEN_STRIDE = 2**24  # elements: offsets inside a block of 128 tokens are int32


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, last_count: int = 1, out: Tensor | None = None
) -> Tensor:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    bias = None
    if last_count > 1:
        bias = torch.zeros(k.shape[1], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        bias[-1] = math.log(last_count)
        bias = bias.to(q.dtype) if q.is_cuda else bias  # there the fused paths of torch want q's dtype
        bias = bias.expand(1, 1, 1, -1)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    result = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2)
    return result.contiguous() if out is None else out.copy_(result)


def log_sum_exp_reference(q: Tensor, k: Tensor, *, scale: float, last_count: int = 1) -> Tensor:
    """The logarithm ln sum_s exp(z[t, s]) in plain torch, [B, N, T] fp32; holds all B * N * T * S scores at once."""
    scores = torch.einsum("btnd,bsnd->bnts", q.float(), k.float()) * scale
    scores[..., -1] += math.log(last_count)
    return scores.logsumexp(-1)


@triton.jit
def nothing_yet(QUERIES: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):
    """State of a softmax that has met no key: sums of p v in parts, sum of p, largest score."""
    sums = ()
    for _ in tl.static_range(PARTS):
        sums += (tl.zeros([QUERIES, PART], tl.float32),)  # type: ignore[assignment]
    return sums, tl.zeros([QUERIES], tl.float32), tl.full([QUERIES], float("-inf"), tl.float32)


@triton.jit
def fold_scores(state, scores, v_ptr, there, scale):
    """Take a block's scores and its v, at these pointers [keys, PART], into the softmax; v is read where `there`."""
    sums, total, peak = state
    top = tl.maximum(peak, tl.max(scores, 1) * scale)  # scale > 0, so the largest score stays the largest
    p = tl.exp2(tl.fma(scores, scale, -top[:, None]))
    shrink = tl.exp2(peak - top)  # 0 for the first block, whose peak is -inf
    total = total * shrink + tl.sum(p, 1)
    p = p.to(v_ptr.dtype.element_ty)
    new = ()
    for part in tl.static_range(len(sums)):
        if there is None:
            v = tl.load(v_ptr + part * v_ptr.shape[1])  # in bounds: the caller says so, by None
        else:
            v = tl.load(v_ptr + part * v_ptr.shape[1], mask=there[:, None], other=0.0)
        new += (tl.dot(p, v, sums[part] * shrink[:, None]),)  # type: ignore[assignment]
    return new, total, top


@triton.jit
def fold_last_block(state, q, k_ptr, v_ptr, left, last_bias, scale):
    """Take the last block of keys, of which `left` are there; the last of them has `last_bias` added to its scores."""
    key = tl.arange(0, k_ptr.shape[1])
    there = key < left
    scores = tl.dot(q, tl.load(k_ptr, mask=there[None, :], other=0.0))
    scores += tl.where(key == left - 1, last_bias, 0.0)[None, :]
    scores = tl.where(there[None, :], scores, float("-inf"))  # what is not there weighs nothing
    return fold_scores(state, scores, v_ptr, there, scale)


@triton.jit
def attend_ahead(state, q, k_ptr, v_ptr, k_at, v_at, k_stride, v_stride, columns_ptr, count, S, last_bias, scale):
    """Take `count` blocks of keys, ascending; the products of a block's scores run during the softmax before them.

    Blocks are those listed, or all where columns_ptr is None. k_ptr and v_ptr are those of key 0, k_at [D, keys] and
    v_at [keys, PART] the offsets inside a block. Only the last block can be partial. It is read from S - keys on, and
    what it shares with the block before gets no weight: so only fewer keys in all than a block has need masked loads.
    """
    KEYS: tl.constexpr = k_at.shape[1]
    key = tl.arange(0, KEYS)
    at = tl.zeros([], tl.int32)
    if columns_ptr is not None:
        at += tl.load(columns_ptr) * KEYS  # in bounds: count >= 1
    start = tl.maximum(tl.minimum(at, S - KEYS), 0)
    k = tl.load(k_ptr + start.to(tl.int64) * k_stride + k_at, mask=(key < S - start)[None, :], other=0.0)
    scores = tl.dot(q, k)
    for i in range(1, count):
        if columns_ptr is not None:
            at = tl.load(columns_ptr + i) * KEYS  # in bounds: i < count
        else:
            at += KEYS
        following = tl.minimum(at, S - KEYS)
        k = tl.load(k_ptr + following.to(tl.int64) * k_stride + k_at)  # in bounds: with two blocks KEYS <= S
        ahead = tl.dot(q, k)
        state = fold_scores(state, scores, v_ptr + start.to(tl.int64) * v_stride + v_at, None, scale)
        scores = ahead
        start = following
    if at < S:  # always: without a branch between them, ptxas has the loop wait after each product, not after each dot
        there = (key >= at - start) & (key < S - start)
        scores += tl.where(key == S - 1 - start, last_bias, 0.0)[None, :]
        scores = tl.where(there[None, :], scores, float("-inf"))
        state = fold_scores(state, scores, v_ptr + start.to(tl.int64) * v_stride + v_at, there, scale)
    return state


@triton.jit
def store_rows(state, out_ptr, lse_ptr, out_stride_t, live):
    """Store a block of queries' results and log-sum-exps, from its first row's pointers on."""
    sums, total, peak = state
    PART: tl.constexpr = sums[0].shape[1]
    row = tl.arange(0, live.shape[0])
    at = row[:, None] * out_stride_t + tl.arange(0, PART)[None, :]
    for part in tl.static_range(len(sums)):
        result = sums[part] / total[:, None]
        tl.store(out_ptr + part * PART + at, result.to(out_ptr.dtype.element_ty), mask=live[:, None])
    tl.store(lse_ptr + row, (peak + tl.log2(total)) * 0.6931471805599453, mask=live)  # ln 2


@triton.jit(do_not_specialize=["T", "S", "N"])
def _attention_kernel(
    q_ptr,  # [B, T, N, D], channels adjacent
    k_ptr,  # [B, S, N, D], channels adjacent
    v_ptr,  # [B, S, N, D], channels adjacent
    out_ptr,  # [B, T, N, D], channels adjacent
    lse_ptr,  # [B, N, T], contiguous
    T,
    S,  # at least 1
    N,
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
    last_bias,  # added to the last key's scores before they are scaled
    D: tl.constexpr,
    QUERIES: tl.constexpr,  # power of two
    KEYS: tl.constexpr,  # power of two
    PART: tl.constexpr,  # power of two; divides D
    AHEAD: tl.constexpr,  # whether scores are taken one block ahead
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

    state = nothing_yet(QUERIES, D // PART, PART)
    before_last = (S - 1) // KEYS  # blocks
    if AHEAD:
        state = attend_ahead(
            state, q, k_ptr, v_ptr, k_at, v_at, k_stride_s, v_stride_s, None, before_last + 1, S, last_bias, scale
        )
    else:
        for _ in range(before_last):
            scores = tl.dot(q, tl.load(k_ptr + k_at))  # in bounds: a block before the last is whole
            state = fold_scores(state, scores, v_ptr + v_at, None, scale)
            k_ptr += KEYS * k_stride_s
            v_ptr += KEYS * v_stride_s
        state = fold_last_block(state, q, k_ptr + k_at, v_ptr + v_at, S - before_last * KEYS, last_bias, scale)

    out_ptr += b * out_stride_b + n * out_stride_n + first * out_stride_t
    store_rows(state, out_ptr, lse_ptr + (b * N + n) * T + first, out_stride_t, live)


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    last_count: int = 1,
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
        _attention_kernel[grid](
            q,
            k,
            v,
            out,
            lse,
            tokens,
            k.shape[1],
            heads,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            scale * math.log2(math.e),
            math.log(last_count) / scale,
            D=head_dim,
            QUERIES=tile.queries,
            KEYS=KEYS,
            PART=tile.part,
            AHEAD=tile.ahead,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out, lse


def check_heads(x: Tensor, name: str, shape: tuple[int, ...], like: Tensor) -> None:
    """Refuse heads that do not fit q.

    Args:
        x: to be of this shape [B, tokens, N, D], in like's dtype and on its device, channels adjacent.
        name: of the argument.
        shape: wanted; -1 for any number of tokens, at least one.
        like: q.

    Raises:
        ValueError: x is not so, or its tokens are 2^24 or more elements apart.
    """
    got = tuple(x.shape)
    fits = len(got) == 4 and got[1] > 0 and all(want in (-1, axis) for want, axis in zip(shape, got, strict=True))
    require(fits, f"{name}: must be {list(shape)}".replace("-1", "tokens"), got)
    require(x.dtype == like.dtype, f"{name}: must be {like.dtype}, like q", x.dtype)
    require(x.device == like.device, f"{name}: must be on {like.device}, like q", x.device)
    adjacent = x.stride(3) == 1 or x.shape[3] == 1
    require(adjacent, f"{name}: channels must be adjacent in memory", f"strides {x.stride()}")
    near = x.shape[1] == 1 or x.stride(1) < MAX_TOKEN_STRIDE
    require(near, f"{name}: tokens must be less than {MAX_TOKEN_STRIDE} elements apart", f"strides {x.stride()}")


def check_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, scale: float | None) -> float:
    """Refuse arguments of attention that no path computes, and return the scale: 1 / sqrt(D) where none is given.

    Raises:
        ValueError: a shape, dtype, stride, device or the scale is not as `attention` says.
    """
    require(q.dtype in FLOATS, "q: must be float16, bfloat16, float32 or float64", q.dtype)
    require(q.dim() == 4 and q.numel() > 0, "q: must be [B, T, N, D], none of them 0", tuple(q.shape))
    batch, tokens, heads, head_dim = q.shape
    check_heads(q, "q", (batch, tokens, heads, head_dim), q)
    check_heads(k, "k", (batch, -1, heads, head_dim), q)
    check_heads(v, "v", (batch, k.shape[1], heads, head_dim), q)
    if out is not None:
        check_heads(out, "out", (batch, tokens, heads, head_dim), q)
    scale = head_dim**-0.5 if scale is None else scale
    require(0 < scale < math.inf, "scale: must be above 0 and finite", scale)
    return scale


def kernel_serves(q: Tensor) -> bool:
    """Whether the kernels take q; fp32, fp64, other head dimensions and CPU tensors run the reference."""
    return runs_triton(q) and q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] in HEAD_DIMS


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = ...,
    last_count: int = ...,
    out: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = ...,
    last_count: int = ...,
    out: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    last_count: int = 1,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Let every query attend to every key.

    Args:
        q: [B, T, N, D], channels adjacent, any other strides; float16, bfloat16, float32 or float64.
        k: [B, S, N, D], likewise, q's dtype; S at least 1.
        v: like k.
        scale: of the scores; 1 / sqrt(D) where None.
        last_count: how many times the last key stands there: n equal keys weigh as much as one whose score has ln n
            more.
        out: [B, T, N, D], q's dtype, channels adjacent: written to and returned; may not overlap q, k or v.
        return_lse: also return the logarithm of the softmax's denominator.

    Returns:
        [B, T, N, D], contiguous unless `out` is not; with return_lse that and lse [B, N, T], fp32, natural logarithm.

    Raises:
        ValueError: a shape, dtype, stride, device or number is not as above.
    """
    scale = check_attention(q, k, v, out, scale)
    require(last_count >= 1, "last_count: must be at least 1", last_count)
    if kernel_serves(q):
        result, lse = attention_triton(q, k, v, scale=scale, last_count=last_count, out=out)
        return (result, lse) if return_lse else result
    result = attention_reference(q, k, v, scale=scale, last_count=last_count, out=out)
    if not return_lse:
        return result
    return result, log_sum_exp_reference(q, k, scale=scale, last_count=last_count)
