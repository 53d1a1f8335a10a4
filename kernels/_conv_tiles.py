"""Launch parameters of the causal convolution on each generation of GPUs; they change a result by the order of a sum.

Wan's VAEs have 3 x 2^k channels (2.1) and 2^k or 5 x 2^k (2.2). A tile's columns are one to three accumulators of a
power of two each, so that 96, 192 and 256 outputs fill a tile: no column is wasted, and a program that has all outputs
of a pixel can normalise them. Computed from machine code; none has been tuned on a GPU.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class ConvTile:
    """Part of the result that one program makes."""

    rows: int  # pixels
    width: int  # output channels of one accumulator
    parts: int  # accumulators
    depth: int  # input channels per step, a multiple of 16
    num_warps: int
    num_stages: int

    @property
    def columns(self) -> int:
        """Output channels of one program."""
        return self.width * self.parts

    def constants(self) -> dict[str, int]:
        """As the kernel and its launch name them."""
        return {
            "BLOCK_M": self.rows,
            "WIDTH": self.width,
            "PARTS": self.parts,
            "BLOCK_K": self.depth,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# By multiples of output channels, the first that fits: the tile, with the deepest step it takes. On Ada, steps of 16
# channels leave registers for three programs on an SM where 32 leave them for two.
_ADA = {
    192: ConvTile(64, 64, 3, depth=16, num_warps=4, num_stages=4),
    96: ConvTile(128, 32, 3, depth=16, num_warps=4, num_stages=4),
    256: ConvTile(64, 128, 2, depth=32, num_warps=4, num_stages=3),
    128: ConvTile(128, 128, 1, depth=32, num_warps=4, num_stages=3),
    64: ConvTile(128, 64, 1, depth=32, num_warps=4, num_stages=3),
    48: ConvTile(128, 16, 3, depth=32, num_warps=4, num_stages=3),
    32: ConvTile(128, 32, 1, depth=32, num_warps=4, num_stages=3),
    16: ConvTile(128, 16, 1, depth=32, num_warps=4, num_stages=3),
}
# Hopper's tensor cores are faster than its L2 for small tiles.
_HOPPER = _ADA | {
    192: ConvTile(128, 64, 3, depth=64, num_warps=8, num_stages=3),
    96: ConvTile(256, 32, 3, depth=32, num_warps=8, num_stages=4),
    256: ConvTile(128, 128, 2, depth=64, num_warps=8, num_stages=3),
    128: ConvTile(128, 128, 1, depth=64, num_warps=8, num_stages=3),
}
_GENERATIONS = {80: _ADA, 90: _HOPPER, 100: _ADA}  # by compute capability x 10, the largest that is not above the GPU's
_NARROW = 16  # channels: the least that a tensor instruction takes


def padded(channels: int) -> int:
    """Channels with those of zeros that fill the last tensor instruction."""
    return -(-channels // _NARROW) * _NARROW


def conv_tile(channels: int, out_channels: int, arch: int, *, fp16_sums: bool = False) -> ConvTile:
    """The tile of a launch.

    Args:
        channels: of the input.
        out_channels: of the result.
        arch: compute capability x 10 of the GPU.
        fp16_sums: whether a step's products are summed in fp16. The fp32 sums of the steps are then instructions of
            their own: deep steps have fewer of them.
    """
    tiles = _GENERATIONS[max((key for key in _GENERATIONS if key <= arch), default=80)]
    tile = next(tile for multiple, tile in tiles.items() if padded(out_channels) % multiple == 0)
    deepest = max(tile.depth, 32) if fp16_sums else tile.depth
    depth = next(depth for depth in (64, 32, 16) if depth <= deepest and padded(channels) % depth == 0)
    return replace(tile, depth=depth, num_stages=min(tile.num_stages, 3) if depth > tile.depth else tile.num_stages)


def arch_of(device: torch.device) -> int:
    """Compute capability x 10; without a GPU an RTX 4090's."""
    if device.type != "cuda":
        return 89
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
