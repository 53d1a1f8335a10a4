"""Linear over a weight stored as GGUF blocks: 8-bit tokens times packed numbers, with bias and low-rank term.

    y[m, n] = sum_b x_scale[m, g] * (d[n, b] * sum_k x[m, k] * q[n, k] - c[n, b] * sum_k x[m, k])
              + bias[n] + sum_r t[m, r] * up[n, r]                  b: blocks of 32 channels, k in b; d, c: fp16 scales

There are two ways, and `unpacks_in_prologue` says which is taken:

- For a few int8 tokens that are not rotated (UNPACKED_TOKENS), the kernel below unpacks a tile of Q8_0 or Q4_K as it
  multiplies it. Packed numbers go into the product as they are, and each 32 channels are scaled in fp32: the weight is
  exact.
- All others round the weight to 8 bits first (requantize_gguf) and run linear_8bit, which suits rotated tokens, e4m3
  and every kind of block. With another epilogue, call the two one after the other.

Computed for an RTX 4090 and a weight of 5120 x 5120. Rounding it first moves 54 MB for Q8_0 and 41 MB for Q4_K: 59 and
45 us. After that the product takes 0.11 us per token, at 480 TOPS. The kernel below issues 182 instructions (Q8_0) and
623 (Q4_K) for each 128 cycles of the tensor cores: 0.16 and 0.55 us per token, where 70 % of the cycles issue one. So
it is the faster one up to about 1,200 tokens of Q8_0 and 100 of Q4_K. At Wan's 32,760 tokens rounding first costs 2 %.
Hopper's tensor cores take products of 32 channels one at a time, and its memory is faster: it always rounds first.

Grid       (tiles of y,), 8 rows of tiles together.
Tile       64 x 64 of y in registers, 32 channels per step.
Numerics   int8 products summed exactly in int32, scaled and summed in fp32, rounded once, on the store.
Traffic    the packed weight once per row of tiles; bound by memory for a few tokens, by issue slots for hundreds.
Reference  linear_stored_reference, below.
Source     ggml-org/llama.cpp, gguf-py/gguf/quants.py (blocks).
"""

import torch
from torch import Tensor

from ._checks import COMPUTE_DTYPES, require
from ._launch import on_device_of, runs_triton, tl, triton
from ._matmul_8bit import LowRank, check_terms, finish_tile, tile_at
from ._quantized import GROUP, Quantized, check_quantized, dequantize_reference
from ._tiles_8bit import generation_of
from .dequantize_gguf import check_blocks, dequantize_gguf_reference
from .linear_8bit import check_out, linear_8bit_triton
from .requantize_gguf import requantize_gguf

UNPACKED_TOKENS = {"Q8_0": 1024, "Q4_K": 96}  # at most, for each kind that can be unpacked as it is multiplied
TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}


def unpacks_in_prologue(x: Quantized, kind: str) -> bool:
    """Whether the weight is unpacked as it is multiplied, and not rounded to 8 bits first."""
    few = x.values.numel() <= UNPACKED_TOKENS.get(kind, 0) * x.shape[-1]
    return few and x.values.dtype == torch.int8 and not x.rotated and generation_of(x.device).unpacks


