"""Rotary embedding against its definition in complex128 and diffusers' tables."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from wanfast.rope import apply_rope, axis_rotations, rope_rotations, split_pairs


@pytest.mark.parametrize(
    ("head_dim", "pairs"), [(128, (22, 21, 21)), (24, (4, 4, 4)), (64, (12, 10, 10)), (4, (2, 0, 0))]
)
def test_split_pairs(head_dim: int, pairs: tuple[int, int, int]) -> None:
    assert split_pairs(head_dim) == pairs


@pytest.mark.parametrize(
    ("pairs", "want"),
    [
        (22, [1, 0.657933225, 0.432876128, 0.284803587, 0.187381742]),
        (21, [1, 0.644946677, 0.415956216, 0.26826958, 0.173019574]),
    ],
)
def test_angles_at_position_1_are_those_of_the_official_code(pairs: int, want: list[float]) -> None:
    angles = axis_rotations(2, pairs).angle()
    assert angles.shape == (2, pairs)
    assert angles[0].eq(0).all()
    torch.testing.assert_close(angles[1, :5], torch.tensor(want, dtype=torch.float32), rtol=3e-7, atol=0)


def test_far_positions_keep_fp32_accuracy() -> None:
    angles = 1023 * 10_000.0 ** (-torch.arange(22, dtype=torch.float64) / 22)
    want = torch.polar(torch.ones_like(angles), angles)
    assert (axis_rotations(1024, 22)[1023] - want).abs().max() < 1e-7


@pytest.mark.parametrize("grid", [(3, 4, 6), (1, 1, 1), (5, 2, 9)])
@pytest.mark.parametrize("head_dim", [128, 24])
def test_rope_rotations_are_those_of_diffusers(grid: tuple[int, int, int], head_dim: int) -> None:
    frames, rows, columns = grid
    rope = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)
    cos, sin = rope(torch.empty(1, 16, frames, 2 * rows, 2 * columns))
    want = torch.complex(cos[0, :, 0, ::2].float(), sin[0, :, 0, ::2].float())
    got = rope_rotations(grid, head_dim)
    assert got.dtype == torch.complex64
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


def _definition(x: Tensor, rotations: Tensor) -> Tensor:
    cos, sin = rotations.real.double()[:, None], rotations.imag.double()[:, None]
    even, odd = x.double()[..., ::2], x.double()[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_rope_turns_interleaved_pairs_in_fp32(dtype: torch.dtype) -> None:
    x = torch.randn(2, 24, 3, 128).to(dtype)
    before = x.clone()
    rotations = rope_rotations((2, 3, 4), 128)
    got = apply_rope(x, rotations)
    want = _definition(x, rotations)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert (got - want).abs().max() < 1e-6
    assert torch.equal(x, before)


def test_apply_rope_keeps_lengths_and_relative_angles() -> None:
    rotations = rope_rotations((1, 1, 9), 128)
    q, k = torch.randn(1, 1, 1, 128).expand(1, 9, 1, 128), torch.randn(1, 1, 1, 128).expand(1, 9, 1, 128)
    turned_q, turned_k = apply_rope(q, rotations), apply_rope(k, rotations)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    scores = turned_q[0, :, 0] @ turned_k[0, :, 0].T
    for distance in range(9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
