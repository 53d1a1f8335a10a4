"""Launch parameters of the 8-bit linears on each generation of GPUs; they change a result only by the order of a sum.

Tall tiles read less of the weight again from shared memory. On Ada, and Ampere before it, 256 x 128 is the tallest that
leaves room for two accumulators; an epilogue with more to hold takes 128 x 128. Hopper reads its operands from shared
memory, and has more of it. Computed from machine code; none has been tuned on a GPU.
"""

from dataclasses import dataclass

import torch

EPILOGUES = ("bias", "gelu", "residual")


@dataclass(frozen=True, slots=True)
class Tile:
    """Part of the result that one program makes."""

    rows: int
    columns: int
    depth: int  # channels per step; divides 128, and is 128 where a token has a scale for each 128 channels
    num_warps: int
    num_stages: int
    split: bool = True  # the columns in two halves, a product each

    def constants(self) -> dict[str, int]:
        """As the kernels and their launch name them."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "BLOCK_K": self.depth,
            "SPLIT": self.split,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True, slots=True)
class Generation:
    """How the 8-bit linears run on one generation of GPUs."""

    fp16_sums: bool  # e4m3 products are summed in fp16, twice as fast there as in fp32
    int8: Tile  # a scale per token, bias alone
    e4m3: Tile  # the same
    other: Tile  # every other form
    unpacks: bool = True  # whether packed weights are unpacked as they are multiplied, where tokens are few

    def tile(self, dtype: torch.dtype, epilogue: str, *, grouped: bool, low_rank: bool) -> Tile:
        """The tile for operands of this dtype.

        Args:
            dtype: `torch.int8` or `torch.float8_e4m3fn`.
            epilogue: one of EPILOGUES.
            grouped: whether tokens have a scale for each 128 channels.
            low_rank: whether there is a low-rank term.

        Returns:
            Launch parameters; those of "gelu" have 128 columns, one scale of the result.
        """
        if grouped or low_rank or epilogue != "bias":
            return self.other
        return self.int8 if dtype == torch.int8 else self.e4m3


_TALL = Tile(256, 128, 64, num_warps=8, num_stages=3)
_SQUARE = Tile(128, 128, 128, num_warps=8, num_stages=3)
_SQUARE_WHOLE = Tile(128, 128, 128, num_warps=8, num_stages=3, split=False)
_SQUARE_DEEP = Tile(128, 128, 128, num_warps=8, num_stages=4, split=False)
_WIDE_WHOLE = Tile(128, 256, 128, num_warps=8, num_stages=3, split=False)

# By compute capability x 10, the largest that is not above the GPU's.
GENERATIONS = {
    80: Generation(fp16_sums=False, int8=_TALL, e4m3=_SQUARE, other=_SQUARE),
    89: Generation(fp16_sums=True, int8=_TALL, e4m3=_SQUARE, other=_SQUARE),
    90: Generation(fp16_sums=False, int8=_WIDE_WHOLE, e4m3=_WIDE_WHOLE, other=_SQUARE_DEEP, unpacks=False),
    120: Generation(fp16_sums=False, int8=_TALL, e4m3=_TALL, other=_SQUARE_WHOLE),
}


def generation_of(device: torch.device) -> Generation:
    """How the 8-bit linears run on this GPU; without one, as on an RTX 4090."""
    if device.type != "cuda":
        return GENERATIONS[89]
    major, minor = torch.cuda.get_device_capability(device)
    return GENERATIONS[max((arch for arch in GENERATIONS if arch <= 10 * major + minor), default=80)]
