"""GGUF blocks in Triton, one kernel for each family of kinds; see gguf_blocks.py for what a block holds.

Bytes are read as they lie. A run of 16 or 32 packed bytes holds two or four runs of elements, one in each group of
bits, and each of those is a store of its own. Blocks of most kinds are no multiple of 16 bytes, so loads are 1 to 8
bytes wide; it is the stores, of up to seven times as many bytes, that are kept at 16.
"""

from typing import Any

import torch
from torch import Tensor

from ._launch import on_device_of, tl, triton
from .gguf_blocks import FORMATS


@triton.jit(do_not_specialize=["num_blocks"])
def _q8_0_kernel(
    blocks_ptr,  # [num_blocks, 34] uint8, contiguous
    halves_ptr,  # the same bytes as fp16
    out_ptr,  # [num_blocks, 32], contiguous
    num_blocks,
    N: tl.constexpr,  # blocks per program
):
    block = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)[:, None]
    live = block < num_blocks
    place = tl.arange(0, 32)[None, :]
    scale = tl.load(halves_ptr + block * 17, mask=live, other=0.0).to(tl.float32)
    q = tl.load(blocks_ptr + block * 34 + 2 + place, mask=live, other=0).to(tl.int8, bitcast=True)
    tl.store(out_ptr + block * 32 + place, q.to(tl.float32) * scale, mask=live)


