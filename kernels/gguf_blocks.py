"""GGUF blocks in plain torch: how each kind packs its numbers, and the value each number stands for.

A block holds 32 or 256 elements: a scale `d` in fp16, in some kinds a minimum too, and the numbers `q` in 2 to 8 bits.
The 256-element kinds have a small integer scale for each run of 16 or 32 elements besides. A number wider than 4 bits
is stored in two pieces. Every product below is exact in fp32, so a value is rounded at most once, by its subtraction.

Source: ggml-org/llama.cpp, ggml/src/ggml-common.h (layouts) and gguf-py/gguf/quants.py (values).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wanfast.block_sizes import GGUF_BLOCKS


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One kind of block."""

    elements: int
    num_bytes: int
    unpack: Callable[[Tensor], Tensor]  # [N, num_bytes] uint8 -> [N, elements], fp32 unless the kind is plain
    scales_at: tuple[int, ...] = ()  # bytes of a block at which an fp16 scale or minimum stands


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at a byte of each block, [N, 1] in fp32."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _bit(packed: Tensor, place: int, moved_to: int) -> Tensor:
    """One bit of each byte, moved to another place; the others are 0."""
    moved = packed >> (place - moved_to) if place >= moved_to else packed << (moved_to - place)
    return moved.bitwise_and_(1 << moved_to)


def _q8_0(blocks: Tensor) -> Tensor:
    """Scale; 32 int8."""
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _nibbles(blocks: Tensor, at: int) -> Tensor:
    """16 bytes hold elements 0 to 15 in their low half and 16 to 31 in their high half: [N, 32] uint8."""
    packed = blocks[:, at : at + 16]
    return torch.cat((packed & 15, packed >> 4), 1)


# The 8 bits of each byte as bit 4 of 8 bytes, held as one int64: looking bits up is faster than shifting them.
_SPREAD_BITS = (((torch.arange(256)[:, None] >> torch.arange(8)) & 1) << 4).to(torch.uint8).view(torch.int64).flatten()


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """4 bytes hold one bit of each of 32 elements, lowest first: [N, 32] uint8, as bit 4."""
    index = blocks[:, at : at + 4].flatten().int()
    return _SPREAD_BITS.to(blocks.device).index_select(0, index).view(torch.uint8).view(-1, 32)


def _q4_0(blocks: Tensor) -> Tensor:
    """Scale; 32 numbers of 4 bits, less 8."""
    return _nibbles(blocks, 2).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    """Scale, minimum; 32 numbers of 4 bits."""
    return _nibbles(blocks, 4).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    """Scale; fifth bits; 32 numbers of 4 bits. Less 16."""
    numbers = _nibbles(blocks, 6) | _fifth_bits(blocks, 2)
    return numbers.float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    """Scale, minimum; fifth bits; 32 numbers of 4 bits."""
    numbers = _nibbles(blocks, 8) | _fifth_bits(blocks, 4)
    return numbers.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _two_bits(packed: Tensor, halves: int) -> Tensor:
    """32 bytes hold a number of 2 bits for each of 4 runs of 32 elements: [N, 32 * halves] -> [N, halves, 4, 32]."""
    packed = packed.unflatten(1, (halves, 32))
    numbers = torch.empty(len(packed), halves, 4, 32, dtype=torch.uint8, device=packed.device)
    for run in range(4):
        torch.bitwise_and(packed >> (2 * run), 3, out=numbers[:, :, run])
    return numbers


