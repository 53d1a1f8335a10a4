"""One step of 8-bit attention: scores of 64 or 128 keys, their weights, and what the weights make of the values.

Registers decide how this is written. A program of four warps holds 64 rows, 16 of each warp, so that a row's largest
score and sum need two shuffles, and two programs fit on a multiprocessor: while one waits or takes exponentials, the
other multiplies. 128 keys are two products of 64, and 128 channels two products of 64, because Triton lays four warps
along the rows of a product only where it is no wider than it is high. Two blocks of keys share one flush into fp32.
Keys 8 i + 2 g + j of a block (j: a bit) share scale g: the scores a thread holds of a row are those of one such group.
"""

from ._launch import tl, triton

_MAGIC = tl.constexpr(1.5 * 2.0**23)  # fp32 numbers near it are the integers: its bits plus an int are a float again
_MAGIC_BITS = tl.constexpr(0x4B400000)
# Less than any sum of 128 products of int8; -inf would be NaN times a scale that has underflown.
_BELOW_ALL = tl.constexpr(-(2.0**24))


@triton.jit
def _scores(
    q,  # [ROWS, D] int8
    keys_ptr,  # [D, 64] pointers to a block of keys
    live,  # [64] whether a key is there; of no effect unless MASKED
    MASKED: tl.constexpr,
    MAGIC: tl.constexpr,
):  # -> [ROWS, 64] fp32: exact integers, or less than any of them for keys that are not there
    ROWS: tl.constexpr = q.shape[0]
    keys = tl.load(keys_ptr)  # in bounds: blocks are whole, places past the last key hold zeros
    if MAGIC:
        start = tl.full([ROWS, 64], _MAGIC_BITS, tl.int32)
        scores = tl.dot(q, keys, start, out_dtype=tl.int32).to(tl.float32, bitcast=True) - _MAGIC
    else:
        scores = tl.dot(q, keys, out_dtype=tl.int32).to(tl.float32)
    if MASKED:
        scores = tl.where(live[None, :], scores, _BELOW_ALL)
    return scores


@triton.jit
def _scale(
    q_scale,  # [ROWS]
    k_scale_ptr,  # of key block 0
    block,
):  # -> [ROWS, 4]: of each row with each group of the block's keys
    k_scale = tl.load(k_scale_ptr + (block * 4 + tl.arange(0, 4)))  # in bounds: a block that is there
    return q_scale[:, None] * k_scale[None, :]


@triton.jit
def _largest(
    scores,  # [ROWS, 64] fp32
    scale,  # [ROWS, 4]
    MASKED: tl.constexpr,
):  # -> [ROWS]: the largest exponent
    ROWS: tl.constexpr = scores.shape[0]
    of_groups = tl.max(tl.max(tl.reshape(scores, (ROWS, 8, 4, 2)), 3), 1)  # within a thread
    exponents = of_groups * scale
    if MASKED:  # the scale of a group without a key says nothing about the others
        exponents = tl.where(of_groups > _BELOW_ALL, exponents, float("-inf"))
    return tl.max(exponents, 1)


@triton.jit
def _weights(
    scores,  # [ROWS, 64] fp32
    scale,  # [ROWS, 4]
    shift,  # [ROWS]: the row's largest exponent, less log2 of the largest weight
    live,  # [64] whether a key is there; of no effect unless MASKED
    MASKED: tl.constexpr,
    DTYPE: tl.constexpr,  # of the weights: tl.float8e4nv or tl.float16
):  # -> weights [ROWS, 64] in DTYPE, in the order in which values are stored; and their sums [ROWS] fp32
    ROWS: tl.constexpr = scores.shape[0]
    scores = tl.reshape(scores, (ROWS, 8, 4, 2))
    weights = tl.exp2(scores * scale[:, None, :, None] - shift[:, None, None, None])
    weights = tl.reshape(weights, (ROWS, 64))
    if MASKED:
        weights = tl.where(live[None, :], weights, 0.0)
    total = tl.sum(weights, 1)
    weights = weights.to(DTYPE)
    if tl.float8e4nv == DTYPE:  # key b + 2 q + 8 j to place b + 2 j + 4 q: no lane gives anything away
        weights = tl.reshape(tl.permute(tl.reshape(weights, (ROWS, 4, 2, 4, 2)), (0, 1, 3, 2, 4)), (ROWS, 64))
    return weights, total


@triton.jit
def _sum_of_values(
    weights_0,  # [ROWS, 64]
    weights_1,  # [ROWS, 64], of the second block; weights_0 where a step has one block
    values_0,  # [64, DIM] pointers to the values of the first block
    values_1,  # [64, DIM] pointers to those of the second
    TWO: tl.constexpr,
    SUMS: tl.constexpr,  # tl.float16 or tl.float32
):  # -> [ROWS, DIM] fp32
    total = tl.dot(weights_0, tl.load(values_0), out_dtype=SUMS)  # in bounds: blocks are whole
    if TWO:
        total = tl.dot(weights_1, tl.load(values_1), total, out_dtype=SUMS)  # in bounds: blocks are whole
    return total.to(tl.float32)


@triton.jit
def step_over_keys(
    q,  # [ROWS, D] int8
    q_scale,  # [ROWS]
    low,  # [ROWS, DIM] fp32: output so far
    high,  # the same for the upper half of D, where D is taken in halves
    total,  # [ROWS]: sum of weights so far
    largest,  # [ROWS]: largest exponent so far
    k_ptr,  # key block 0
    k_scale_ptr,  # of key block 0
    v_ptr,  # value block 0
    key_at,  # [D, 64] places in a block of keys
    value_at,  # [64, DIM] places in a block of values
    block_0,
    block_1,  # block_0 where a step has one block
    live_0,  # [64] whether a key is there; of no effect unless MASKED
    live_1,
    LOG2_LARGEST: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    TWO: tl.constexpr,
    SUMS: tl.constexpr,
    MAGIC: tl.constexpr,
):
    DIM: tl.constexpr = low.shape[1]
    DTYPE: tl.constexpr = v_ptr.dtype.element_ty
    scale_0 = _scale(q_scale, k_scale_ptr, block_0)
    scores_0 = _scores(q, k_ptr + block_0 * (64 * D) + key_at, live_0, MASKED, MAGIC)
    new_largest = tl.maximum(largest, _largest(scores_0, scale_0, MASKED))
    if TWO:
        scale_1 = _scale(q_scale, k_scale_ptr, block_1)
        scores_1 = _scores(q, k_ptr + block_1 * (64 * D) + key_at, live_1, MASKED, MAGIC)
        new_largest = tl.maximum(new_largest, _largest(scores_1, scale_1, MASKED))
    shift = new_largest - LOG2_LARGEST
    shrink = tl.exp2(largest - new_largest)

    weights_0, total_0 = _weights(scores_0, scale_0, shift, live_0, MASKED, DTYPE)
    total = total * shrink + total_0
    weights_1 = weights_0
    if TWO:
        weights_1, total_1 = _weights(scores_1, scale_1, shift, live_1, MASKED, DTYPE)
        total += total_1

    v_0 = v_ptr + block_0 * (64 * D)
    v_1 = v_ptr + block_1 * (64 * D)
    low = low * shrink[:, None] + _sum_of_values(weights_0, weights_1, v_0 + value_at, v_1 + value_at, TWO, SUMS)
    if DIM < D:
        v_0 += DIM * 64
        v_1 += DIM * 64
        high = high * shrink[:, None] + _sum_of_values(weights_0, weights_1, v_0 + value_at, v_1 + value_at, TWO, SUMS)
    return low, high, total, new_largest
