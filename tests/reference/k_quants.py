"""Quantisers into GGUF's K layouts, which gguf itself can only read: the plainest ones that are correct.

Each block of 256 values is cut into sub-blocks with a scale of their own, itself stored in a few bits and rounded up,
so that nothing is clipped by more than a fraction of a step. Source: ggml-org/ggml, ggml-common.h and ggml-quants.c.
"""

import numpy as np
import torch
from torch import Tensor


def quantise_k(values: Tensor, kind: str) -> np.ndarray:
    """Quantise [..., in] to uint8 [..., bytes]; in is a multiple of 256, kind is Q3_K, Q4_K, Q5_K or Q6_K."""
    blocks = values.detach().to(torch.float32).numpy().reshape(-1, 256)
    packed = {"Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}[kind](blocks)
    return packed.reshape(*values.shape[:-1], -1)


def _half(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp16 [n], not below what was asked for, as fp32 and as bytes [n, 2]."""
    halves = values.astype(np.float16)
    halves = np.where(halves < values, np.nextafter(halves, np.float16(np.inf)), halves).astype(np.float16)
    return np.maximum(halves.astype(np.float32), 1e-20), halves[:, None].view(np.uint8)


def _scales_and_minima(blocks: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers 0..levels [n, 8, 32] of sub-blocks of 32, and the bytes d, dmin and twelve of scales in front of them."""
    parts = blocks.reshape(-1, 8, 32)
    low, high = np.minimum(parts.min(2), 0), np.maximum(parts.max(2), 0)
    step, least = (high - low) / levels, -low
    (d, d_bytes), (d_min, d_min_bytes) = _half(step.max(1) / 63), _half(least.max(1) / 63)
    scale = np.clip(np.ceil(step / d[:, None]), 1, 63).astype(np.uint8)
    minimum = np.clip(np.ceil(least / d_min[:, None]), 0, 63).astype(np.uint8)
    shifted = parts + (d_min[:, None] * minimum)[..., None]
    numbers = np.clip(np.rint(shifted / (d[:, None] * scale)[..., None]), 0, levels).astype(np.uint8)
    packed = np.zeros((len(blocks), 12), np.uint8)
    packed[:, :4] = scale[:, :4] | (scale[:, 4:] >> 4) << 6
    packed[:, 4:8] = minimum[:, :4] | (minimum[:, 4:] >> 4) << 6
    packed[:, 8:] = (scale[:, 4:] & 15) | (minimum[:, 4:] & 15) << 4
    return numbers, np.concatenate([d_bytes, d_min_bytes, packed], 1)


def _nibbles(numbers: np.ndarray) -> np.ndarray:
    """[n, 8, 32] to [n, 128]: sub-blocks 2c and 2c + 1 share 32 bytes."""
    return (numbers[:, 0::2] & 15 | (numbers[:, 1::2] & 15) << 4).reshape(-1, 128)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    numbers, head = _scales_and_minima(blocks, 15)
    return np.concatenate([head, _nibbles(numbers)], 1)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    numbers, head = _scales_and_minima(blocks, 31)
    high_bits = np.bitwise_or.reduce((numbers >> 4) << np.arange(8, dtype=np.uint8)[:, None], axis=1)  # [n, 32]
    return np.concatenate([head, high_bits, _nibbles(numbers)], 1)


def _symmetric(blocks: np.ndarray, levels: int, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers -levels..levels [n, 256] of sub-blocks of 16, their scales 1..steps [n, 16], and bytes of d [n, 2]."""
    parts = blocks.reshape(-1, 16, 16)
    step = np.abs(parts).max(2) / levels
    d, d_bytes = _half(step.max(1) / steps)
    scale = np.clip(np.ceil(step / d[:, None]), 1, steps)
    numbers = np.clip(np.rint(parts / (d[:, None] * scale)[..., None]), -levels, levels)
    return numbers.reshape(-1, 256).astype(np.int8), scale.astype(np.uint8), d_bytes


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    numbers, scale, d_bytes = _symmetric(blocks, 31, 127)
    quarters = (numbers + 32).astype(np.uint8).reshape(-1, 2, 4, 32)  # half, quarter of the half, place
    low, high = quarters & 15, quarters >> 4
    low_bytes = np.stack([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], 2).reshape(-1, 128)
    high_bytes = np.bitwise_or.reduce(high << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2).reshape(-1, 64)
    return np.concatenate([low_bytes, high_bytes, scale, d_bytes], 1)


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    numbers, scale, d_bytes = _symmetric(blocks, 3, 31)
    eighths = (numbers + 4).astype(np.uint8).reshape(-1, 8, 32)
    mask = np.bitwise_or.reduce((eighths >> 2) << np.arange(8, dtype=np.uint8)[:, None], axis=1)  # [n, 32]
    quarters = (eighths & 3).reshape(-1, 2, 4, 32)
    low = np.bitwise_or.reduce(quarters << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2).reshape(-1, 64)
    six_bits = scale + 32
    scales = np.zeros((len(blocks), 12), np.uint8)
    scales[:, :8] = six_bits[:, :8] & 15 | (six_bits[:, 8:] & 15) << 4
    for group in range(4):
        scales[:, 8:] |= (six_bits[:, 4 * group : 4 * group + 4] >> 4) << (2 * group)
    return np.concatenate([mask, low, scales, d_bytes], 1)
