from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from eight_bit import (
    EIGHT_BIT,
    LARGEST,
    ON_CPU,
    OTHER_GENERATIONS,
    Poisoned,
    decibels,
    product,
    random_tokens,
    random_weight,
    run_as,
    wide,
)
from torch import Tensor

from wanfast.kernels import Quantized, QuantizedWeight, linear_8bit_gelu
from wanfast.kernels._quantized import dequantize_reference, quantize_reference
from wanfast.kernels.linear_8bit_gelu import linear_8bit_gelu_reference, linear_8bit_gelu_triton

# Far below zero GELU's exponential is infinite, as it should be; numpy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [linear_8bit_gelu_triton, linear_8bit_gelu_reference], ids=["kernel", "reference"]
)
ROTATED = pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])


@pytest.fixture(autouse=True)
def fresh_int8_is_poisoned(monkeypatch: pytest.MonkeyPatch, fresh_memory_is_nan: None) -> Iterator[None]:
    memory = Poisoned(monkeypatch)
    yield
    memory.assert_whole()


def truth(x: Quantized, weight: QuantizedWeight, bias: Tensor | None, low_rank=None) -> Tensor:
    """The hidden channels in float64."""
    return F.gelu(product(x, weight, bias, low_rank), approximate="tanh")


def assert_hidden(got: Quantized, want: Tensor, dtype: torch.dtype, rotated: bool) -> None:
    """Layout, every scale, and the noise of 8 bits and no more: as that of rounding the truth itself."""
    groups = want.shape[-1] // 128
    assert got.values.dtype == dtype
    assert got.values.shape == want.shape
    assert got.scale.shape == (*want.shape[:-1], groups)
    assert got.rotated == rotated
    best = quantize_reference(want.float(), dtype, groups=groups, rotated=rotated)
    assert torch.allclose(got.scale, best.scale, rtol=2e-3 if dtype == torch.int8 else 4e-3)
    assert bool((got.values.float().abs().unflatten(-1, (groups, 128)).amax(-1) == LARGEST[dtype]).all())
    hidden = wide(Quantized(got.values, got.scale, False)).unflatten(-1, (groups, 128))
    ideal = wide(Quantized(best.values, best.scale, False)).unflatten(-1, (groups, 128))
    step = best.scale.double()[..., None] * (1 if dtype == torch.int8 else 2)
    assert bool(((hidden - ideal).abs() <= 1.3 * step).all())  # a scale may differ too, by 127 times its error
    assert decibels(want, dequantize_reference(got)) > decibels(want, dequantize_reference(best)) - 0.3


@IMPLEMENTATIONS
@EIGHT_BIT
@ROTATED
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "groups"), [(1, 128, 128, 1), (131, 384, 256, 2), (3, 256, 5120, 1)], ids=str
)
def test_hidden_channels_are_those_of_float64(run, dtype, rotated, tokens, outputs, inputs, groups, device):
    x = random_tokens((tokens, inputs), dtype, device, groups=groups)
    weight, bias = random_weight(outputs, inputs, dtype, device), torch.randn(outputs, device=device)
    assert_hidden(run(x, weight, bias, rotated=rotated), truth(x, weight, bias), dtype, rotated)


@ON_CPU
@OTHER_GENERATIONS
@EIGHT_BIT
@ROTATED
def test_the_tiles_of_other_generations_give_the_same(arch, dtype, rotated, device, monkeypatch):
    run_as(arch, monkeypatch)
    x = random_tokens((131, 256), dtype, device, groups=2)
    weight, bias = random_weight(256, 256, dtype, device), torch.randn(256, device=device)
    got = linear_8bit_gelu_triton(x, weight, bias, rotated=rotated)
    assert_hidden(got, truth(x, weight, bias), dtype, rotated)


@IMPLEMENTATIONS
@EIGHT_BIT
def test_low_rank_terms_enter_before_gelu(run, dtype, device):
    x, weight = random_tokens((2, 3, 128), dtype, device), random_weight(256, 128, dtype, device)
    low_rank = torch.randn(2, 3, 24, device=device).half() * 5, torch.randn(256, 24, device=device).half()
    got = run(x, weight, None, rotated=False, low_rank=low_rank)
    assert_hidden(got, truth(x, weight, None, low_rank), dtype, False)


@IMPLEMENTATIONS
def test_gelu_is_the_tanh_form_from_end_to_end(run, device):
    """One channel of each 128 runs from -30 to 30 while another holds the scale, and extremes stay finite."""
    points = torch.cat((torch.linspace(-6, 6, 60), torch.tensor([-1e30, -1e4, -30.0, 30.0])))
    bias = torch.zeros(2, 64, 128)
    bias[:, :, 1] = points  # one point in each run of 128 channels
    bias[0, :, 0] = points.abs().clamp_min(2)  # its scale
    bias = bias[0].flatten().to(device)
    x = Quantized(torch.zeros(1, 128, dtype=torch.int8, device=device), torch.ones(1, 1, device=device), False)
    weight = QuantizedWeight(
        torch.zeros(8192, 128, dtype=torch.int8, device=device), torch.ones(8192).to(device), False
    )
    got = run(x, weight, bias, rotated=False)
    want = F.gelu(bias.double(), approximate="tanh").view(64, 128)
    erf = F.gelu(bias.double()).view(64, 128)
    error = (wide(got).view(64, 128) - want).abs() / got.scale.view(64, 1)
    assert bool((error <= 0.501).all())
    assert got.values.view(64, 128)[-4:, 1].tolist()[:3] == [0, 0, 0]
    assert (want - erf).abs().max() > 1e-4  # so that the two forms are told apart at all


@IMPLEMENTATIONS
def test_tokens_past_the_last_are_not_written(run, device):
    x, weight = random_tokens((130, 128), torch.int8, device), random_weight(128, 128, torch.int8, device)
    whole = run(x, weight, None, rotated=True)
    part = run(Quantized(x.values[:3], x.scale[:3], False), weight, None, rotated=True)
    assert torch.equal(part.values, whole.values[:3])
    assert torch.equal(part.scale, whole.scale[:3])


@IMPLEMENTATIONS
def test_no_tokens_are_no_tokens(run, device):
    got = run(
        random_tokens((0, 128), torch.int8, device), random_weight(256, 128, torch.int8, device), None, rotated=True
    )
    assert got.values.shape == (0, 256)
    assert got.scale.shape == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"weight": random_weight(100, 128, torch.int8, torch.device("cpu")), "bias": None},
            "weight: outputs must be a multiple of 128, got 100",
        ),
        ({"bias": torch.zeros(100)}, r"bias: must be \[128\], got \(100,\)"),
        ({"weight": random_weight(128, 128, torch.int8, torch.device("cpu"), rotated=True)}, "weight.rotated: must be"),
    ],
)
def test_linear_8bit_gelu_refuses(arguments, message):
    cpu = torch.device("cpu")
    good = {"x": random_tokens((3, 128), torch.int8, cpu), "weight": random_weight(128, 128, torch.int8, cpu)}
    good |= {"bias": torch.zeros(128), "rotated": False}
    linear_8bit_gelu(**good)
    with pytest.raises(ValueError, match=message):
        linear_8bit_gelu(**(good | arguments))
