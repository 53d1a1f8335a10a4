"""Attention whose scores come from int8 products, and whose weights are rounded to e4m3 or fp16.

    x[i, j] = q[i] . k[j] * q_scale[i] * k_scale[group of j]                    exponents of 2, from exact int32 sums
    w[i, j] = round(2^(x[i, j] - m[i]) * largest)                               m: the largest x of the row so far
    out[i, :] = sum_j w[i, j] v[j, :] / sum_j w[i, j] * v_scale + v_mean        sums rescaled exactly as m grows

Keys are taken in steps of `flush`. A step's sum over keys is kept in `accumulate`, then added to the fp32 output, which
is multiplied by 2^(m before - m after) in the same instruction. The sum of weights is taken before they are rounded.
Where the number of keys is no multiple of `flush`, the last of them come first, in a step of their own that masks what
is missing: the loop has no mask, and nothing is kept for the time after it.

Grid       (ceil(T / rows), N, B), one program per `rows` queries of a head; a head's programs share keys in the L2.
Tile       _attention_int8_tiles.py; a step is _attention_int8_step.py.
Numerics   scores exact, softmax and output fp32, weights e4m3 with a static scale (448) or fp16 (16), rounded once on
           the store. FP16 sums cannot overflow: quantize_values.py, Bounds.
Lists      of key blocks per 128 queries (block_mask.py): the same steps over the listed blocks, in the order listed, so
           a full list gives the same bits as none.
Traffic    B*T*N*D bytes of q, k, v each, twice that of output; bound by tensor cores from a few hundred keys on.
Reference  attention_int8_reference in _attention_int8_reference.py.
Source     SageAttention, 2 and 2++ (Zhang et al., 2024 and 2025).
"""

from math import log2

import torch
from torch import Tensor

from ._attention_int8_checks import check_operands, check_out, check_quantized_out
from ._attention_int8_reference import attention_int8_reference
from ._attention_int8_step import step_over_keys
from ._attention_int8_tiles import LARGEST_WEIGHT, TILES, Tile, generation_of
from ._heads import check_has_e4m3
from ._launch import on_device_of, runs_triton, tl, triton
from ._quantized import Quantized, hadamard, quantize_reference, rotate_halves, rotate_tile, round_8bit, scale_of
from .block_mask import BlockLists
from .quantize_keys import KEY_BLOCK, QuantizedKeys
from .quantize_queries import QuantizedQueries
from .quantize_values import QuantizedValues


