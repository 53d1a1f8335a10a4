"""Tiles of 8-bit attention for each GPU generation, and what of them reaches the result.

A row is chosen by the GPU, by what the weights are multiplied in (e4m3 or fp16) and by the head dimension. `flush` and
`accumulate` alone change numbers: sums over `flush` keys are kept in `accumulate` and then added to fp32.

sm_89, sm_120: tensor cores run at their full rate only with FP16 sums. sm_90 gains nothing from them for e4m3, and its
own sums of e4m3 keep few bits, so they end every 64 keys; sums of fp16 are FP16 there too, because fp32 sums would be
continued in the tensor cores' own registers, which have to be multiplied in between and so leave them idle.
FP16 sums cannot overflow: quantize_values.py, Bounds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_WEIGHT = {torch.float8_e4m3fn: 448.0, torch.float16: 16.0}  # what exp2(0) becomes before it is rounded


@dataclass(frozen=True, slots=True)
class Tile:
    """Launch parameters of one kernel, and the two that are part of its result."""

    rows: int  # queries of a program
    flush: int  # keys of a step, 64 or 128: what is added up before fp32
    accumulate: torch.dtype  # of those sums: float16 or float32
    halves: bool  # D of 128 as two products of 64, so that four warps stand in one column
    magic: bool  # int32 sums start at the float 1.5 * 2^23, so that no instruction converts them
    num_warps: int
    num_stages: int


_E4M3, _FP16 = torch.float8_e4m3fn, torch.float16
_ADA_E4M3_128 = Tile(64, 128, torch.float16, True, True, 4, 2)
_ADA_E4M3_64 = Tile(64, 128, torch.float16, False, True, 4, 2)
_ADA_FP16_128 = Tile(64, 64, torch.float16, True, True, 4, 2)
_ADA_FP16_64 = Tile(64, 128, torch.float16, False, True, 4, 2)

# (compute capability x 10, dtype of values, head dimension)
TILES = {
    (89, _E4M3, 128): _ADA_E4M3_128,
    (89, _E4M3, 64): _ADA_E4M3_64,
    (89, _FP16, 128): _ADA_FP16_128,
    (89, _FP16, 64): _ADA_FP16_64,
    (90, _E4M3, 128): Tile(128, 64, torch.float32, False, False, 8, 3),
    (90, _E4M3, 64): Tile(128, 64, torch.float32, False, False, 8, 3),
    (90, _FP16, 128): Tile(128, 64, torch.float16, False, False, 8, 3),
    (90, _FP16, 64): Tile(128, 64, torch.float16, False, False, 8, 3),
    (120, _E4M3, 128): _ADA_E4M3_128,
    (120, _E4M3, 64): _ADA_E4M3_64,
    (120, _FP16, 128): _ADA_FP16_128,
    (120, _FP16, 64): _ADA_FP16_64,
}
GENERATIONS = tuple(sorted({generation for generation, _, _ in TILES}))


def generation_of(x: Tensor) -> int:
    """The row of TILES for x's device: the newest generation not newer than it, and Ada where there is no GPU."""
    if not x.is_cuda:
        return 89
    major, minor = torch.cuda.get_device_capability(x.device)
    return max((known for known in GENERATIONS if known <= 10 * major + minor), default=GENERATIONS[0])
