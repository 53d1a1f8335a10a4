from collections.abc import Iterator

import pytest
import torch
from eight_bit import Poisoned
from keys_8bit import assert_rounded
from torch import Tensor

from wanfast.kernels import QuantizedKeys, quantize_keys, rms_norm_rope, rms_norm_rope_quantize_keys
from wanfast.kernels.quantize_keys import empty_keys
from wanfast.kernels.rms_norm_rope_quantize_keys import (
    rms_norm_rope_quantize_keys_reference,
    rms_norm_rope_quantize_keys_triton,
)
from wanfast.rope import rope_rotations

EPS = 1e-6
IMPLEMENTATIONS = pytest.mark.parametrize(
    "run",
    [rms_norm_rope_quantize_keys_triton, rms_norm_rope_quantize_keys_reference],
    ids=["kernel", "reference"],
)
DTYPES = pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
# Where fp32 noise meets the edge between two 16-bit numbers, or between two int8 ones, a rounding goes the other way.
OFF = 0.001


@pytest.fixture(autouse=True)
def fresh_int8_is_poisoned(monkeypatch: pytest.MonkeyPatch, fresh_memory_is_nan: None) -> Iterator[None]:
    memory = Poisoned(monkeypatch)
    yield
    memory.assert_whole()


def truth(x: Tensor, weight: Tensor, rotations: Tensor, mean: Tensor) -> Tensor:
    """Keys less their mean in float64, but for the rounding that Wan makes before the weight: [B, T, N, D]."""
    normalised = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    y = (normalised.to(x.dtype).double() * weight.double()).to(torch.promote_types(x.dtype, weight.dtype)).double()
    pairs = torch.view_as_complex(y.unflatten(-1, (-1, rotations.shape[-1], 2)))
    turned = torch.view_as_real(pairs * rotations[:, None].to(torch.complex128)).flatten(-2)
    return turned - mean.double()[:, None]


