"""Which blocks of keys each block of queries attends to, guessed from the means of both; nothing is trained.

    q'[i] = mean of query block i's tokens          128 tokens, the last block perhaps fewer
    k'[j] = mean of key block j's tokens, n[j]      64 tokens, the last block perhaps fewer
    mass[i, :] = softmax_j(scale * q'[i] . k'[j] + ln n[j])

Rule       one of two: `density` keeps the ceil(density * key blocks) blocks of largest mass, `cumulative` the smallest
           set, in order of decreasing mass, whose mass reaches it. Of equal masses the earlier block comes first. Then
           the blocks of the queries' own tokens (the diagonal) and all that overlap `keep_keys` are added.
Caveat     a mean stands for its block only where the block's tokens resemble each other. Where they point apart, their
           mean is short, its scores are flat, and a block that holds one decisive key can be dropped. No test of that
           likeness is made: order tokens so that a block is a compact cube of the video, keep what must not be lost by
           `keep_keys`, and take the early steps and the first layer dense.
           Queries and keys in 8 bits have a scale per row, which the mean takes in; what all keys of a head are less is
           the same for all blocks, and no softmax sees it.
Grid       (blocks, N, B), one program per block and head, for the means. The choice is torch: its map has 1 / 8192 of
           the scores that attention has, and what it needs, rows sorted and summed, torch has. It takes as many heads
           together as MAP_ELEMENTS lets it.
Tile       a block's tokens x D channels in registers.
Numerics   means, scores and masses in fp32; `cumulative` adds masses as integers, so that no order of a sum decides.
Traffic    q and k read once, 1 / 128 and 1 / 64 of them written, in fp32.
Reference  pool_blocks_reference, below.
Source     SpargeAttn (Zhang et al., 2025), without its test of self-similarity; Wan's use of it keeps half the blocks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import require
from ._heads import HEAD_DIMS
from ._launch import on_device_of, runs_triton, tl, triton
from .attention import FLOATS, check_heads, kernel_serves

QUERY_BLOCK = 128  # tokens
KEY_BLOCK = 64  # tokens
MAP_ELEMENTS = 2**21  # of the guessed maps that are looked at together: their sorts take about 64 bytes for each

_MASS_UNITS = 2**40  # a softmax's masses, as integers, sum up to about this


@dataclass(frozen=True, slots=True)
class BlockLists:
    """For each block of queries, the key blocks that it attends to: at least one, in ascending order."""

    columns: Tensor  # int32 [B, N, ceil(T / 128), M]; the first `counts` of a row are key blocks, the others 0
    counts: Tensor  # int32 [B, N, ceil(T / 128)], 1 to M


def check_lists(lists: BlockLists, q: Tensor, keys: int) -> None:
    """Refuse lists whose shape does not fit q; what is in them is not looked at.

    Args:
        lists: for q's blocks.
        q: [B, T, N, D].
        keys: tokens of k.

    Raises:
        ValueError: a shape, dtype, stride or device is not as BlockLists says, for q's batch, tokens and heads.
    """
    batch, tokens, heads, _ = q.shape
    rows = (batch, heads, _blocks(tokens, QUERY_BLOCK))
    shape = tuple(lists.columns.shape)
    fits = len(shape) == 4 and shape[:3] == rows and 1 <= shape[3] <= _blocks(keys, KEY_BLOCK)
    limit = f"1 to {_blocks(keys, KEY_BLOCK)}"
    require(fits, f"lists.columns: must be [{rows[0]}, {rows[1]}, {rows[2]}, {limit}]", shape)
    require(tuple(lists.counts.shape) == rows, f"lists.counts: must be {list(rows)}", tuple(lists.counts.shape))
    for name, x in (("columns", lists.columns), ("counts", lists.counts)):
        require(x.dtype == torch.int32, f"lists.{name}: must be int32", x.dtype)
        require(x.is_contiguous(), f"lists.{name}: must be contiguous", f"strides {x.stride()}")
        require(x.device == q.device, f"lists.{name}: must be on {q.device}, like q", x.device)


def token_mask(lists: BlockLists, b: int, n: int, queries: int, keys: int) -> Tensor:
    """One head's lists as a mask over tokens: [queries, keys], True where a query attends to a key."""
    columns, counts = lists.columns[b, n].long(), lists.counts[b, n]
    listed = torch.arange(columns.shape[1], device=columns.device) < counts[:, None]
    blocks = torch.zeros(len(columns), _blocks(keys, KEY_BLOCK) + 1, dtype=torch.bool, device=columns.device)
    blocks.scatter_(1, torch.where(listed, columns, blocks.shape[1] - 1), True)
    mask = blocks[:, :-1].repeat_interleave(KEY_BLOCK, 1).repeat_interleave(QUERY_BLOCK, 0)
    return mask[:queries, :keys]


