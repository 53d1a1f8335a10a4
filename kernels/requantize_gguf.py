"""GGUF weights to the 8 bits that linears multiply: rows of packed blocks in, int8 or e4m3 with a scale per row out.

    w[n, k] = scale * q [- minimum], unpacked as in gguf_blocks.py
    values[n, k] = round(w[n, k] * largest / absmax[n]),  scale[n] = absmax[n] / largest      see _quantized.py
    rotated: each 128 channels of w are multiplied by the orthonormal Hadamard matrix first

Q8_0 and Q4_K are unpacked and rounded by one kernel. The other kinds are expanded to bf16 by dequantize_gguf and
rounded by quantize_rows: the same weight, but for bf16's rounding, at twice the traffic.

Grid       (N,), one program per row of the weight.
Tile       a row in registers as halves [RUNS, 64] of its runs of 128 channels, RUNS a power of two; K <= 16384.
Numerics   fp32; the rotation rounds w to bf16 first. e4m3 is scaled to 16, as tokens are.
Traffic    the packed row read, N*K bytes written: a block of Wan's 14B model, 351 million weights in Q4_K, in 0.6 ms at
           an RTX 4090's bandwidth (computed), beside 90 ms for its 8-bit linears over 32,760 tokens.
Reference  requantize_gguf_reference, below.
Source     ggml-org/llama.cpp, gguf-py/gguf/quants.py (blocks); Ashkboos et al., QuaRot, arXiv 2404.00456 (rotation).
"""

from typing import Any

import torch
from torch import Tensor

from ._checks import require
from ._launch import on_device_of, runs_triton, tl, triton
from ._quantized import (
    GROUP,
    QuantizedWeight,
    check_8bit_dtype,
    hadamard,
    quantize_reference,
    rotate_halves,
    round_8bit,
    scale_of,
)
from .dequantize_gguf import check_blocks, dequantize_gguf, dequantize_gguf_reference
from .quantize_rows import MAX_CHANNELS, quantize_rows_triton, tile_of


def requantize_gguf_reference(
    blocks: Tensor, kind: str, *, in_features: int, dtype: torch.dtype, rotated: bool
) -> QuantizedWeight:
    """The formula above in plain torch: the truth the kernels are held to, and the path without a GPU."""
    wide = dequantize_gguf_reference(blocks, kind, in_features=in_features, dtype=torch.float32)
    rows = quantize_reference(wide, dtype, rotated=rotated)
    return QuantizedWeight(rows.values, rows.scale.flatten(), rotated)


@triton.jit
def _store_row(low, high, values_ptr, scale_ptr, row, run, K: tl.constexpr, ROTATED: tl.constexpr):
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    live = run < K // 128
    if ROTATED:
        low, high = rotate_halves(low, high, hadamard(64))
    scale, inverse = scale_of(tl.maximum(tl.max(tl.abs(low)), tl.max(tl.abs(high))), dtype)
    tl.store(scale_ptr + row, scale)  # in bounds: one scale per row
    at = values_ptr + row * K + run[:, None] * 128 + tl.arange(0, 64)[None, :]
    tl.store(at, round_8bit(low * inverse, dtype), mask=live[:, None])
    tl.store(at + 64, round_8bit(high * inverse, dtype), mask=live[:, None])


@triton.jit
def _q8_0_half(blocks_ptr, halves_ptr, first, run, K: tl.constexpr, HALF: tl.constexpr, RUNS: tl.constexpr):
    block = run[:, None, None] * 4 + (2 * HALF + tl.arange(0, 2)[None, :, None])
    live = block < K // 32
    at = first + block
    scale = tl.load(halves_ptr + at * 17, mask=live, other=0.0).to(tl.float32)
    place = tl.arange(0, 32)[None, None, :]
    q = tl.load(blocks_ptr + at * 34 + 2 + place, mask=live, other=0).to(tl.int8, bitcast=True)
    return tl.reshape(q.to(tl.float32) * scale, (RUNS, 64))


