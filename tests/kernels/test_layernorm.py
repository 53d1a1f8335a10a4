import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from wanfast.kernels import layer_norm
from wanfast.kernels.layernorm import layer_norm_reference, layer_norm_triton

EPS = 1e-6
IMPLEMENTATIONS = pytest.mark.parametrize("run", [layer_norm_triton, layer_norm_reference], ids=["kernel", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def truth(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x.double() - x.double().mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
    return centred * rstd * weight.double() + bias.double()


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("shape", [(2, 5, 7), (4, 64), (3, 1000), (1, 3, 3072), (2, 2, 5120)], ids=str)
def test_layer_norm_equals_float64(run, dtype, shape, device):
    x = (3 * torch.randn(shape, device=device) + 1).to(dtype)
    weight, bias = torch.randn(2, shape[-1], device=device).to(dtype)
    y = run(x, weight, bias, eps=EPS)
    assert y.dtype == dtype
    assert_close(got=y, want=truth(x, weight, bias), op="layer_norm")


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_layer_norm_rounds_once_to_the_dtype_asked_for(run, dtype, out_dtype, device):
    x = torch.randn(3, 100, device=device).to(dtype)
    weight, bias = torch.randn(2, 100, device=device)
    y = run(x, weight, bias, eps=EPS, out_dtype=out_dtype)
    assert y.dtype == out_dtype
    assert_close(got=y, want=truth(x, weight, bias), op="layer_norm")


@IMPLEMENTATIONS
def test_layer_norm_survives_a_mean_far_above_the_deviation(run, device):
    x = 1000 + torch.randn(4, 1000, device=device)
    weight, bias = torch.ones(1000, device=device), torch.zeros(1000, device=device)
    y = run(x, weight, bias, eps=EPS, out_dtype=torch.float16)
    assert_close(got=y, want=truth(x, weight, bias), op="layer_norm")


@IMPLEMENTATIONS
def test_layer_norm_of_a_constant_row_is_the_bias(run, device):
    weight, bias = torch.randn(2, 48, device=device)
    y = run(torch.full((2, 48), 3.0, device=device), weight, bias, eps=EPS)
    assert_close(got=y, want=bias.expand(2, 48), op="layer_norm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(4, 8).t()}, "x: must be contiguous, got strides"),
        ({"x": torch.zeros(4, 8, dtype=torch.int64)}, "x: must be float32, bfloat16 or float16, got torch.int64"),
        ({"weight": torch.ones(7)}, r"weight: must be \[8\], x's channels, got \(7,\)"),
        ({"bias": torch.ones(4, 8)}, r"bias: must be \[8\], x's channels, got \(4, 8\)"),
        ({"bias": torch.ones(16)[::2]}, "bias: must be contiguous"),
        ({"bias": torch.ones(8, device="meta")}, "bias: must be on cpu, like x, got meta"),
        ({"out_dtype": torch.int8}, "out_dtype: must be float32, bfloat16 or float16, got torch.int8"),
    ],
)
def test_layer_norm_refuses(arguments, message):
    good = {"x": torch.zeros(4, 8), "weight": torch.ones(8), "bias": torch.zeros(8)}
    layer_norm(**good, eps=EPS)
    with pytest.raises(ValueError, match=message):
        layer_norm(**(good | arguments), eps=EPS)
