"""Sum, smallest and largest value of each channel over the tokens, per head: what values need to be quantised.

    partial[0, b, n, c, d] = sum of x[b, t, n, d] over the tokens t of chunk c; partial[1] = min, partial[2] = max

Grid       (ceil(T / CHUNK), N, B), one program per chunk of tokens of a head.
Tile       ROWS x D in registers, CHUNK / ROWS of them in turn.
Numerics   fp32; the chunks are added up in fp32, in an order that is always the same.
Traffic    B*T*N*D elements of x read, 3 * B*N*D floats written per 512 tokens; bandwidth-bound.
Reference  channel_range_reference, below.
Source     none: a reduction.
"""

import torch
from torch import Tensor

from ._heads import check_heads
from ._launch import on_device_of, runs_triton, tl, triton

CHUNK = 512  # tokens of a program: 64 programs per head at 480p, enough to fill any GPU
ROWS = 32

Range = tuple[Tensor, Tensor, Tensor]


def channel_range_reference(x: Tensor) -> Range:
    """The same three in plain torch: the truth the kernel is held to, and the path without a GPU."""
    low, high = x.aminmax(dim=1)
    return x.mean(1, dtype=torch.float32), low.float(), high.float()


@triton.jit(do_not_specialize=["T"])
def _channel_range_kernel(
    x_ptr,  # [B, T, N, D], channels adjacent
    partial_ptr,  # [3, B, N, chunks, D], contiguous
    T,
    N,
    x_stride_b,
    x_stride_t,
    x_stride_n,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    chunk = tl.program_id(0)
    n = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D)
    total = tl.zeros([ROWS, D], tl.float32)
    low = tl.full([ROWS, D], float("inf"), tl.float32)
    high = tl.full([ROWS, D], float("-inf"), tl.float32)
    x_head = x_ptr + b * x_stride_b + n * x_stride_n + d[None, :]
    for first in range(0, CHUNK, ROWS):
        t = chunk.to(tl.int64) * CHUNK + first + tl.arange(0, ROWS)
        live = (t < T)[:, None]
        x = tl.load(x_head + t[:, None] * x_stride_t, mask=live, other=0.0).to(tl.float32)
        total += x
        low = tl.minimum(low, tl.where(live, x, float("inf")))
        high = tl.maximum(high, tl.where(live, x, float("-inf")))

    at = ((b * N + n) * tl.num_programs(0) + chunk) * D + d
    plane = tl.num_programs(2).to(tl.int64) * N * tl.num_programs(0) * D
    tl.store(partial_ptr + at, tl.sum(total, 0))  # in bounds: one row of channels per program
    tl.store(partial_ptr + plane + at, tl.min(low, 0))  # in bounds: the same row
    tl.store(partial_ptr + 2 * plane + at, tl.max(high, 0))  # in bounds: the same row


def channel_range_triton(x: Tensor) -> Range:
    """Launch the kernel on a checked argument, and reduce its chunks."""
    batch, tokens, heads, dim = x.shape
    chunks = triton.cdiv(tokens, CHUNK)
    partial = torch.empty((3, batch, heads, chunks, dim), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _channel_range_kernel[(chunks, heads, batch)](
            x, partial, tokens, heads, *x.stride()[:3], D=dim, CHUNK=CHUNK, ROWS=ROWS, num_warps=4
        )
    return partial[0].sum(2) / tokens, partial[1].amin(2), partial[2].amax(2)


def channel_range(x: Tensor) -> Range:
    """Mean, smallest and largest value of each channel over the tokens.

    Args:
        x: [B, T, N, D], channels adjacent; float32, bfloat16 or float16; D 64 or 128.

    Returns:
        Three times [B, N, D] fp32: mean, smallest, largest.

    Raises:
        ValueError: a shape, dtype or stride is not as above.
    """
    check_heads(x, "x")
    run = channel_range_triton if runs_triton(x) else channel_range_reference
    return run(x)