def lists_of_run(lists: BlockLists, start: int, stop: int) -> BlockLists:
    """Give the lists of the queries [start, stop) alone; start is the first of a block of queries.

    Raises:
        ValueError: start is no multiple of 128.
    """
    require(start % QUERY_BLOCK == 0, f"start: must be a multiple of {QUERY_BLOCK}", start)
    rows = slice(start // QUERY_BLOCK, _blocks(stop, QUERY_BLOCK))
    return BlockLists(lists.columns[:, :, rows].contiguous(), lists.counts[:, :, rows].contiguous())


def pool_blocks_reference(x: Tensor, block: int, scale: Tensor | None = None) -> Tensor:
    """Means of blocks of tokens in plain torch: the truth the kernel is held to, and the path without a GPU.

    Args:
        x: [B, T, N, D].
        block: tokens of one block; the last may have fewer.
        scale: [B, T, N], of x's rows; 1 where None.

    Returns:
        [B, N, ceil(T / block), D], fp32.
    """
    starts = range(0, x.shape[1], block)
    wide = (x[:, at : at + block].float() for at in starts)
    if scale is not None:
        wide = (tokens * scale[:, at : at + block, :, None] for tokens, at in zip(wide, starts, strict=True))
    return torch.stack([tokens.mean(1) for tokens in wide], 2)


@triton.jit(do_not_specialize=["T", "N"])
def _pool_blocks_kernel(
    x_ptr,  # [B, T, N, D], channels adjacent
    scale_ptr,  # [B, T, N], contiguous; unused unless x is int8
    mean_ptr,  # [B, N, ceil(T / BLOCK), D], contiguous
    T,
    N,
    x_stride_b,
    x_stride_t,
    x_stride_n,
    D: tl.constexpr,  # power of two
    BLOCK: tl.constexpr,  # tokens, power of two
):
    block = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BLOCK)
    channel = tl.arange(0, D)
    left = T - block * BLOCK  # tokens, at least 1

    x_ptr += b * x_stride_b + n * x_stride_n + block * BLOCK * x_stride_t
    at = row[:, None] * x_stride_t + channel[None, :]
    x = tl.load(x_ptr + at, mask=(row < left)[:, None], other=0).to(tl.float32)
    INT8: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    if INT8:
        scale_at = (b * T + block * BLOCK + row) * N + n
        x *= tl.load(scale_ptr + scale_at, mask=row < left, other=0.0)[:, None]
    mean = tl.sum(x, 0) / tl.minimum(left, BLOCK).to(tl.float32)
    mean_ptr += ((b * N + n) * tl.num_programs(0) + block) * D
    tl.store(mean_ptr + channel, mean)  # in bounds: a block has D means


def pool_blocks_triton(x: Tensor, block: int, scale: Tensor | None = None) -> Tensor:
    """Launch the kernel on x [B, T, N, D], D a power of two; returns [B, N, ceil(T / block), D], fp32."""
    batch, tokens, heads, head_dim = x.shape
    blocks = _blocks(tokens, block)
    mean = torch.empty((batch, heads, blocks, head_dim), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _pool_blocks_kernel[(blocks, heads, batch)](
            x, scale, mean, tokens, heads, *x.stride()[:3], D=head_dim, BLOCK=block, num_warps=4
        )
    return mean


def heaviest(mass: Tensor, density: float) -> Tensor:
    """The ceil(density * blocks) blocks of largest mass: a mask like mass [..., blocks]; of equals the earlier."""
    order = mass.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, order[..., : _share(density, mass.shape[-1])], True)


def reaching(mass: Tensor, cumulative: float) -> Tensor:
    """The fewest blocks whose mass reaches `cumulative` of each row's: a mask like mass [..., blocks]."""
    values, order = mass.sort(dim=-1, descending=True, stable=True)
    units = (values.double() * _MASS_UNITS).long()
    before = units.cumsum(-1) - units  # mass of the heavier blocks
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, order, before < cumulative * _MASS_UNITS)


def ascending(kept: Tensor, width: int) -> Tensor:
    """Places of True in each row of `kept` [..., blocks], ascending: [..., width] int32, the rest 0."""
    place = torch.where(kept, kept.cumsum(-1) - 1, width)
    columns = torch.zeros(*kept.shape[:-1], width + 1, dtype=torch.int32, device=kept.device)
    block = torch.arange(kept.shape[-1], dtype=torch.int32, device=kept.device).expand(kept.shape)
    return columns.scatter_(-1, place, block)[..., :width]