def _q2_k(blocks: Tensor) -> Tensor:
    """16 scales with 16 minimums, 4 bits each; 256 numbers of 2 bits; scale of the scales, scale of the minimums."""
    scales = (blocks[:, :16] & 15) * _half(blocks, 80)
    minimums = (blocks[:, :16] >> 4) * _half(blocks, 82)
    numbers = _two_bits(blocks[:, 16:80], 2).float().view(-1, 16, 16)
    return numbers.mul_(scales[:, :, None]).sub_(minimums[:, :, None]).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    """Inverted third bits; 256 numbers of 2 bits; 16 scales of 6 bits, less 32; scale of the scales. Less 4 or 0."""
    packed = blocks[:, 96:108]
    low = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), 1)
    high = torch.cat([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    scales = ((low | (high << 4)).float() - 32) * _half(blocks, 108)

    numbers = _two_bits(blocks[:, 32:96], 2).flatten(1, 2)
    for run in range(8):
        numbers[:, run] |= _bit(blocks[:, :32], run, 2)
    return numbers.float().sub_(4).view(-1, 16, 16).mul_(scales[:, :, None]).flatten(1)


def _scales_and_minimums(packed: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes hold 8 scales and 8 minimums of 6 bits: each [N, 8] uint8.

    The first four of each lie whole in bytes 0-3 and 4-7, whose two top bits belong to the last four of each; the four
    low bits of those share bytes 8-11.
    """
    scale, minimum, shared = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((scale & 63, (shared & 15) | ((scale >> 2) & 48)), 1)
    minimums = torch.cat((minimum & 63, (shared >> 4) | ((minimum >> 2) & 48)), 1)
    return scales, minimums


def _q4_k(blocks: Tensor, *, low_bits_at: int = 16, fifth_bits_at: int | None = None) -> Tensor:
    """Scale of the scales, scale of the minimums; 8 scales and minimums; 256 numbers of 4 bits."""
    scales, minimums = _scales_and_minimums(blocks[:, 4:16])
    packed = blocks[:, low_bits_at:].unflatten(1, (4, 32))
    numbers = torch.empty(len(blocks), 4, 2, 32, dtype=torch.uint8, device=blocks.device)
    torch.bitwise_and(packed, 15, out=numbers[:, :, 0])
    torch.bitwise_right_shift(packed, 4, out=numbers[:, :, 1])
    numbers = numbers.flatten(1, 2)
    if fifth_bits_at is not None:
        for run in range(8):
            numbers[:, run] |= _bit(blocks[:, fifth_bits_at : fifth_bits_at + 32], run, 4)
    scaled = numbers.float().mul_((scales * _half(blocks, 0))[:, :, None])
    return scaled.sub_((minimums * _half(blocks, 2))[:, :, None]).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    """As Q4_K, with the fifth bits of the numbers between."""
    return _q4_k(blocks, low_bits_at=48, fifth_bits_at=16)


def _q6_k(blocks: Tensor) -> Tensor:
    """256 numbers of 4 bits; their two high bits; 16 scales in int8; scale of the scales. Less 32."""
    low = blocks[:, :128].unflatten(1, (2, 2, 32))
    numbers = _two_bits(blocks[:, 128:192], 2).bitwise_left_shift_(4)
    numbers[:, :, :2] |= low & 15
    numbers[:, :, 2:] |= low >> 4
    scales = blocks[:, 192:208].view(torch.int8) * _half(blocks, 208)
    return numbers.float().sub_(32).view(-1, 16, 16).mul_(scales[:, :, None]).flatten(1)


FORMATS: Mapping[str, BlockFormat] = {
    "F32": BlockFormat(*GGUF_BLOCKS["F32"], lambda blocks: blocks.view(torch.float32)),
    "F16": BlockFormat(*GGUF_BLOCKS["F16"], lambda blocks: blocks.view(torch.float16)),
    "BF16": BlockFormat(*GGUF_BLOCKS["BF16"], lambda blocks: blocks.view(torch.bfloat16)),
    "Q8_0": BlockFormat(*GGUF_BLOCKS["Q8_0"], _q8_0, scales_at=(0,)),
    "Q4_0": BlockFormat(*GGUF_BLOCKS["Q4_0"], _q4_0, scales_at=(0,)),
    "Q4_1": BlockFormat(*GGUF_BLOCKS["Q4_1"], _q4_1, scales_at=(0, 2)),
    "Q5_0": BlockFormat(*GGUF_BLOCKS["Q5_0"], _q5_0, scales_at=(0,)),
    "Q5_1": BlockFormat(*GGUF_BLOCKS["Q5_1"], _q5_1, scales_at=(0, 2)),
    "Q2_K": BlockFormat(*GGUF_BLOCKS["Q2_K"], _q2_k, scales_at=(80, 82)),
    "Q3_K": BlockFormat(*GGUF_BLOCKS["Q3_K"], _q3_k, scales_at=(108,)),
    "Q4_K": BlockFormat(*GGUF_BLOCKS["Q4_K"], _q4_k, scales_at=(0, 2)),
    "Q5_K": BlockFormat(*GGUF_BLOCKS["Q5_K"], _q5_k, scales_at=(0, 2)),
    "Q6_K": BlockFormat(*GGUF_BLOCKS["Q6_K"], _q6_k, scales_at=(208,)),
}


def gguf_scales(blocks: Tensor, kind: str) -> Tensor:
    """Take the fp16 scales and minimums out of rows of blocks; where one is not finite, its whole block is not.

    Args:
        blocks: [rows, bytes of a row], uint8.
        kind: a quantised one of `FORMATS`.

    Returns:
        [number of blocks, 1 or 2], fp16.
    """
    form = FORMATS[kind]
    each = blocks.reshape(-1, form.num_bytes)
    return torch.cat([each[:, at : at + 2].contiguous().view(torch.float16) for at in form.scales_at], dim=1)
