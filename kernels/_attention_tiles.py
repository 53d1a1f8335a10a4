"""Tiles of 16-bit attention, a table by GPU generation. Nothing here may change a result.

Ada and its like (99 KB of shared memory, tensor cores at half rate where they sum in fp32) take 64 queries and two
programs per multiprocessor: the softmax of one hides behind the products of the other. Hopper, whose products run
beside the warps that ask for them, takes 128 queries and asks for a block's scores before the softmax of the block
before. The table follows from registers, shared memory and machine code (`tests/data/machine_code/attention.json`); it
has not been tuned on a GPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

HEAD_DIMS = (64, 128)  # that the kernels are compiled for
KEYS = 64  # of one block: the blocks that block-sparse attention lists


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """One program: a block of queries of one head, which meets the keys 64 at a time."""

    queries: int  # power of two; divides 128, the queries that share a list in block-sparse attention
    part: int  # channels of v and of the result in one product; divides D
    num_warps: int
    num_stages: int
    ahead: bool  # whether the products of a block's scores run during the softmax of the block before


# A part is at most as wide as there are queries: a wider product Triton cuts along D, not along the queries, and then p
# goes from warp to warp through shared memory.
_ADA = {dim: AttentionTile(queries=64, part=64, num_warps=4, num_stages=2, ahead=False) for dim in HEAD_DIMS}
_HOPPER = {dim: AttentionTile(queries=128, part=dim, num_warps=8, num_stages=2, ahead=True) for dim in HEAD_DIMS}

# (oldest compute capability x 10, {head dimension: tile}), newest first: a GPU takes the first row that is not newer
# than itself. Hopper's own instructions are in no later generation, so what follows Hopper is as Ada.
TILES = ((100, _ADA), (90, _HOPPER), (0, _ADA))


def pick(arch: int, head_dim: int) -> AttentionTile:
    """The tile for a GPU of compute capability `arch` / 10 (89 for an RTX 4090) and heads of 64 or 128."""
    return next(tiles for oldest, tiles in TILES if oldest <= arch)[head_dim]


def architecture(x: Tensor) -> int:
    """Compute capability x 10 of x's GPU; Ada's where x is in no GPU, as in Triton's interpreter."""
    if not x.is_cuda:
        return 89
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor
