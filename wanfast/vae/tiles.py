"""Pictures cut into strips along their longer side, so that a small memory suffices; what is kept of a strip is exact.

A convolution at the edge of a strip sees zeros where the picture goes on, and the error walks inwards by one pixel per
convolution. A strip is therefore read wider than it is kept, by as much as all convolutions together reach: then
nothing that is kept knows of the cut, and there is no seam to blend. The attention of the coarsest blocks sees the
whole picture, so these blocks, which are small, always run on all of it: in decoding once more for each strip, which
costs a few percent and no memory, and in encoding once, on what the strips have left.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from wanfast.config import VAEConfig

WHOLE_LEVELS = 1  # of the decoder's levels, those that run on the whole picture
_SMALLEST = 8  # rows or columns of latents that a strip keeps; below, almost all that is read is thrown away


@dataclass(frozen=True, slots=True)
class Strip:
    """A part of a picture in rows or columns of latents: what is kept of it, and what is read for that."""

    axis: int  # -2: rows, -1: columns
    start: int
    stop: int
    read_start: int
    read_stop: int

    def read(self, x: Tensor, scale: int) -> Tensor:
        """Cut what is read out of a picture with `scale` pixels per latent; a view."""
        return x.narrow(self.axis, self.read_start * scale, (self.read_stop - self.read_start) * scale)

    def keep(self, x: Tensor, scale: int) -> Tensor:
        """Cut what is kept out of what became of that which was read; a view."""
        return x.narrow(self.axis, (self.start - self.read_start) * scale, (self.stop - self.start) * scale)

    def place(self, x: Tensor, scale: int, *, axis: int | None = None) -> Tensor:
        """Where the kept part stands in the whole picture; a view. `axis` is the tensor's own, if it is another."""
        return x.narrow(self.axis if axis is None else axis, self.start * scale, (self.stop - self.start) * scale)


def cut_strips(rows: int, columns: int, num_tiles: int, halo: int) -> list[Strip]:
    """Cut a picture into strips that differ by one row or column at most.

    Args:
        rows: of the latents.
        columns: of the latents.
        num_tiles: strips, 1 to the longer side.
        halo: rows or columns to read beyond what is kept, where there are any.

    Raises:
        ValueError: num_tiles is not as above.
    """
    axis, size = (-1, columns) if columns >= rows else (-2, rows)
    if not 1 <= num_tiles <= size:
        raise ValueError(f"num_tiles: must be from 1 to {size}, the longer side of the latents, got {num_tiles}")
    edges = [size * index // num_tiles for index in range(num_tiles + 1)]
    return [Strip(axis, start, stop, max(start - halo, 0), min(stop + halo, size)) for start, stop in pairwise(edges)]


def most_tiles(rows: int, columns: int) -> int:
    """How many strips are worth cutting."""
    return max(max(rows, columns) // _SMALLEST, 1)


def decode_halo(config: VAEConfig) -> int:
    """Rows or columns of latents that the decoder's levels after the whole ones reach beyond a strip, rounded up."""
    reach = 1  # the last convolution, in pixels of the level that is being counted
    for _ in config.multipliers[WHOLE_LEVELS + 1 :]:
        reach += 2 * (config.num_res_blocks + 1)
        reach = math.ceil((reach + 1) / 2)  # the convolution after the doubling, and back to the level before
    reach += 2 * (config.num_res_blocks + 1)
    return math.ceil(reach / (1 << WHOLE_LEVELS))


def encode_halo(config: VAEConfig) -> int:
    """Likewise of the encoder's levels before the last; its strided convolutions reach to the right and down only."""
    reach = 0
    for _ in config.multipliers[:-1]:
        reach = 2 * reach + 1 + 2 * config.num_res_blocks
    return math.ceil((reach + 1) / (1 << (len(config.multipliers) - 1)))
