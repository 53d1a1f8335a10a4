"""Sizes of the blocks that weights are stored in: numbers alone, for who reads headers and for the kernels."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

SCALE_BLOCK = 128  # weights on a side of a square block of 8-bit weights with a scale of its own


class BlockSize(NamedTuple):
    """One kind of GGUF block."""

    elements: int
    num_bytes: int


# Source: ggml-org/llama.cpp, ggml/src/ggml-common.h.
GGUF_BLOCKS: Mapping[str, BlockSize] = {
    "F32": BlockSize(1, 4),
    "F16": BlockSize(1, 2),
    "BF16": BlockSize(1, 2),
    "Q8_0": BlockSize(32, 34),
    "Q4_0": BlockSize(32, 18),
    "Q4_1": BlockSize(32, 20),
    "Q5_0": BlockSize(32, 22),
    "Q5_1": BlockSize(32, 24),
    "Q2_K": BlockSize(256, 84),
    "Q3_K": BlockSize(256, 110),
    "Q4_K": BlockSize(256, 144),
    "Q5_K": BlockSize(256, 176),
    "Q6_K": BlockSize(256, 210),
}


def block_counts(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the scales of an 8-bit matrix that has one per square block."""
    return -(-shape[0] // SCALE_BLOCK), -(-shape[1] // SCALE_BLOCK)
