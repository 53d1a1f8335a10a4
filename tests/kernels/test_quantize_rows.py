from collections.abc import Iterator

import pytest
import torch
from eight_bit import EIGHT_BIT, LARGEST, POISON, Poisoned, decibels
from torch import Tensor

from wanfast.kernels import Quantized, fit_weight, quantize_rows, quantize_weight
from wanfast.kernels._quantized import (
    LARGEST_WEIGHT,
    check_8bit_dtype,
    dequantize_reference,
    hadamard128,
    quantize_reference,
)
from wanfast.kernels.quantize_rows import quantize_rows_triton

IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [quantize_rows_triton, quantize_reference], ids=["kernel", "reference"]
)
ROTATED = pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
# Half a step, with the fp32 roundings of the product. int8 steps by the scale, e4m3 by 1 / 8 of the power of two below.
HALF = 0.50001


@pytest.fixture(autouse=True)
def fresh_int8_is_poisoned(monkeypatch: pytest.MonkeyPatch, fresh_memory_is_nan: None) -> Iterator[None]:
    memory = Poisoned(monkeypatch)
    yield
    memory.assert_whole()


def matrix() -> Tensor:
    """The Hadamard matrix from its closed form, float64."""
    i = torch.arange(128)
    bits = (i[:, None] & i[None, :])[..., None] >> torch.arange(7) & 1
    return (1.0 - 2.0 * (bits.sum(-1) % 2)).double() / 128**0.5


def truth(x: Tensor, groups: int, rotated: bool) -> tuple[Tensor, Tensor]:
    """Channels before rounding [M, G, C / G], and the largest magnitude of each group [M, G, 1], float64."""
    wide = x.double().cpu().flatten(0, -2)
    if rotated:
        wide = (wide.unflatten(-1, (-1, 128)) @ matrix()).flatten(-2)
    wide = wide.unflatten(-1, (groups, -1))
    return wide, wide.abs().amax(-1, keepdim=True)


def steps(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of adjacent numbers of the dtype at each of `values`, in units of the scale."""
    if dtype == torch.int8:
        return torch.ones_like(values)
    return torch.maximum(2.0 ** values.abs().clamp_min(2.0**-6).log2().floor(), torch.tensor(2.0**-6)) / 8


def assert_quantized(got: Quantized, x: Tensor, dtype: torch.dtype, groups: int, rotated: bool) -> None:
    """Every number is the one nearest to its channel; a rotation may add bf16's rounding of the channels."""
    assert got.values.dtype == dtype
    assert got.values.shape == x.shape
    assert got.scale.shape == (*x.shape[:-1], groups)
    assert got.rotated == rotated
    want, largest = truth(x, groups, rotated)
    scale = got.scale.double().cpu().reshape(*want.shape[:-1], 1)
    values = got.values.double().cpu().reshape(want.shape)
    slack = want.square().mean(-1, keepdim=True).sqrt() * 2**-7 if rotated else torch.zeros(())
    assert bool((scale * LARGEST[dtype] - largest).abs().le(1e-6 * largest + slack).all())
    error = (values * scale - want).abs()
    limit = HALF * steps(values.abs().maximum(want.abs() / scale), dtype) * scale + slack
    assert bool((error <= limit).all()), f"{int((error > limit).sum())} of {error.numel()} are not the nearest"
    if dtype == torch.int8:
        assert values.min() > POISON


@IMPLEMENTATIONS
@EIGHT_BIT
@ROTATED
@pytest.mark.parametrize("grouped", [False, True], ids=["token", "group"])
@pytest.mark.parametrize("channels", [128, 384, 3072, 5120])
def test_every_number_is_the_nearest(run, dtype, rotated, grouped, channels, device):
    x = torch.randn(3, channels, device=device) * torch.tensor([[1e-3], [1.0], [300.0]], device=device)
    groups = channels // 128 if grouped else 1
    assert_quantized(run(x, dtype, groups=groups, rotated=rotated), x, dtype, groups, rotated)


@IMPLEMENTATIONS
@EIGHT_BIT
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tokens_of_any_shape_and_float_dtype(run, dtype, x_dtype, device):
    x = torch.randn(2, 3, 256, device=device).to(x_dtype)
    assert_quantized(run(x, dtype, rotated=True), x, dtype, 1, True)
    x = torch.randn(13824, device=device).to(x_dtype)
    assert_quantized(run(x[None], dtype, groups=108), x[None], dtype, 108, False)


@IMPLEMENTATIONS
@EIGHT_BIT
@ROTATED
@pytest.mark.parametrize("groups", [1, 2])
def test_zeros_and_numbers_too_small_to_scale_become_zeros(run, dtype, rotated, groups, device):
    x = torch.randn(4, 256, device=device)
    x[0] = 0
    x[1] = 1e-38
    x[2] *= 1e30
    got = run(x, dtype, groups=groups, rotated=rotated)
    assert bool((got.scale[:2] == 1).all())
    assert bool((got.values[:2].float() == 0).all())
    assert bool(got.scale.isfinite().all())
    assert decibels(x[2:].cpu(), dequantize_reference(got).cpu()[2:]) > 28


@IMPLEMENTATIONS
def test_ties_go_to_even_and_no_number_is_minus_128(run, device):
    x = torch.zeros(1, 128, device=device)
    x[0, :8] = torch.tensor([-127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    got = run(x, torch.int8)
    assert got.values[0, :8].tolist() == [-127, 0, 2, 2, 0, -2, -2, 126]


@IMPLEMENTATIONS
def test_a_group_does_not_see_another(run, device):
    x = torch.randn(1, 384, device=device)
    alone = run(x, torch.int8, groups=3, rotated=True)
    x[:, 128:256] *= 1000
    beside = run(x, torch.int8, groups=3, rotated=True)
    for part in (slice(0, 128), slice(256, 384)):
        assert torch.equal(alone.values[:, part], beside.values[:, part])


def test_the_matrix_is_hadamards():
    assert torch.allclose(hadamard128().double(), matrix(), rtol=1e-7, atol=0)
    assert torch.allclose(matrix() @ matrix(), torch.eye(128).double(), atol=1e-12)


def test_one_outlier_is_spread_over_128_channels():
    x = torch.zeros(1, 256)
    x[0, 5] = 80.0
    got = quantize_rows(x, torch.int8, rotated=True)
    assert bool((got.values[0, :128].abs() == 127).all())
    assert bool((got.values[0, 128:] == 0).all())
    assert torch.allclose(dequantize_reference(got), x, atol=1e-4)


@EIGHT_BIT
@pytest.mark.parametrize("rotated", [False, True])
def test_a_weights_rows_are_the_nearest_numbers(dtype, rotated):
    weight = torch.randn(7, 256)
    got = quantize_weight(weight, dtype, rotated=rotated)
    assert got.scale.shape == (7,)
    assert got.values.float().abs().amax(1).tolist() == [LARGEST_WEIGHT[dtype]] * 7
    rows = Quantized(got.values, got.scale[:, None], rotated)
    assert decibels(weight, dequantize_reference(rows)) > (38 if dtype == torch.int8 else 30)


def test_weights_of_files_are_taken_over():
    int8 = torch.randint(-127, 128, (4, 6), dtype=torch.int8)
    kept = fit_weight(int8, torch.tensor(0.5))
    assert kept.values is int8
    assert kept.scale.tolist() == [0.5] * 4

    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    every = every[~every.float().isnan()].reshape(2, 127)
    got = fit_weight(every, torch.tensor([[1.0], [3.0]]))
    assert got.values.float().abs().max() == 28
    want = every.double() * torch.tensor([[1.0], [3.0]]).double()
    back = got.values.double() * got.scale.double()[:, None]
    exact = every.double().abs() >= 0.25
    assert torch.equal(back[exact], want[exact])
    assert bool(((back - want).abs() <= 2.0**-6 * torch.tensor([[1.0], [3.0]])).all())


def test_fp16_sums_of_128_products_cannot_overflow():
    largest = LARGEST[torch.float8_e4m3fn] * LARGEST_WEIGHT[torch.float8_e4m3fn] * 128
    half_a_step = 16.0  # of fp16 numbers from 32,768 up
    assert largest + 128 * half_a_step <= torch.finfo(torch.float16).max


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(256, 2).T}, "x: must be contiguous, got strides"),
        ({"x": torch.zeros(2, 16512)}, "x: must have 1 to 16384 channels, got 16512"),
        ({"x": torch.zeros(2, 256).double()}, "x: must be float32, bfloat16 or float16, got torch.float64"),
        ({"dtype": torch.uint8}, "dtype: must be int8 or float8_e4m3fn, got torch.uint8"),
        ({"groups": 3}, "groups: must be 1 or 2 for 256 channels, got 3"),
        ({"x": torch.zeros(2, 100), "groups": 2}, "groups: must be 1 for 100 channels, got 2"),
        ({"x": torch.zeros(2, 100), "rotated": True}, "x: rotated channels must be a multiple of 128, got 100"),
    ],
)
def test_quantize_rows_refuses(arguments, message):
    good = {"x": torch.zeros(2, 256), "dtype": torch.int8}
    quantize_rows(**good)
    with pytest.raises(ValueError, match=message):
        quantize_rows(**(good | arguments))