@triton.jit(do_not_specialize=["num_blocks"])
def _q4_q5_kernel(
    blocks_ptr,  # [num_blocks, BYTES] uint8, contiguous: scale, minimum if any, fifth bits if any, 16 bytes of 4 bits
    halves_ptr,  # the same bytes as fp16
    out_ptr,  # [num_blocks, 32], contiguous
    num_blocks,
    BYTES: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_FIFTH_BIT: tl.constexpr,
    N: tl.constexpr,  # blocks per program
):
    block = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)[:, None]
    live = block < num_blocks
    place = tl.arange(0, 16)[None, :]
    scale = tl.load(halves_ptr + block * (BYTES // 2), mask=live, other=0.0).to(tl.float32)
    base = blocks_ptr + block * BYTES
    packed = tl.load(base + (BYTES - 16) + place, mask=live, other=0).to(tl.int32)
    for run in tl.static_range(2):
        q = (packed >> (4 * run)) & 15
        if HAS_FIFTH_BIT:
            bits = tl.load(base + (BYTES - 20 + 2 * run) + place // 8, mask=live, other=0).to(tl.int32)
            q |= ((bits >> (place % 8)) & 1) << 4
        if HAS_MINIMUM:
            minimum = tl.load(halves_ptr + block * (BYTES // 2) + 1, mask=live, other=0.0).to(tl.float32)
            value = q.to(tl.float32) * scale + minimum
        else:
            value = (q - (16 if HAS_FIFTH_BIT else 8)).to(tl.float32) * scale
        tl.store(out_ptr + block * 32 + 16 * run + place, value, mask=live)


@triton.jit(do_not_specialize=["num_blocks"])
def _q4_k_q5_k_kernel(
    blocks_ptr,  # [num_blocks, BYTES] uint8, contiguous
    halves_ptr,  # the same bytes as fp16
    out_ptr,  # [num_blocks, 256], contiguous
    num_blocks,
    BYTES: tl.constexpr,
    HAS_FIFTH_BIT: tl.constexpr,
    N: tl.constexpr,  # blocks per program
):
    block = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)[:, None, None]
    live = block < num_blocks
    chunk = tl.arange(0, 4)[None, :, None]  # 32 bytes: scale 2 * chunk with their low bits, the next with the high ones
    place = tl.arange(0, 32)[None, None, :]
    base = blocks_ptr + block * BYTES
    packed = tl.load(base + (BYTES - 128) + chunk * 32 + place, mask=live, other=0).to(tl.int32)
    scale_of_scales = tl.load(halves_ptr + block * (BYTES // 2), mask=live, other=0.0).to(tl.float32)
    scale_of_minimums = tl.load(halves_ptr + block * (BYTES // 2) + 1, mask=live, other=0.0).to(tl.float32)
    if HAS_FIFTH_BIT:
        fifth = tl.load(base + 16 + place, mask=live, other=0).to(tl.int32)
    for run in tl.static_range(2):
        j = 2 * chunk + run
        first = tl.load(base + 4 + j % 4, mask=live, other=0).to(tl.int32)
        second = tl.load(base + 8 + j % 4, mask=live, other=0).to(tl.int32)
        shared = tl.load(base + 12 + j % 4, mask=live, other=0).to(tl.int32)
        scale = tl.where(j < 4, first & 63, (shared & 15) | ((first >> 2) & 48))
        minimum = tl.where(j < 4, second & 63, (shared >> 4) | ((second >> 2) & 48))
        q = (packed >> (4 * run)) & 15
        if HAS_FIFTH_BIT:
            q |= ((fifth >> j) & 1) << 4
        value = q.to(tl.float32) * (scale.to(tl.float32) * scale_of_scales)
        value -= minimum.to(tl.float32) * scale_of_minimums
        tl.store(out_ptr + block * 256 + j * 32 + place, value, mask=live)


@triton.jit(do_not_specialize=["num_blocks"])
def _q2_k_kernel(
    blocks_ptr,  # [num_blocks, 84] uint8, contiguous
    halves_ptr,  # the same bytes as fp16
    out_ptr,  # [num_blocks, 256], contiguous
    num_blocks,
    N: tl.constexpr,  # blocks per program
):
    block = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)[:, None, None]
    live = block < num_blocks
    half = tl.arange(0, 2)[None, :, None]
    place = tl.arange(0, 32)[None, None, :]
    base = blocks_ptr + block * 84
    packed = tl.load(base + 16 + half * 32 + place, mask=live, other=0).to(tl.int32)
    scale_of_scales = tl.load(halves_ptr + block * 42 + 40, mask=live, other=0.0).to(tl.float32)
    scale_of_minimums = tl.load(halves_ptr + block * 42 + 41, mask=live, other=0.0).to(tl.float32)
    for run in tl.static_range(4):
        both = tl.load(base + half * 8 + 2 * run + place // 16, mask=live, other=0).to(tl.int32)
        value = ((packed >> (2 * run)) & 3).to(tl.float32) * ((both & 15).to(tl.float32) * scale_of_scales)
        value -= (both >> 4).to(tl.float32) * scale_of_minimums
        tl.store(out_ptr + block * 256 + half * 128 + 32 * run + place, value, mask=live)


@triton.jit(do_not_specialize=["num_blocks"])
def _q3_k_kernel(
    blocks_ptr,  # [num_blocks, 110] uint8, contiguous
    halves_ptr,  # the same bytes as fp16
    out_ptr,  # [num_blocks, 256], contiguous
    num_blocks,
    N: tl.constexpr,  # blocks per program
):
    block = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)[:, None, None]
    live = block < num_blocks
    half = tl.arange(0, 2)[None, :, None]
    place = tl.arange(0, 32)[None, None, :]
    base = blocks_ptr + block * 110
    third = tl.load(base + place, mask=live, other=0).to(tl.int32)
    packed = tl.load(base + 32 + half * 32 + place, mask=live, other=0).to(tl.int32)
    scale_of_scales = tl.load(halves_ptr + block * 55 + 54, mask=live, other=0.0).to(tl.float32)
    for run in tl.static_range(4):
        part = 2 * run + place // 16  # scale 8 * half + part
        low = tl.load(base + 96 + part, mask=live, other=0).to(tl.int32) >> (4 * half)
        high = tl.load(base + 104 + part % 4, mask=live, other=0).to(tl.int32) >> (4 * half + 2 * (run // 2))
        scale = ((low & 15) | ((high & 3) << 4)) - 32
        q = (((packed >> (2 * run)) & 3) | (((third >> (4 * half + run)) & 1) << 2)) - 4
        value = q.to(tl.float32) * (scale.to(tl.float32) * scale_of_scales)
        tl.store(out_ptr + block * 256 + half * 128 + 32 * run + place, value, mask=live)


@triton.jit(do_not_specialize=["num_blocks"])
def _q6_k_kernel(
    blocks_ptr,  # [num_blocks, 210] uint8, contiguous
    halves_ptr,  # the same bytes as fp16
    out_ptr,  # [num_blocks, 256], contiguous
    num_blocks,
    N: tl.constexpr,  # blocks per program
):
    block = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)[:, None, None]
    live = block < num_blocks
    half = tl.arange(0, 2)[None, :, None]
    place = tl.arange(0, 32)[None, None, :]
    base = blocks_ptr + block * 210
    even = tl.load(base + half * 64 + place, mask=live, other=0).to(tl.int32)
    odd = tl.load(base + half * 64 + 32 + place, mask=live, other=0).to(tl.int32)
    high = tl.load(base + 128 + half * 32 + place, mask=live, other=0).to(tl.int32)
    scale_of_scales = tl.load(halves_ptr + block * 105 + 104, mask=live, other=0.0).to(tl.float32)
    for run in tl.static_range(4):
        low = even if run % 2 == 0 else odd
        scale = tl.load(base + 192 + half * 8 + 2 * run + place // 16, mask=live, other=0).to(tl.int8, bitcast=True)
        q = (((low >> (4 * (run // 2))) & 15) | (((high >> (2 * run)) & 3) << 4)) - 32
        value = q.to(tl.float32) * (scale.to(tl.float32) * scale_of_scales)
        tl.store(out_ptr + block * 256 + half * 128 + 32 * run + place, value, mask=live)


# kind: its kernel and what that is specialised by. N makes 1,024 elements a store: 16 bytes of bf16 per thread.
KERNELS: dict[str, tuple[Any, dict[str, int]]] = {
    "Q8_0": (_q8_0_kernel, {"N": 32}),
    "Q4_0": (_q4_q5_kernel, {"BYTES": 18, "HAS_MINIMUM": False, "HAS_FIFTH_BIT": False, "N": 64}),
    "Q4_1": (_q4_q5_kernel, {"BYTES": 20, "HAS_MINIMUM": True, "HAS_FIFTH_BIT": False, "N": 64}),
    "Q5_0": (_q4_q5_kernel, {"BYTES": 22, "HAS_MINIMUM": False, "HAS_FIFTH_BIT": True, "N": 64}),
    "Q5_1": (_q4_q5_kernel, {"BYTES": 24, "HAS_MINIMUM": True, "HAS_FIFTH_BIT": True, "N": 64}),
    "Q2_K": (_q2_k_kernel, {"N": 16}),
    "Q3_K": (_q3_k_kernel, {"N": 16}),
    "Q4_K": (_q4_k_q5_k_kernel, {"BYTES": 144, "HAS_FIFTH_BIT": False, "N": 8}),
    "Q5_K": (_q4_k_q5_k_kernel, {"BYTES": 176, "HAS_FIFTH_BIT": True, "N": 8}),
    "Q6_K": (_q6_k_kernel, {"N": 16}),
}
NUM_WARPS = 4


def dequantize_blocks(blocks: Tensor, kind: str, out: Tensor) -> None:
    """Launch the kernel of a kind on contiguous blocks, of any number of rows, into a contiguous `out`."""
    num_blocks = blocks.numel() // FORMATS[kind].num_bytes
    if num_blocks == 0:
        return
    kernel, constants = KERNELS[kind]
    grid = (-(-num_blocks // constants["N"]),)
    with on_device_of(blocks):
        kernel[grid](blocks, blocks.view(torch.float16), out, num_blocks, **constants, num_warps=NUM_WARPS)
