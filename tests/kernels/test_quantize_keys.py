from collections.abc import Iterator

import pytest
import torch
from eight_bit import Poisoned

from wanfast.kernels import quantize_keys
from wanfast.kernels.quantize_keys import quantize_keys_reference, quantize_keys_triton, sampled_mean

IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [quantize_keys_triton, quantize_keys_reference], ids=["kernel", "reference"]
)
HALF = 0.50001  # a step, with fp32's roundings of the product


@pytest.fixture(autouse=True)
def fresh_int8_is_poisoned(monkeypatch: pytest.MonkeyPatch, fresh_memory_is_nan: None) -> Iterator[None]:
    memory = Poisoned(monkeypatch)
    yield
    memory.assert_whole()


def assert_rounded(k, mean, quantized):
    """Every block of 64 tokens of a head against float64, and zeros where there is no token."""
    batch, tokens, heads, dim = k.shape
    blocks = -(-tokens // 64)
    assert quantized.values.dtype == torch.int8 and quantized.values.is_contiguous()
    assert quantized.values.shape == (batch, heads, blocks, 64, dim)
    assert quantized.scale.shape == (batch, heads, blocks)
    assert quantized.tokens == tokens
    assert (quantized.values >= -127).all()
    centred = k.double() - mean.double()[:, None]
    for j in range(blocks):
        block = centred[:, j * 64 : (j + 1) * 64].transpose(1, 2)  # [B, N, at most 64, D]
        step = block.abs().amax((2, 3)) / 127
        torch.testing.assert_close(quantized.scale[:, :, j].double(), step, rtol=1e-5, atol=0)
        values = quantized.values[:, :, j].double()
        live = block.shape[2]
        assert not values[:, :, live:].any()
        assert ((values[:, :, :live] - block / step[..., None, None]).abs() <= HALF).all()


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 64), (2, 64, 2, 128), (2, 65, 3, 64), (1, 191, 1, 128), (1, 3, 40, 128)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_block_is_rounded_by_its_own_scale(run, shape, dtype, device):
    tokens = torch.logspace(-1, 1, shape[1], device=device)[:, None, None]
    k = (tokens * torch.randn(shape, device=device) + 3).to(dtype)
    mean = torch.randn(shape[0], *shape[2:], device=device)
    assert_rounded(k, mean, run(k, mean))


@IMPLEMENTATIONS
def test_keys_may_be_part_of_a_packed_projection(run, device):
    k = torch.randn(2, 70, 3, 5, 64, device=device).bfloat16()[:, :, 1, ::2]
    mean = torch.randn(2, 3, 64, device=device)
    assert_rounded(k, mean, run(k, mean))


@IMPLEMENTATIONS
def test_a_block_like_its_mean_becomes_zeros(run, device):
    k = torch.full((1, 70, 1, 64), 3.0, device=device)
    quantized = run(k, torch.full((1, 1, 64), 3.0, device=device))
    assert not quantized.values.any()
    assert (quantized.scale == 1).all()


def test_the_mean_is_that_of_all_tokens_or_near_it(device):
    k = torch.randn(1, 4095, 1, 64, device=device).bfloat16() + 5
    torch.testing.assert_close(sampled_mean(k), k.double().mean(1).float(), rtol=1e-5, atol=1e-5)
    k = torch.randn(1, 8192, 1, 64, device=device).bfloat16() + 5
    deviation = 1 / (8192 / 17) ** 0.5
    assert ((sampled_mean(k) - k.double().mean(1)).abs() < 5 * deviation).all()


@pytest.mark.parametrize("width", [52, 80, 40, 44, 22, 30, 45])  # of Wan's videos in tokens, and heights
def test_the_sampled_tokens_meet_every_column(width):
    columns = torch.arange(8190) % width
    k = columns.float()[None, :, None, None].expand(1, 8190, 1, 64)
    sampled = columns[::17]
    assert torch.equal(sampled.unique(), torch.arange(width))
    torch.testing.assert_close(sampled_mean(k), sampled.double().mean().float().expand(1, 1, 64))


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
