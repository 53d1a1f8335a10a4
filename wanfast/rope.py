"""3D rotary position embedding: which way each query and key is turned by its place in the patch grid.

A head's D channels are D / 2 pairs (x[2j], x[2j + 1]), each read as one complex number and multiplied by
exp(i * position * frequency). The first pairs turn with the frame, the next with the row, the last with the column:
22, 21 and 21 of the 64 pairs of a 128-channel head.

Source: Wan-Video/Wan2.2, wan/modules/model.py, rope_params and rope_apply.
"""

import torch
from torch import Tensor

THETA = 10_000.0


def split_pairs(head_dim: int) -> tuple[int, int, int]:
    """Give each axis its share of a head's channel pairs.

    Args:
        head_dim: channels of one head, even.

    Returns:
        Pairs that turn with the frame, the row and the column; they sum to head_dim / 2.
    """
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def axis_rotations(positions: int, pairs: int) -> Tensor:
    """Tabulate the rotations of one axis.

    Args:
        positions: places along the axis, counted from 0.
        pairs: channel pairs that turn with this axis; pair j has frequency 10000 ** (-j / pairs).

    Returns:
        [positions, pairs] complex64, cos + i sin of angles computed in float64.
    """
    frequencies = THETA ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.complex(angles.cos(), angles.sin()).to(torch.complex64)


def rope_rotations(grid: tuple[int, int, int], head_dim: int) -> Tensor:
    """Tabulate the rotations of every token of a patch grid.

    Args:
        grid: frames, rows and columns in patches.
        head_dim: channels of one head, even.

    Returns:
        [T, head_dim / 2] complex64 on the CPU, T = frames * rows * columns with the column running fastest.
        8 bytes per token and pair: 39 MB at 75,600 tokens and 128 channels.
    """
    pairs = split_pairs(head_dim)
    rotations = torch.empty(*grid, sum(pairs), dtype=torch.complex64)
    first = 0
    for axis, (positions, count) in enumerate(zip(grid, pairs, strict=True)):
        shape = [1, 1, 1, count]
        shape[axis] = positions
        rotations[..., first : first + count] = axis_rotations(positions, count).view(shape)
        first += count
    return rotations.flatten(0, 2)


def apply_rope(x: Tensor, rotations: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Turn every channel pair of queries or keys by its token's rotation, in fp32.

    Args:
        x: [B, T, N, D], D even and contiguous; any float dtype. Not written to.
        rotations: [T, D / 2] complex64, from `rope_rotations`.
        out: [B, T, N, D] of any float dtype that takes the result, rounded once.

    Returns:
        `out`, or [B, T, N, D] fp32.
    """
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    turned = torch.view_as_real(pairs * rotations[:, None]).flatten(-2)
    return turned if out is None else out.copy_(turned)