def always_kept(queries: int, keys: int, keep_keys: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """The diagonal's and keep_keys' blocks: a mask [query blocks, key blocks]."""
    block = torch.arange(_blocks(keys, KEY_BLOCK), device=device)
    first = torch.arange(_blocks(queries, QUERY_BLOCK), device=device)[:, None] * (QUERY_BLOCK // KEY_BLOCK)
    kept = (block >= first) & (block < first + QUERY_BLOCK // KEY_BLOCK)
    for start, end in keep_keys:
        kept |= (block * KEY_BLOCK < end) & ((block + 1) * KEY_BLOCK > start)
    return kept


def block_mask(
    q: Tensor,
    k: Tensor,
    *,
    density: float | None = None,
    cumulative: float | None = None,
    keep_keys: Sequence[tuple[int, int]] = (),
    scale: float | None = None,
) -> BlockLists:
    """Choose, for each block of 128 queries and each head, the blocks of 64 keys to attend to.

    Args:
        q: [B, T, N, D], channels adjacent, any other strides; float16, bfloat16, float32 or float64.
        k: [B, S, N, D], likewise, q's dtype. Token t of q is token t of k: that is the diagonal.
        density: share of the key blocks to keep, above 0 up to 1; or
        cumulative: share of the guessed softmax mass to keep, above 0 up to 1. One of the two.
        keep_keys: [start, end) of key tokens that every query keeps: the first frame's, the text's.
        scale: of the scores; 1 / sqrt(D) where None.

    Returns:
        The lists. M is what `density` can need at most, or all key blocks with `cumulative`.

    Raises:
        ValueError: a shape, dtype, stride, device or number is not as above.
    """
    require(q.dtype in FLOATS, "q: must be float16, bfloat16, float32 or float64", q.dtype)
    require(q.dim() == 4 and q.numel() > 0, "q: must be [B, T, N, D], none of them 0", tuple(q.shape))
    check_heads(q, "q", tuple(q.shape), q)
    check_heads(k, "k", (q.shape[0], -1, *q.shape[2:]), q)
    return choose_blocks(
        block_means(q, QUERY_BLOCK),
        block_means(k, KEY_BLOCK),
        queries=q.shape[1],
        keys=k.shape[1],
        density=density,
        cumulative=cumulative,
        keep_keys=keep_keys,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
    )


def block_means(x: Tensor, block: int, scale: Tensor | None = None) -> Tensor:
    """Average blocks of tokens, as `choose_blocks` takes them.

    Args:
        x: [B, T, N, D], channels adjacent, any other strides; float16, bfloat16, float32 or float64, or int8 with D 64
            or 128.
        block: tokens of one, QUERY_BLOCK or KEY_BLOCK; the last may have fewer.
        scale: [B, T, N] fp32, contiguous, of x's rows where x is int8; None where it is not.

    Returns:
        [B, N, ceil(T / block), D], fp32.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.
    """
    require(x.dim() == 4 and x.numel() > 0, "x: must be [B, T, N, D], none of them 0", tuple(x.shape))
    require(x.stride(3) == 1, "x: channels must be adjacent", f"strides {x.stride()}")
    require(block in (QUERY_BLOCK, KEY_BLOCK), f"block: must be {QUERY_BLOCK} or {KEY_BLOCK}", block)
    if x.dtype != torch.int8:
        require(x.dtype in FLOATS, "x: must be float16, bfloat16, float32, float64 or int8", x.dtype)
        require(scale is None, "scale: must be None where x is not int8", x.dtype)
        return pool_blocks_triton(x, block) if kernel_serves(x) else pool_blocks_reference(x, block)
    require(scale is not None, "scale: must be given for int8", None)
    assert scale is not None
    require(tuple(scale.shape) == x.shape[:3], f"scale: must be {tuple(x.shape[:3])}", tuple(scale.shape))
    is_right = scale.dtype == torch.float32 and scale.is_contiguous() and scale.device == x.device
    require(is_right, f"scale: must be fp32 and contiguous on {x.device}", (scale.dtype, scale.stride(), scale.device))
    require(x.shape[3] in HEAD_DIMS, "x: head dimension of int8 must be 64 or 128", x.shape[3])
    return pool_blocks_triton(x, block, scale) if runs_triton(x) else pool_blocks_reference(x, block, scale)


def choose_blocks(
    q_mean: Tensor,
    k_mean: Tensor,
    *,
    queries: int,
    keys: int,
    density: float | None = None,
    cumulative: float | None = None,
    keep_keys: Sequence[tuple[int, int]] = (),
    scale: float,
) -> BlockLists:
    """Choose as `block_mask` does, from the means of blocks.

    Args:
        q_mean: [B, N, ceil(T / 128), D] fp32, from `block_means`, of all queries.
        k_mean: [B, N, ceil(S / 64), D] fp32, likewise, of all keys.
        queries: T.
        keys: S.
        density: as in `block_mask`, like what follows.
        cumulative: or this.
        keep_keys: that every query keeps.
        scale: of the scores; with queries from `quantize_queries`, whose scales hold it and log2 e, it is ln 2.

    Raises:
        ValueError: a shape or number is not as above.
    """
    batch, heads, rows, _ = q_mean.shape
    blocks, device = k_mean.shape[2], q_mean.device
    _check_means(q_mean, k_mean, queries, keys)
    _check_shares(density, cumulative, keep_keys, keys)
    require(0 < scale < math.inf, "scale: must be above 0 and finite", scale)
    tokens = torch.full((blocks,), float(KEY_BLOCK), device=device)
    tokens[-1] = keys - (blocks - 1) * KEY_BLOCK
    always = always_kept(queries, keys, keep_keys, device)
    width = blocks
    if density is not None:
        ranges = sum(_blocks(end, KEY_BLOCK) - start // KEY_BLOCK for start, end in keep_keys)
        width = min(blocks, kept_at_most(density, blocks) + ranges)

    columns = torch.empty((batch, heads, rows, width), dtype=torch.int32, device=device)
    counts = torch.empty((batch, heads, rows), dtype=torch.int32, device=device)
    together = max(1, MAP_ELEMENTS // (rows * blocks))
    for b, n in [(b, n) for b in range(batch) for n in range(0, heads, together)]:
        some = slice(n, n + together)
        mass = (scale * (q_mean[b, some] @ k_mean[b, some].transpose(-1, -2)) + tokens.log()).softmax(-1)
        kept = heaviest(mass, density) if density is not None else reaching(mass, cumulative or 0.0)
        kept |= always
        columns[b, some] = ascending(kept, width)
        counts[b, some] = kept.sum(-1)
    return BlockLists(columns=columns, counts=counts)


def kept_at_most(density: float, blocks: int) -> int:
    """How many of the key blocks a block of queries keeps at most: its share, and its own where they are not in it."""
    return min(blocks, _share(density, blocks) + QUERY_BLOCK // KEY_BLOCK)


def choosing_bytes(*, heads: int, tokens: int, head_dim: int, density: float) -> int:
    """Count what choosing blocks of one sample's keys takes at its peak: means, lists and the maps they come from."""
    rows, blocks = _blocks(tokens, QUERY_BLOCK), _blocks(tokens, KEY_BLOCK)
    means = 4 * heads * head_dim * (2 * rows + blocks)  # those of queries once more where runs of them are joined
    lists = 2 * 4 * heads * rows * (kept_at_most(density, blocks) + 1)  # and those of one run
    return means + lists + 64 * min(max(MAP_ELEMENTS, rows * blocks), heads * rows * blocks)


def _check_means(q_mean: Tensor, k_mean: Tensor, queries: int, keys: int) -> None:
    batch, heads, _, head_dim = q_mean.shape
    for name, mean, tokens, block in (("q_mean", q_mean, queries, QUERY_BLOCK), ("k_mean", k_mean, keys, KEY_BLOCK)):
        want = (batch, heads, _blocks(tokens, block), head_dim)
        require(tuple(mean.shape) == want, f"{name}: must be {want} for {tokens} tokens", tuple(mean.shape))
        require(mean.dtype == torch.float32, f"{name}: must be float32", mean.dtype)
        require(mean.device == q_mean.device, f"{name}: must be on {q_mean.device}, like q_mean", mean.device)


def _check_shares(
    density: float | None, cumulative: float | None, keep_keys: Sequence[tuple[int, int]], keys: int
) -> None:
    require((density is None) != (cumulative is None), "density, cumulative: give one", (density, cumulative))
    for name, share in (("density", density), ("cumulative", cumulative)):
        require(share is None or 0 < share <= 1, f"{name}: must be above 0, up to 1", share)
    for start, end in keep_keys:
        fits = 0 <= start < end <= keys
        require(fits, f"keep_keys: each must be [start, end) within 0 to {keys}, k's tokens", (start, end))


def _blocks(tokens: int, block: int) -> int:
    return -(-tokens // block)


def _share(density: float, blocks: int) -> int:
    """Blocks that make up this share, rounded up but for what floats add: 0.07 of 100 is 7."""
    return math.ceil(density * blocks - 1e-9)
