"""Linear, W8A8, with what follows it inside a feed-forward block: bias, GELU and 8 bits for the next linear.

    h[m, n] = gelu((sum_k x[m, k] * w[n, k]) * x_scale[m, g] * w_scale[n] + bias[n] + sum_r t[m, r] * up[n, r])
    values[m, n] = round(h[m, n] * largest / absmax),  scale[m, n // 128] = absmax / largest      see _quantized.py
    gelu(y) = y / 2 * (1 + tanh(u)) = y / (1 + exp(-2 u)),  u = sqrt(2 / pi) * (y + 0.044715 y^3)
    rotated: h is multiplied, 128 channels at a time, by the orthonormal Hadamard matrix before rounding

Grid       (tiles of h,), 8 rows of tiles together so that their weights stay in the L2 cache.
Tile       BLOCK_M x 128 of h in registers, so that a tile's row is one scale; see _tiles_8bit.py.
Numerics   as linear_8bit.py up to h, which stays in fp32; the rotation rounds it to bf16.
Traffic    as linear_8bit.py, with 1 byte per element written and 1/32 for scales.
Reference  linear_8bit_gelu_reference, below.
Source     Wan-Video/Wan2.2, wan/modules/model.py (ffn); Ashkboos et al., QuaRot, arXiv 2404.00456 (the rotation).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import require
from ._launch import on_device_of, runs_triton, tl, triton
from ._matmul_8bit import (
    LowRank,
    check_operands,
    finish_tile,
    launch_arguments,
    matmul_reference,
    sum_products,
    tile_at,
)
from ._quantized import (
    GROUP,
    Quantized,
    QuantizedWeight,
    hadamard,
    quantize_reference,
    rotate_halves,
    rotate_tile,
    round_8bit,
    scale_of,
)


def linear_8bit_gelu_reference(
    x: Quantized,
    weight: QuantizedWeight,
    bias: Tensor | None,
    *,
    rotated: bool,
    low_rank: LowRank | None = None,
) -> Quantized:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    h = F.gelu(matmul_reference(x, weight, bias, low_rank), approximate="tanh")
    return quantize_reference(h, x.values.dtype, groups=h.shape[-1] // GROUP, rotated=rotated)


@triton.jit
def _gelu_tanh(y):
    u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
    return y / (1.0 + tl.exp(-2.0 * u))


@triton.jit(do_not_specialize=["M", "R"])
def _linear_8bit_gelu_kernel(
    x_ptr,  # [M, K] int8 or e4m3, contiguous
    x_scale_ptr,  # [M, G] fp32, contiguous; G is 1 or K / 128
    w_ptr,  # [N, K], x's dtype, contiguous
    w_scale_ptr,  # [N] fp32
    bias_ptr,  # [N], or None
    t_ptr,  # [M, R], contiguous, or None
    up_ptr,  # [N, R], contiguous, or None
    values_ptr,  # [M, N], x's dtype, contiguous
    scale_ptr,  # [M, N / 128] fp32, contiguous
    M,
    N: tl.constexpr,  # a multiple of 128
    K: tl.constexpr,  # a multiple of 128
    R,
    GROUPED: tl.constexpr,  # G is K / 128
    ROTATED: tl.constexpr,
    FP16_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # 128
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    tile_m, tile_n = tile_at(tl.cdiv(M, BLOCK_M), N // BLOCK_N, 8)
    row = tile_m.to(tl.int64) * BLOCK_M
    column = tile_n.to(tl.int64) * BLOCK_N
    last_row = (M - 1 - row).to(tl.int32)
    if t_ptr is not None:
        t_ptr += row * R
    low, high = sum_products(
        x_ptr + row * K,
        x_scale_ptr + row * ((K // 128) if GROUPED else 1),
        w_ptr + column * K,
        last_row,
        BLOCK_N - 1,
        True,
        K,
        GROUPED,
        FP16_SUMS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SPLIT,
    )
    HALF: tl.constexpr = 64 if SPLIT else 128
    n = tile_n * BLOCK_N + tl.arange(0, HALF)
    low, high = finish_tile(low, high, w_scale_ptr, bias_ptr, t_ptr, up_ptr, last_row, n, N, R, BLOCK_M, SPLIT)
    low = _gelu_tanh(low)
    if SPLIT:
        high = _gelu_tanh(high)
        if ROTATED:
            low, high = rotate_halves(low, high, hadamard(64))
        absmax = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    else:
        if ROTATED:
            low = rotate_tile(low, hadamard(128))
        absmax = tl.max(tl.abs(low), 1)

    m = tl.arange(0, BLOCK_M)
    live = m <= last_row
    scale, inverse = scale_of(absmax, dtype)
    tl.store(scale_ptr + row * (N // 128) + tile_n + m * (N // 128), scale, mask=live)
    at = values_ptr + row * N + column + (m[:, None] * N + tl.arange(0, HALF)[None, :])
    tl.store(at, round_8bit(low * inverse[:, None], dtype), mask=live[:, None])
    if SPLIT:
        tl.store(at + 64, round_8bit(high * inverse[:, None], dtype), mask=live[:, None])


def linear_8bit_gelu_triton(
    x: Quantized,
    weight: QuantizedWeight,
    bias: Tensor | None,
    *,
    rotated: bool,
    low_rank: LowRank | None = None,
) -> Quantized:
    """Launch the kernel on checked arguments."""
    outputs = weight.shape[0]
    values = torch.empty(*x.shape[:-1], outputs, dtype=x.values.dtype, device=x.device)
    scale = torch.empty(*x.shape[:-1], outputs // GROUP, dtype=torch.float32, device=x.device)
    tile, arguments = launch_arguments(x, weight, bias, low_rank, "gelu")
    tokens = values.numel() // outputs
    if tokens > 0:
        grid = (-(-tokens // tile.rows) * (outputs // tile.columns),)
        with on_device_of(x.values):
            _linear_8bit_gelu_kernel[grid](values_ptr=values, scale_ptr=scale, M=tokens, ROTATED=rotated, **arguments)
    return Quantized(values, scale, rotated)


def linear_8bit_gelu(
    x: Quantized,
    weight: QuantizedWeight,
    bias: Tensor | None,
    *,
    rotated: bool,
    low_rank: LowRank | None = None,
) -> Quantized:
    """Multiply 8-bit tokens by an 8-bit weight's transpose, add the bias, apply GELU and round to 8 bits.

    Args:
        x: [..., K] in 8 bits; on a GPU K is a multiple of 128.
        weight: [N, K], N a multiple of 128, of x's dtype and device, rotated if and only if x is.
        bias: [N], contiguous; float32, bfloat16 or float16; or None.
        rotated: multiply each 128 channels of the result by the Hadamard matrix before rounding.
        low_rank: (t, up), a term t @ up^T on the same pass: t [..., R] = x @ down^T, and up [N, R] with the term's
            scale in it; both bfloat16 or both float16, contiguous. R of several terms is their sum.

    Returns:
        [..., N] in x's dtype with a scale per 128 channels.

    Raises:
        ValueError: a shape, dtype, stride, device or rotation is not as above.
    """
    check_operands(x, weight, bias, low_rank)
    require(weight.shape[0] % GROUP == 0, f"weight: outputs must be a multiple of {GROUP}", weight.shape[0])
    run = linear_8bit_gelu_triton if runs_triton(x.values) else linear_8bit_gelu_reference
    return run(x, weight, bias, rotated=rotated, low_rank=low_rank)
