"""The order of tokens in which a run of them is a compact piece of the video, as sparse attention wants its blocks.

The first latent frame, which stands for one picture where the others stand for several, comes first. It is cut into
strips of about 8 rows, the other frames into strips of about 4 frames by 4 rows; a strip is walked through column by
column, so that 64 tokens, as many as a block of keys has, are about 8 x 8 tokens of the first frame, or 4 x 4 x 4 of
the others. Strips follow each other in a snake: where a block holds the end of one, it goes on in its neighbour. Sides
that strips do not divide are cut as evenly as can be; nothing is padded.

Norms, projections and the text's attention do not see other tokens, and dense attention does not see their order: it is
changed once, before the patch embedding, and back once, after the head, with rotations to match.
Source: VSA (Zhang et al., 2025), whose blocks are cubes of 4 x 4 x 4 tokens.
"""

import torch
from torch import Tensor

_PICTURE = (1, 8)  # frames and rows of a strip
_VIDEO = (4, 4)


def token_order(grid: tuple[int, int, int]) -> Tensor:
    """Order the tokens of a patch grid by strips.

    Args:
        grid: frames, rows and columns in patches.

    Returns:
        [T] int64 on the CPU: which token of the grid, its column running fastest, stands in each place. The first
        frame's are the first rows * columns.
    """
    frames, rows, columns = grid
    first = _by_strips((1, rows, columns), _PICTURE)
    return torch.cat([first, len(first) + _by_strips((frames - 1, rows, columns), _VIDEO)])


def _by_strips(grid: tuple[int, int, int], sides: tuple[int, int]) -> Tensor:
    counts = [max(1, round(size / side)) for size, side in zip(grid, sides, strict=False)]
    frame, row = (torch.arange(size) * count // max(size, 1) for size, count in zip(grid, counts, strict=False))
    # Each odd layer of strips is gone through from its last row to its first, each odd strip against its columns.
    frame = frame[:, None]
    strip = frame * counts[1] + torch.where(frame % 2 == 1, counts[1] - 1 - row, row)
    strip, column = strip[..., None], torch.arange(grid[2])
    along = torch.where(strip % 2 == 1, grid[2] - 1 - column, column)
    return (strip * grid[2] + along).flatten().argsort(stable=True)