@triton.jit(do_not_specialize=["T", "S"])
def _attention_int8_kernel(
    q_ptr,  # [B, T, N, D] int8, contiguous
    q_scale_ptr,  # [B, T, N], contiguous
    k_ptr,  # [B, N, ceil(S / 64), 64, D] int8, contiguous
    k_scale_ptr,  # [B, N, ceil(S / 64), 4], contiguous
    v_ptr,  # [B, N, ceil(S / 64), D, 64] e4m3 or fp16, contiguous
    v_scale_ptr,  # [B, N, D], contiguous
    v_mean_ptr,  # [B, N, D], contiguous
    columns_ptr,  # [B, N, ceil(T / 128), M] int32, contiguous; unused unless LISTED
    counts_ptr,  # [B, N, ceil(T / 128)] int32, contiguous; unused unless LISTED
    out_ptr,  # [B, T, N, D], contiguous
    out_scale_ptr,  # [B, T, N], contiguous; unused unless out is 8 bit
    T,
    S,
    N,
    M,  # columns of a list
    LOG2_LARGEST: tl.constexpr,  # log2 of the largest weight
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,  # of 64 keys in a step: 1 or 2
    DIM: tl.constexpr,  # channels of one product with values: D, or 64 for D in halves
    SUMS: tl.constexpr,
    MAGIC: tl.constexpr,
    LISTED: tl.constexpr,
    ROTATED: tl.constexpr,  # multiply the output by the Hadamard matrix before it is rounded to 8 bits
):
    tile = tl.program_id(0)
    n = tl.program_id(1)
    b = tl.program_id(2)
    head = (b * N + n).to(tl.int64)
    first = (b * T + tile * ROWS).to(tl.int64) * N + n  # row of the tile's first query
    i = tl.arange(0, ROWS)
    c = tl.arange(0, DIM)
    d = tl.arange(0, D)
    j = tl.arange(0, 64)
    blocks = tl.cdiv(S, 64)
    live = i < T - tile * ROWS
    q_ptr += first * D
    q = tl.load(q_ptr + i[:, None] * (N * D) + d[None, :], mask=live[:, None], other=0)
    q_scale = tl.load(q_scale_ptr + first + i * N, mask=live, other=0.0)
    k_ptr += head * blocks * (64 * D)
    k_scale_ptr += head * blocks * 4
    v_ptr += head * blocks * (64 * D)
    key_at = j[None, :] * D + d[:, None]
    value_at = c[None, :] * 64 + j[:, None]

    low = tl.zeros([ROWS, DIM], tl.float32)
    high = tl.zeros([ROWS, DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)

    TWO: tl.constexpr = BLOCKS == 2
    count = blocks
    last = count - 1
    if LISTED:
        list_row = head * tl.cdiv(T, 128) + tile * ROWS // 128
        columns_ptr += list_row * M
        count = tl.load(counts_ptr + list_row)  # in bounds: one per 128 queries
        last = tl.load(columns_ptr + count - 1)  # in bounds: count is at least 1
    whole = count // BLOCKS  # steps without a mask
    if (last + 1) * 64 > S and count % BLOCKS == 0:
        whole -= 1
    if whole * BLOCKS < count:  # one block or two, the last perhaps not whole
        block_0 = whole * BLOCKS
        block_1 = count - 1
        has_1 = block_1 > block_0
        if LISTED:
            block_0 = tl.load(columns_ptr + block_0)  # in bounds: below count
            block_1 = tl.load(columns_ptr + block_1)  # in bounds: below count
        live_0 = block_0 * 64 + j < S
        live_1 = (block_1 * 64 + j < S) & has_1
        low, high, total, largest = step_over_keys(
            q, q_scale, low, high, total, largest, k_ptr, k_scale_ptr, v_ptr, key_at, value_at,
            block_0, block_1, live_0, live_1, LOG2_LARGEST, D, True, TWO, SUMS, MAGIC,
        )  # fmt: skip
    for step in range(whole):
        block_0 = step * BLOCKS
        block_1 = block_0 + BLOCKS - 1
        if LISTED:
            block_1 = tl.load(columns_ptr + block_1)  # in bounds: below count
            block_0 = tl.load(columns_ptr + block_0)  # in bounds: below count
        low, high, total, largest = step_over_keys(
            q, q_scale, low, high, total, largest, k_ptr, k_scale_ptr, v_ptr, key_at, value_at,
            block_0, block_1, j, j, LOG2_LARGEST, D, False, TWO, SUMS, MAGIC,
        )  # fmt: skip

    nothing = tl.minimum(whole, 0)  # 0, but unknown: or the output's addresses would take registers during the loop
    first += nothing
    N += nothing
    live = i < T + nothing - tile * ROWS
    inverse = (1.0 / total)[:, None]
    channel = head * D + c
    scale = tl.load(v_scale_ptr + channel)[None, :]  # in bounds: one head's channels
    mean = tl.load(v_mean_ptr + channel)[None, :]  # in bounds: one head's channels
    low = low * inverse * scale + mean
    if DIM < D:
        scale = tl.load(v_scale_ptr + channel + DIM)[None, :]  # in bounds: the other half of the head's channels
        mean = tl.load(v_mean_ptr + channel + DIM)[None, :]  # in bounds: the other half of the head's channels
        high = high * inverse * scale + mean

    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    EIGHT_BIT: tl.constexpr = out_ptr.dtype.element_ty.primitive_bitwidth == 8
    if EIGHT_BIT:
        if ROTATED:
            if DIM < D:
                low, high = rotate_halves(low, high, hadamard(64))
            else:
                low = rotate_tile(low, hadamard(128))
        absmax = tl.max(tl.abs(low), 1)
        if DIM < D:
            absmax = tl.maximum(absmax, tl.max(tl.abs(high), 1))
        out_scale, inverse_scale = scale_of(absmax, DTYPE)
        tl.store(out_scale_ptr + first + i * N, out_scale, mask=live)
        low = round_8bit(low * inverse_scale[:, None], DTYPE)
        if DIM < D:
            high = round_8bit(high * inverse_scale[:, None], DTYPE)
    out_ptr += first * D
    out_at = out_ptr + i[:, None] * (N * D) + c[None, :]
    tl.store(out_at, low.to(DTYPE), mask=live[:, None])
    if DIM < D:
        tl.store(out_at + DIM, high.to(DTYPE), mask=live[:, None])


def _launch(
    q: QuantizedQueries,
    k: QuantizedKeys,
    v: QuantizedValues,
    out: Tensor,
    out_scale: Tensor | None,
    *,
    lists: BlockLists | None,
    tile: Tile,
    rotated: bool,
) -> None:
    batch, tokens, heads, dim = q.values.shape
    with on_device_of(q.values):
        _attention_int8_kernel[(triton.cdiv(tokens, tile.rows), heads, batch)](
            q.values,
            q.scale,
            k.values,
            k.scale,
            v.values,
            v.scale,
            v.mean,
            None if lists is None else lists.columns,
            None if lists is None else lists.counts,
            out,
            out_scale,
            tokens,
            k.tokens,
            heads,
            1 if lists is None else lists.columns.shape[-1],
            **constants(tile, v.values.dtype, dim, listed=lists is not None, rotated=rotated),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def constants(tile: Tile, dtype: torch.dtype, dim: int, *, listed: bool, rotated: bool) -> dict[str, object]:
    """What the kernel is compiled for: a tile, values in `dtype`, a head dimension, lists or none."""
    return {
        "LOG2_LARGEST": log2(LARGEST_WEIGHT[dtype]),
        "D": dim,
        "ROWS": tile.rows,
        "BLOCKS": tile.flush // KEY_BLOCK,
        "DIM": 64 if tile.halves else dim,
        "SUMS": tl.float16 if tile.accumulate == torch.float16 else tl.float32,
        "MAGIC": tile.magic,
        "LISTED": listed,
        "ROTATED": rotated,
    }


def attention_int8_triton(
    q: QuantizedQueries,
    k: QuantizedKeys,
    v: QuantizedValues,
    out: Tensor,
    *,
    lists: BlockLists | None = None,
    tile: Tile,
) -> Tensor:
    """Launch the kernel on checked arguments."""
    _launch(q, k, v, out, None, lists=lists, tile=tile, rotated=False)
    return out


def attention_int8_quantized_triton(
    q: QuantizedQueries,
    k: QuantizedKeys,
    v: QuantizedValues,
    dtype: torch.dtype,
    *,
    rotated: bool = False,
    lists: BlockLists | None = None,
    tile: Tile,
) -> Quantized:
    """Launch the kernel with 8-bit output on checked arguments."""
    batch, tokens, heads, dim = q.values.shape
    values = torch.empty((batch, tokens, heads * dim), dtype=dtype, device=q.values.device)
    scale = torch.empty((batch, tokens, heads), dtype=torch.float32, device=q.values.device)
    _launch(q, k, v, values, scale, lists=lists, tile=tile, rotated=rotated)
    return Quantized(values, scale, rotated)


def tile_of(q: QuantizedQueries, v: QuantizedValues) -> Tile:
    """The table's row for these operands, on the GPU that they are on.

    Raises:
        ValueError: the values are e4m3, which this GPU has not.
    """
    check_has_e4m3(v.values.dtype, q.values, "v.values")
    return TILES[generation_of(q.values), v.values.dtype, q.values.shape[-1]]


def attention_int8(
    q: QuantizedQueries,
    k: QuantizedKeys,
    v: QuantizedValues,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    lists: BlockLists | None = None,
) -> Tensor:
    """Attend from quantised queries to quantised keys and values.

    Args:
        q: of B samples, T tokens, N heads of D channels.
        k: of S tokens, S * N * D < 2^31.
        v: of S tokens; e4m3, or fp16 where weights are to be rounded to fp16 only.
        out: [B, T, N, D], contiguous, to write to; made where None.
        out_dtype: of a result that is made.
        lists: which key blocks each block of queries attends to, at least one; all where None.

    Returns:
        [B, T, N, D], rounded once from fp32.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.
    """
    check_operands(q, k, v, lists)
    out = torch.empty(q.values.shape, dtype=out_dtype, device=q.values.device) if out is None else out
    check_out(out, q.values)
    tile = tile_of(q, v)
    if runs_triton(q.values):
        return attention_int8_triton(q, k, v, out, lists=lists, tile=tile)
    return out.copy_(attention_int8_reference(q, k, v, flush=tile.flush, accumulate=tile.accumulate, lists=lists))


def attention_int8_quantized(
    q: QuantizedQueries,
    k: QuantizedKeys,
    v: QuantizedValues,
    dtype: torch.dtype,
    *,
    rotated: bool = False,
    lists: BlockLists | None = None,
) -> Quantized:
    """Attend, and round the result to 8 bits with a scale per token and head, for the output projection.

    Args:
        q: as for `attention_int8`, with heads of 128 channels.
        k: as for `attention_int8`.
        v: as for `attention_int8`.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.
        rotated: multiply each head's channels by the Hadamard matrix before rounding.
        lists: as for `attention_int8`.

    Returns:
        [B, T, N * D] with N scales per token.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.
    """
    check_operands(q, k, v, lists)
    check_quantized_out(dtype, q.values)
    tile = tile_of(q, v)
    if runs_triton(q.values):
        return attention_int8_quantized_triton(q, k, v, dtype, rotated=rotated, lists=lists, tile=tile)
    out = attention_int8_reference(q, k, v, flush=tile.flush, accumulate=tile.accumulate, lists=lists)
    return quantize_reference(out.flatten(2), dtype, groups=q.values.shape[2], rotated=rotated)