def setup(shape, head_dim, dtype, weight_dtype, device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, channels = shape
    x = (torch.logspace(-1, 1, tokens, device=device)[:, None] * torch.randn(shape, device=device)).to(dtype)
    x[..., ::16] += 4  # channels that all keys share
    weight = (1 + 0.3 * torch.randn(channels, device=device)).to(weight_dtype)
    rotations = rope_rotations((2, 3, -(-tokens // 6)), head_dim)[:tokens].clone().to(device)
    return x, weight, rotations, torch.randn(batch, channels // head_dim, head_dim, device=device)


def empty(x: Tensor, head_dim: int, tokens: int | None = None) -> QuantizedKeys:
    return empty_keys((x.shape[0], tokens or x.shape[1], x.shape[2] // head_dim, head_dim), x.device)


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize(
    ("shape", "head_dim"),
    [
        ((2, 3, 64), 64),
        ((1, 65, 128), 128),
        ((2, 7, 320), 64),
        ((1, 130, 768), 128),
        ((1, 66, 3072), 128),
        ((1, 12, 5120), 128),
    ],
    ids=str,
)
def test_every_group_is_rounded_by_its_own_scale(run, dtype, weight_dtype, shape, head_dim, device):
    x, weight, rotations, mean = setup(shape, head_dim, dtype, weight_dtype, device)
    got = run(x, weight, rotations, mean, empty(x, head_dim), eps=EPS, first_block=0)
    assert_rounded(truth(x, weight, rotations, mean), got, off=OFF)


@IMPLEMENTATIONS
def test_it_is_the_norm_the_rotation_and_the_rounding_in_turn(run, device):
    x, weight, rotations, mean = setup((2, 70, 640), 128, torch.float32, torch.float32, device)
    turned = rms_norm_rope(x, weight, rotations, eps=EPS)
    want = quantize_keys(turned, mean=mean)
    got = run(x, weight, rotations, mean, empty(x, 128), eps=EPS, first_block=0)
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-5, atol=0)
    assert (got.values != want.values).double().mean() < 1e-3
    assert (got.values.int() - want.values.int()).abs().max() <= 1


@IMPLEMENTATIONS
@pytest.mark.parametrize("tokens", [193, 192])
def test_runs_of_tokens_give_the_bits_of_all_at_once(run, tokens, device):
    """x is part of a projection to queries and keys; each run is written to its blocks and to no other."""
    both, weight, rotations, mean = setup((2, tokens, 2 * 512), 64, torch.bfloat16, torch.float32, device)
    x, weight, mean = both[..., 512:], weight[512:].clone(), mean[:, 8:].contiguous()
    whole = run(x.contiguous(), weight, rotations, mean, empty(x, 64), eps=EPS, first_block=0)
    parts = empty(x, 64)
    for start, stop in ((128, tokens), (0, 128)):
        run(x[:, start:stop], weight, rotations[start:stop], mean, parts, eps=EPS, first_block=start // 64)
        if start:
            assert parts.scale[:, :, :2].isnan().all() and (parts.values[:, :, :2] == -128).all()
    assert torch.equal(parts.values, whole.values)
    assert torch.equal(parts.scale, whole.scale)


@IMPLEMENTATIONS
def test_keys_like_their_mean_become_zeros(run, device):
    x = torch.full((1, 70, 256), 3.0, device=device)
    rotations = torch.ones(70, 32, dtype=torch.complex64, device=device)
    ones = torch.ones(256, device=device)
    rounded = rms_norm_rope(x, ones, rotations, eps=EPS)[:, 0].contiguous()
    got = run(x, ones, rotations, rounded, empty(x, 64), eps=EPS, first_block=0)
    assert not got.values.any()
    assert (got.scale == 1).all()


def test_fresh_keys_hold_the_tokens_and_nothing_else_is_written(device):
    x, weight, rotations, mean = setup((2, 67, 256), 64, torch.bfloat16, torch.float32, device)
    before = [tensor.clone() for tensor in (x, weight, rotations, mean)]
    got = rms_norm_rope_quantize_keys(x, weight, rotations, mean, eps=EPS)
    assert_rounded(truth(x, weight, rotations, mean), got, off=OFF)
    assert all(torch.equal(tensor, old) for tensor, old in zip((x, weight, rotations, mean), before, strict=True))
    first, out = 64, empty(x, 64, 131)
    assert rms_norm_rope_quantize_keys(x, weight, rotations, mean, eps=EPS, out=out, first_token=first) is out
    assert torch.equal(out.values[:, :, 1:], got.values) and torch.equal(out.scale[:, :, 1:], got.scale)


def _out(values=None, scale=None, tokens=128) -> QuantizedKeys:
    values = torch.zeros(2, 2, 2, 64, 64, dtype=torch.int8) if values is None else values
    return QuantizedKeys(values, torch.zeros(2, 2, 2, 4) if scale is None else scale, tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 64, 96)}, r"weight: must be \[96\], x's channels"),
        ({"rotations": torch.ones(64, 16, dtype=torch.complex64)}, "head dimension D must be 64 or 128, got 32"),
        ({"mean": torch.zeros(2, 4, 64)}, r"mean: must be \(2, 2, 64\) for this x, got \(2, 4, 64\)"),
        ({"mean": torch.zeros(2, 2, 64).half()}, "mean: must be float32, got torch.float16"),
        ({"out": _out(torch.zeros(2, 2, 1, 64, 64).char())}, r"out.values: must be \(2, 2, 2, 64, 64\), got"),
        ({"out": _out(torch.zeros(2, 2, 2, 64, 64))}, "out.values: must be torch.int8, got torch.float32"),
        ({"out": _out(scale=torch.zeros(2, 2, 2))}, r"out.scale: must be \(2, 2, 2, 4\), got \(2, 2, 2\)"),
        ({"out": _out(scale=torch.zeros(2, 2, 4, 2).mT)}, "out.scale: must be contiguous, got strides"),
        ({"out": _out(scale=torch.zeros(2, 2, 2, 4, device="meta"))}, "out.scale: must be on cpu, like x, got meta"),
        ({"first_token": 32}, "first_token: must be a multiple of 64, got 32"),
        ({"first_token": -64}, "first_token: must be a multiple of 64, got -64"),
        ({"first_token": 128}, "x: must end with out's tokens, 128, or before at a multiple of 64, got 192"),
        ({"out": _out(tokens=100), "first_token": 64}, "x: must end with out's tokens, 100, or before .*, got 128"),
        (
            {"x": torch.zeros(2, 63, 128), "rotations": torch.ones(63, 32, dtype=torch.complex64)},
            "x: must end with out's tokens, 128, or before at a multiple of 64, got 63",
        ),
    ],
)
def test_rms_norm_rope_quantize_keys_refuses(arguments, message):
    rotations = torch.ones(64, 32, dtype=torch.complex64)
    good = {"x": torch.zeros(2, 64, 128), "weight": torch.ones(128), "rotations": rotations}
    good |= {"mean": torch.zeros(2, 2, 64)}
    rms_norm_rope_quantize_keys(**good, eps=EPS, out=_out(), first_token=64)
    with pytest.raises(ValueError, match=message):
        rms_norm_rope_quantize_keys(**({"out": _out()} | good | arguments), eps=EPS)
