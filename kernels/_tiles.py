"""Launch parameters of the kernels. Nothing here may change a result beyond the order of a sum.

The tables follow from the register file and from 16-byte loads; they have not been tuned on a GPU.
`tests/data/machine_code/rows.json` holds the registers and instructions that each tile compiles to.
"""

from dataclasses import dataclass

MAX_CHANNELS = 8192  # one row in the registers of one program: 64 fp32 values per thread at 8 warps

# (channels at most, warps): a thread holds 16 to 64 channels, at least one 16-byte load of each part of the row.
ROW_WARPS = ((1024, 1), (2048, 2), (6144, 4), (MAX_CHANNELS, 8))


@dataclass(frozen=True, slots=True)
class RowTile:
    """One program per row of channels, the row in two parts whose sizes are powers of two."""

    head: int  # channels; never more than the row has, so head loads need no mask
    tail: int  # channels, the last of them masked off where head + tail is more than the row
    num_warps: int


def row_tile(channels: int) -> RowTile:
    """Cut a row in two powers of two: 5120 = 4096 + 1024 and 3072 = 2048 + 1024 leave no lane idle.

    Args:
        channels: of one row, 1 to MAX_CHANNELS.

    Returns:
        The tile of every kernel that normalises or combines whole rows.
    """
    head = 1 << max((channels - 1).bit_length() - 1, 0)
    rest = max(channels - head, 1)
    warps = next(warps for most, warps in ROW_WARPS if channels <= most)
    return RowTile(head=head, tail=1 << (rest - 1).bit_length(), num_warps=warps)