def test_e4m3_is_refused_on_gpus_that_lack_it(monkeypatch):
    capability = (8, 9)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    check_8bit_dtype(torch.float8_e4m3fn, "dtype", torch.device("cuda"))
    capability = (8, 6)
    check_8bit_dtype(torch.int8, "dtype", torch.device("cuda"))
    with pytest.raises(ValueError, match=r"dtype: must be int8 before compute capability 8.9, got \(8, 6\)"):
        check_8bit_dtype(torch.float8_e4m3fn, "dtype", torch.device("cuda"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.zeros(4)}, r"weight: must be \[N, K\], not empty, got \(4,\)"),
        (
            {"weight": torch.zeros(4, 100), "rotated": True},
            "weight: rotated channels must be a multiple of 128, got 100",
        ),
        (
            {"weight": torch.zeros(4, 128).to(torch.int8)},
            "weight: must be float32, bfloat16 or float16, got torch.int8",
        ),
        ({"dtype": torch.float16}, "dtype: must be int8 or float8_e4m3fn, got torch.float16"),
    ],
)
def test_quantize_weight_refuses(arguments, message):
    good = {"weight": torch.zeros(4, 128), "dtype": torch.int8, "rotated": False}
    quantize_weight(**good)
    with pytest.raises(ValueError, match=message):
        quantize_weight(**(good | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": torch.zeros(4, 128)}, "values: must be int8 or float8_e4m3fn, got torch.float32"),
        ({"values": torch.zeros(8, dtype=torch.int8)}, r"values: must be \[N, K\], not empty"),
        ({"values": torch.zeros(128, 4, dtype=torch.int8).T}, "values: must be contiguous, got strides"),
        ({"scale": torch.ones(4)}, r"scale: must be \[\] or \[4, 1\] for values \[4, 128\], got \(4,\)"),
        ({"scale": torch.ones(4, 1).half()}, "scale: must be float32, got torch.float16"),
    ],
)
def test_fit_weight_refuses(arguments, message):
    good = {"values": torch.zeros(4, 128, dtype=torch.int8), "scale": torch.ones(4, 1)}
    fit_weight(**good)
    with pytest.raises(ValueError, match=message):
        fit_weight(**(good | arguments))