@triton.jit
def _requantize_q8_0_kernel(
    blocks_ptr,  # [N, K / 32, 34] uint8, contiguous
    halves_ptr,  # the same bytes as fp16
    values_ptr,  # [N, K], contiguous; int8 or e4m3
    scale_ptr,  # [N] fp32
    K: tl.constexpr,  # a multiple of 128
    ROTATED: tl.constexpr,
    RUNS: tl.constexpr,  # power of two, at least K / 128
):
    row = tl.program_id(0).to(tl.int64)
    run = tl.arange(0, RUNS)
    low = _q8_0_half(blocks_ptr, halves_ptr, row * (K // 32), run, K, 0, RUNS)
    high = _q8_0_half(blocks_ptr, halves_ptr, row * (K // 32), run, K, 1, RUNS)
    _store_row(low, high, values_ptr, scale_ptr, row, run, K, ROTATED)


@triton.jit
def _q4_k_half(blocks_ptr, halves_ptr, first, run, K: tl.constexpr, HALF: tl.constexpr, RUNS: tl.constexpr):
    run = run[:, None, None]
    live = run < K // 128
    block = first + run // 2
    chunk = run % 2 * 2 + HALF  # 32 bytes: one half of a run, 32 channels in their low bits and 32 in their high ones
    nibble = tl.arange(0, 2)[None, :, None]
    place = tl.arange(0, 32)[None, None, :]
    base = blocks_ptr + block * 144
    packed = tl.load(base + 16 + chunk * 32 + place, mask=live, other=0).to(tl.int32)
    scale_of_scales = tl.load(halves_ptr + block * 72, mask=live, other=0.0).to(tl.float32)
    scale_of_minimums = tl.load(halves_ptr + block * 72 + 1, mask=live, other=0.0).to(tl.float32)
    j = 2 * chunk + nibble
    first_byte = tl.load(base + 4 + j % 4, mask=live, other=0).to(tl.int32)
    second_byte = tl.load(base + 8 + j % 4, mask=live, other=0).to(tl.int32)
    shared = tl.load(base + 12 + j % 4, mask=live, other=0).to(tl.int32)
    scale = tl.where(j < 4, first_byte & 63, (shared & 15) | ((first_byte >> 2) & 48))
    minimum = tl.where(j < 4, second_byte & 63, (shared >> 4) | ((second_byte >> 2) & 48))
    value = ((packed >> (4 * nibble)) & 15).to(tl.float32) * (scale.to(tl.float32) * scale_of_scales)
    return tl.reshape(value - minimum.to(tl.float32) * scale_of_minimums, (RUNS, 64))


@triton.jit
def _requantize_q4_k_kernel(
    blocks_ptr,  # [N, K / 256, 144] uint8, contiguous
    halves_ptr,  # the same bytes as fp16
    values_ptr,  # [N, K], contiguous; int8 or e4m3
    scale_ptr,  # [N] fp32
    K: tl.constexpr,  # a multiple of 256
    ROTATED: tl.constexpr,
    RUNS: tl.constexpr,  # power of two, at least K / 128
):
    row = tl.program_id(0).to(tl.int64)
    run = tl.arange(0, RUNS)
    low = _q4_k_half(blocks_ptr, halves_ptr, row * (K // 256), run, K, 0, RUNS)
    high = _q4_k_half(blocks_ptr, halves_ptr, row * (K // 256), run, K, 1, RUNS)
    _store_row(low, high, values_ptr, scale_ptr, row, run, K, ROTATED)


KERNELS: dict[str, Any] = {"Q8_0": _requantize_q8_0_kernel, "Q4_K": _requantize_q4_k_kernel}


def requantize_gguf_triton(
    blocks: Tensor, kind: str, *, in_features: int, dtype: torch.dtype, rotated: bool, out: Tensor | None = None
) -> QuantizedWeight:
    """Launch the kind's kernel on checked arguments, or the two kernels of kinds that have none of their own."""
    outputs = blocks.shape[0]
    if kind not in KERNELS:
        wide = dequantize_gguf(blocks, kind, in_features=in_features, dtype=torch.bfloat16)
        rows = quantize_rows_triton(wide, dtype, rotated=rotated)
        values = rows.values if out is None else out.copy_(rows.values)
        return QuantizedWeight(values, rows.scale.flatten(), rotated)
    values = torch.empty(outputs, in_features, dtype=dtype, device=blocks.device) if out is None else out
    scale = torch.empty(outputs, dtype=torch.float32, device=blocks.device)
    with on_device_of(blocks):
        KERNELS[kind][(outputs,)](
            blocks,
            blocks.view(torch.float16),
            values,
            scale,
            K=in_features,
            ROTATED=rotated,
            **tile_of(in_features),
        )
    return QuantizedWeight(values, scale, rotated)


def requantize_gguf(
    blocks: Tensor, kind: str, *, in_features: int, dtype: torch.dtype, rotated: bool, out: Tensor | None = None
) -> QuantizedWeight:
    """Round a weight stored as GGUF blocks to 8 bits, for one linear to multiply.

    Args:
        blocks: [N, bytes of a row] uint8, the rows as they lie in the file.
        kind: GGUF's name of the blocks' type, as for `dequantize_gguf`.
        in_features: elements of a row, whole blocks; on a GPU a multiple of 128, at most 16384.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.
        rotated: for inputs that are rotated too; in_features is a multiple of 128 then.
        out: [N, in_features] of that dtype to write the numbers to, contiguous, on blocks' device: memory that one
            linear after another may use.

    Returns:
        The weight in 8 bits, its numbers in `out` where it was given. blocks is not written to.

    Raises:
        ValueError: a kind, shape, dtype, stride or device is not as above.
    """
    check_8bit_dtype(dtype, "dtype", blocks.device)
    blocks = check_blocks(blocks, kind, in_features)
    on_gpu = runs_triton(blocks)
    whole = in_features % GROUP == 0
    require(whole or not rotated, f"in_features: must be a multiple of {GROUP} where rotated", in_features)
    fits = not on_gpu or (whole and in_features <= MAX_CHANNELS)
    require(fits, f"in_features: must be a multiple of {GROUP} up to {MAX_CHANNELS} on a GPU", in_features)
    if out is not None:
        shape = (blocks.shape[0], in_features)
        require(tuple(out.shape) == shape and out.dtype == dtype, f"out: must be {shape} {dtype}", _described(out))
        require(out.is_contiguous(), "out: must be contiguous", f"strides {out.stride()}")
        require(out.device == blocks.device, f"out: must be on {blocks.device}, like blocks", out.device)
    if on_gpu:
        return requantize_gguf_triton(blocks, kind, in_features=in_features, dtype=dtype, rotated=rotated, out=out)
    weight = requantize_gguf_reference(blocks, kind, in_features=in_features, dtype=dtype, rotated=rotated)
    return weight if out is None else QuantizedWeight(out.copy_(weight.values), weight.scale, rotated)


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"
