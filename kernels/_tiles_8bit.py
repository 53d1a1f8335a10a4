"""Launch parameters of the 8-bit linears on each generation of GPUs; they change a result only by the order of a sum.

On Ada, and Ampere before it, 256 x 128 results fill the registers of one program of eight warps, 128 x 128 those of
four, and two such programs run side by side: one multiplies while the other converts. That suits sums which are added
to fp32 on the way, e4m3's in fp16 and those with a scale for each 128 channels; int8 with a scale per token gains more
from reading the weight half as often. Accumulators and an epilogue together are more than 255 registers, and a few are
spilled around the loop, once per tile. Hopper reads its operands from shared memory, and has more of it. Computed from
machine code; none has been tuned on a GPU.
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
    int8: Tile  # a scale per token
    e4m3: Tile  # the same
    grouped: Tile  # a scale for each 128 channels of a token
    bias_alone: Tile | None = None  # in place of these, where nothing but a bias follows the product
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
        if grouped:
            return self.grouped
        if epilogue == "bias" and not low_rank and self.bias_alone is not None:
            return self.bias_alone
        return self.int8 if dtype == torch.int8 else self.e4m3


_TALL = Tile(256, 128, 64, num_warps=8, num_stages=3)
_PAIR = Tile(128, 128, 64, num_warps=4, num_stages=3)
_PAIR_DEEP = Tile(128, 128, 128, num_warps=4, num_stages=2)
_SQUARE = Tile(128, 128, 128, num_warps=8, num_stages=3)
_SQUARE_WHOLE = Tile(128, 128, 128, num_warps=8, num_stages=3, split=False)
_SQUARE_DEEP = Tile(128, 128, 128, num_warps=8, num_stages=4, split=False)
_WIDE_WHOLE = Tile(128, 256, 128, num_warps=8, num_stages=3, split=False)

# By compute capability x 10, the largest that is not above the GPU's.
GENERATIONS = {
    80: Generation(fp16_sums=False, int8=_TALL, e4m3=_TALL, grouped=_SQUARE),
    89: Generation(fp16_sums=True, int8=_TALL, e4m3=_PAIR, grouped=_PAIR_DEEP),
    90: Generation(
        fp16_sums=False,
        int8=_SQUARE_DEEP,
        e4m3=_SQUARE_DEEP,
        grouped=_SQUARE_DEEP,
        bias_alone=_WIDE_WHOLE,
        unpacks=False,
    ),
    120: Generation(fp16_sums=False, int8=_TALL, e4m3=_TALL, grouped=_SQUARE_WHOLE),
}


def generation_of(device: torch.device) -> Generation:
    """How the 8-bit linears run on this GPU; without one, as on an RTX 4090."""
    if device.type != "cuda":
        return GENERATIONS[89]
    major, minor = torch.cuda.get_device_capability(device)
    return GENERATIONS[max((arch for arch in GENERATIONS if arch <= 10 * major + minor), default=80)]
