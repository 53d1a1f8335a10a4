"""Rows of modulation: one per sample, or two where the first tokens of a sample have a timestep of their own."""

from torch import Tensor


def split_tokens(tokens: Tensor, rows: int, first_tokens: int) -> list[Tensor]:
    """Cut tokens into runs that share a row of modulation.

    Args:
        tokens: [..., T, C].
        rows: of modulation, 1 or 2.
        first_tokens: tokens that take row 0; of no effect where rows is 1.

    Returns:
        One view of `tokens` per row, in order; one of two may be empty.
    """
    return [tokens] if rows == 1 else [tokens[..., :first_tokens, :], tokens[..., first_tokens:, :]]


def row_strides(modulation: Tensor) -> tuple[int, int]:
    """Strides of [B, R, C] modulation from one sample to the next, and from row 0 to the last row: 0 where R is 1."""
    return modulation.stride(0), modulation.stride(1) if modulation.shape[1] == 2 else 0