def linear_stored_reference(
    x: Quantized,
    blocks: Tensor,
    kind: str,
    bias: Tensor | None,
    *,
    low_rank: LowRank | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """The formula above in plain torch, with the exact weight: the kernel's truth, and the path without a GPU."""
    weight = dequantize_gguf_reference(blocks, kind, in_features=x.shape[-1], dtype=torch.float32)
    y = dequantize_reference(x) @ weight.T
    if bias is not None:
        y += bias.float()
    if low_rank is not None:
        t, up = low_rank
        y += t.float() @ up.float().T
    return y.to(out_dtype) if out is None else out.copy_(y)


@triton.jit
def _q8_0_step(
    blocks_ptr,  # at the tile's rows of blocks: [BLOCK_N] pointers
    halves_ptr,
    step,  # block of 32 channels
):  # -> numbers [BLOCK_N, 32] int8, their scale [BLOCK_N] fp32
    q = tl.load(blocks_ptr[:, None] + (step * 34 + 2 + tl.arange(0, 32))[None, :])  # in bounds: a row's own block
    scale = tl.load(halves_ptr + step * 17)  # in bounds: as q
    return q.to(tl.int8, bitcast=True), scale.to(tl.float32)


@triton.jit
def _q4_k_step(
    blocks_ptr,  # at the tile's rows of blocks: [BLOCK_N] pointers
    halves_ptr,
    step,  # run of 32 channels, 8 to a block
):  # -> numbers [BLOCK_N, 32] int8, their scale and their minimum [BLOCK_N] fp32
    block, j = step // 8, step % 8
    base = blocks_ptr + block * 144
    packed = tl.load(base[:, None] + (16 + j // 2 * 32 + tl.arange(0, 32))[None, :])  # in bounds: a row's own block
    first = tl.load(base + 4 + j % 4).to(tl.int32)  # in bounds: as packed
    second = tl.load(base + 8 + j % 4).to(tl.int32)  # in bounds: as packed
    shared = tl.load(base + 12 + j % 4).to(tl.int32)  # in bounds: as packed
    scale = tl.where(j < 4, first & 63, (shared & 15) | ((first >> 2) & 48)).to(tl.float32)
    minimum = tl.where(j < 4, second & 63, (shared >> 4) | ((second >> 2) & 48)).to(tl.float32)
    scale *= tl.load(halves_ptr + block * 72).to(tl.float32)  # in bounds: as packed
    minimum *= tl.load(halves_ptr + block * 72 + 1).to(tl.float32)  # in bounds: as packed
    return ((packed.to(tl.int32) >> (j % 2 * 4)) & 15).to(tl.int8), scale, minimum


@triton.jit(do_not_specialize=["M", "R"])
def _linear_stored_kernel(
    x_ptr,  # [M, K] int8, contiguous
    x_scale_ptr,  # [M, G] fp32, contiguous; G is 1 or K / 128
    blocks_ptr,  # [N, K / 32, 34] or [N, K / 256, 144] uint8, contiguous
    halves_ptr,  # the same bytes as fp16
    bias_ptr,  # [N], or None
    t_ptr,  # [M, R], contiguous, or None
    up_ptr,  # [N, R], contiguous, or None
    y_ptr,  # [M, N], columns adjacent
    M,
    N,
    K,  # a multiple of 128
    R,
    y_stride_m,
    row_bytes,  # of blocks, even
    GROUPED: tl.constexpr,  # G is K / 128
    IS_Q4_K: tl.constexpr,  # otherwise Q8_0
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile_m, tile_n = tile_at(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    row = tile_m.to(tl.int64) * BLOCK_M
    last_row = (M - 1 - row).to(tl.int32)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if t_ptr is not None:
        t_ptr += row * R

    # Rows and columns past the end repeat the last one; they are not stored.
    m = tl.minimum(tl.arange(0, BLOCK_M), last_row)
    x_at = x_ptr + row * K + (m[:, None] * K + tl.arange(0, 32)[None, :])
    packed_row = tl.minimum(n, N - 1).to(tl.int64)
    bytes_at = blocks_ptr + packed_row * row_bytes
    halves_at = halves_ptr + packed_row * (row_bytes // 2)
    scale_at = x_scale_ptr + (row + m) * (K // 128 if GROUPED else 1)

    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, K // 32):
        x = tl.load(x_at + step * 32)  # in bounds: rows up to the last, 32 divides K
        if IS_Q4_K:
            q, scale, minimum = _q4_k_step(bytes_at, halves_at, step)
            total = tl.sum(x.to(tl.int32), 1).to(tl.float32)
            part = tl.dot(x, q.T, out_dtype=tl.int32).to(tl.float32) * scale[None, :]
            part -= total[:, None] * minimum[None, :]
        else:
            q, scale = _q8_0_step(bytes_at, halves_at, step)
            part = tl.dot(x, q.T, out_dtype=tl.int32).to(tl.float32) * scale[None, :]
        if GROUPED:
            part *= tl.load(scale_at + step // 4)[:, None]  # in bounds: rows up to the last, a scale per 128 channels
        y += part
    if not GROUPED:
        y *= tl.load(scale_at)[:, None]  # in bounds: rows up to the last
    y, _ = finish_tile(y, y, None, bias_ptr, t_ptr, up_ptr, last_row, n, N, R, BLOCK_M, False)
    m = tl.arange(0, BLOCK_M)[:, None]
    at = y_ptr + row * y_stride_m + (m * y_stride_m + n[None, :])
    tl.store(at, y, mask=(m <= last_row) & (n < N)[None, :])


def linear_stored_triton(
    x: Quantized,
    blocks: Tensor,
    kind: str,
    bias: Tensor | None,
    *,
    low_rank: LowRank | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Launch the kernel that unpacks as it multiplies, on checked arguments."""
    outputs, inputs = blocks.shape[0], x.shape[-1]
    if out is None:
        out = torch.empty(*x.shape[:-1], outputs, dtype=out_dtype, device=x.device)
    rows = out.view(-1, outputs)
    t, up = low_rank if low_rank is not None else (None, None)
    grid = (-(-len(rows) // TILE["BLOCK_M"]) * -(-outputs // TILE["BLOCK_N"]),)
    if rows.numel() > 0:
        with on_device_of(x.values):
            _linear_stored_kernel[grid](
                x.values,
                x.scale,
                blocks,
                blocks.view(torch.float16),
                bias,
                t,
                up,
                rows,
                len(rows),
                outputs,
                inputs,
                0 if up is None else up.shape[1],
                rows.stride(0),
                blocks.shape[1],
                GROUPED=x.scale.shape[-1] > 1,
                IS_Q4_K=kind == "Q4_K",
                **TILE,
            )
    return out


def linear_stored(
    x: Quantized,
    blocks: Tensor,
    kind: str,
    bias: Tensor | None,
    *,
    low_rank: LowRank | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """Multiply 8-bit tokens by the transpose of a weight stored as GGUF blocks, and add the bias.

    Args:
        x: [..., K] in 8 bits; on a GPU K is a multiple of 128, at most 16384.
        blocks: [N, bytes of a row] uint8, the rows as they lie in the file, on x's device.
        kind: GGUF's name of the blocks' type, as for `dequantize_gguf`.
        bias: [N], contiguous; float32, bfloat16 or float16; or None.
        low_rank: (t, up), as for `linear_8bit`.
        out_dtype: of a new result: float32, bfloat16 or float16.
        out: [..., N] to write to instead, as for `linear_8bit`.
        scratch: [N, K] of x's dtype, contiguous, for a weight that is rounded to 8 bits first; new memory where None.

    Returns:
        [..., N], `out` where it was given.

    Raises:
        ValueError: a kind, shape, dtype, stride or device is not as above.
    """
    check_quantized(x, "x")
    blocks = check_blocks(blocks, kind, x.shape[-1])
    require(blocks.device == x.device, f"blocks: must be on {x.device}, like x", blocks.device)
    check_terms(x, blocks.shape[0], bias, low_rank)
    require(out_dtype in COMPUTE_DTYPES, "out_dtype: must be float32, bfloat16 or float16", out_dtype)
    check_out(out, (*x.shape[:-1], blocks.shape[0]), x.device)
    if not runs_triton(x.values):
        return linear_stored_reference(x, blocks, kind, bias, low_rank=low_rank, out_dtype=out_dtype, out=out)
    whole = x.shape[-1] % GROUP == 0
    require(whole, f"x: channels must be a multiple of {GROUP} on a GPU", x.shape[-1])
    if unpacks_in_prologue(x, kind):
        return linear_stored_triton(x, blocks, kind, bias, low_rank=low_rank, out_dtype=out_dtype, out=out)
    weight = requantize_gguf(
        blocks, kind, in_features=x.shape[-1], dtype=x.values.dtype, rotated=x.rotated, out=scratch
    )
    return linear_8bit_triton(x, weight, bias, low_rank=low_rank, out_dtype=out_dtype, out=out)
