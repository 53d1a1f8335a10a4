from collections.abc import Iterator

import pytest
import torch
from eight_bit import Poisoned
from keys_8bit import assert_rounded, group_of

from wanfast.kernels import quantize_keys
from wanfast.kernels.quantize_keys import quantize_keys_reference, quantize_keys_triton, sampled_mean, sampled_tokens

IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [quantize_keys_triton, quantize_keys_reference], ids=["kernel", "reference"]
)


@pytest.fixture(autouse=True)
def fresh_int8_is_poisoned(monkeypatch: pytest.MonkeyPatch, fresh_memory_is_nan: None) -> Iterator[None]:
    memory = Poisoned(monkeypatch)
    yield
    memory.assert_whole()


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 64), (2, 64, 2, 128), (2, 65, 3, 64), (1, 191, 1, 128), (1, 3, 40, 128)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_group_is_rounded_by_its_own_scale(run, shape, dtype, device):
    tokens = torch.logspace(-1, 1, shape[1], device=device)[:, None, None]
    k = (tokens * torch.randn(shape, device=device) + 3).to(dtype)
    mean = torch.randn(shape[0], *shape[2:], device=device)
    assert_rounded(k.double() - mean.double()[:, None], run(k, mean))


@IMPLEMENTATIONS
def test_keys_may_be_part_of_a_packed_projection(run, device):
    k = torch.randn(2, 70, 3, 5, 64, device=device).bfloat16()[:, :, 1, ::2]
    mean = torch.randn(2, 3, 64, device=device)
    assert_rounded(k.double() - mean.double()[:, None], run(k, mean))


@IMPLEMENTATIONS
def test_keys_like_their_mean_become_zeros(run, device):
    k = torch.full((1, 70, 1, 64), 3.0, device=device)
    quantized = run(k, torch.full((1, 1, 64), 3.0, device=device))
    assert not quantized.values.any()
    assert (quantized.scale == 1).all()


@IMPLEMENTATIONS
def test_a_group_does_not_see_the_others(run, device):
    """What two of eight adjacent keys hold, and their like in the rest of the block, decides their scale alone."""
    k = torch.randn(1, 128, 1, 64, device=device)
    groups = group_of(torch.arange(128))
    k *= torch.tensor([1.0, 10.0, 100.0, 1000.0], device=device)[groups][None, :, None, None]
    got = run(k, torch.zeros(1, 1, 64, device=device))
    assert ((got.scale[..., 1:] / got.scale[..., :-1] - 10).abs() < 5).all()
    assert (got.values.flatten(2, 3)[0, 0].abs().amax(1) > 30).all()


def test_the_mean_is_that_of_all_tokens_or_near_it(device):
    k = torch.randn(1, 251, 1, 64, device=device).bfloat16() + 5
    torch.testing.assert_close(sampled_mean(k), k.double().mean(1).float(), rtol=1e-5, atol=1e-5)
    k = torch.randn(1, 8192, 1, 64, device=device).bfloat16() + 5
    deviation = 1 / 251**0.5
    assert ((sampled_mean(k) - k.double().mean(1)).abs() < 5 * deviation).all()
    assert ((sampled_mean(k) - k.double().mean(1)).abs() > deviation / 100).any()


@pytest.mark.parametrize(
    "grid", [(21, 30, 52), (21, 45, 80), (31, 22, 40), (16, 32, 64), (1, 40, 40), (8, 16, 16)], ids=str
)
def test_the_sampled_tokens_meet_every_frame_row_and_column_alike(grid):
    frames, height, width = grid
    sampled = sampled_tokens(frames * height * width, torch.device("cpu"))
    assert len(sampled) == 251 and sampled[0] == 0 and sampled[-1] < frames * height * width
    places = torch.stack((sampled // (height * width), sampled // width % height, sampled % width))
    for place, size in zip(places, grid, strict=True):
        counts = place.bincount(minlength=size)
        assert counts.max() - counts.min() <= 1


def test_rows_are_the_keys_in_the_order_of_tokens(device):
    k = torch.randn(2, 70, 3, 64, device=device)
    mean = torch.randn(2, 3, 64, device=device)
    values, scale = quantize_keys(k, mean=mean).rows
    assert scale.is_contiguous() and values.stride(-1) == 1
    error = (values.double() * scale.double()[..., None] - (k.double() - mean.double()[:, None])).abs()
    assert (error <= 0.50001 * scale[..., None]).all()


def test_without_a_mean_the_sampled_one_is_taken(device):
    k = torch.randn(1, 66, 2, 64, device=device).bfloat16()
    before = k.clone()
    got, want = quantize_keys(k), quantize_keys(k, mean=sampled_mean(k))
    assert torch.equal(got.values, want.values) and torch.equal(got.scale, want.scale)
    assert torch.equal(k, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": torch.zeros(2, 3, 4, 96)}, "k: head dimension must be 64 or 128, got 96"),
        ({"k": torch.zeros(2, 3, 4, 64).int()}, "k: must be float32, bfloat16 or float16, got torch.int32"),
        ({"mean": torch.zeros(2, 4, 128)}, r"mean: must be \(2, 4, 64\) for this k, got \(2, 4, 128\)"),
        ({"mean": torch.zeros(2, 4, 64).half()}, "mean: must be float32, got torch.float16"),
        ({"mean": torch.zeros(4, 2, 64).transpose(0, 1)}, "mean: must be contiguous, got strides"),
        ({"mean": torch.zeros(2, 4, 64, device="meta")}, "mean: must be on cpu, like k, got meta"),
    ],
)
def test_quantize_keys_refuses(arguments, message):
    good = {"k": torch.zeros(2, 3, 4, 64), "mean": torch.zeros(2, 4, 64)}
    quantize_keys(**good)
    with pytest.raises(ValueError, match=message):
        quantize_keys(**(good | arguments))
