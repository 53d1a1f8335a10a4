import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from wanfast.kernels import rms_norm
from wanfast.kernels.rmsnorm import rms_norm_reference, rms_norm_triton

EPS = 1e-6
IMPLEMENTATIONS = pytest.mark.parametrize("run", [rms_norm_triton, rms_norm_reference], ids=["kernel", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def truth(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("shape", [(3, 1), (2, 5, 7), (4, 64), (3, 1000), (1, 3, 3072), (2, 2, 5120)], ids=str)
def test_rms_norm_equals_float64(run, dtype, shape, device):
    x = (3 * torch.randn(shape, device=device)).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype)
    y = run(x, weight, eps=EPS)
    assert y.dtype == dtype
    assert_close(got=y, want=truth(x, weight), op="rms_norm")


@IMPLEMENTATIONS
@HALVES
def test_rms_norm_rounds_to_the_input_dtype_before_an_fp32_weight(run, dtype, device):
    x = torch.randn(3, 1000, device=device).to(dtype)
    weight = torch.randn(1000, device=device)
    normalised = run(x, torch.ones_like(weight), eps=EPS)
    assert normalised.dtype == torch.float32
    assert torch.equal(normalised, normalised.to(dtype).float())
    assert_close(got=normalised.to(dtype), want=truth(x, torch.ones_like(weight)), op="rms_norm")
    assert torch.equal(run(x, weight, eps=EPS), normalised * weight)


@IMPLEMENTATIONS
def test_rms_norm_of_an_fp32_row_with_a_bfloat16_weight_is_fp32(run, device):
    x, weight = torch.randn(3, 100, device=device), torch.randn(100, device=device).bfloat16()
    y = run(x, weight, eps=EPS)
    assert y.dtype == torch.float32
    assert_close(got=y, want=truth(x, weight), op="rms_norm")


@IMPLEMENTATIONS
def test_rms_norm_adds_eps_to_the_mean_square(run, device):
    x, weight = torch.full((2, 48), 1e-3, device=device), torch.ones(48, device=device)
    assert_close(got=run(x, weight, eps=EPS), want=torch.full_like(x, 0.5**0.5), op="rms_norm")
    assert torch.equal(run(torch.zeros_like(x), weight, eps=EPS), torch.zeros_like(x))


def test_rms_norm_leaves_its_arguments_alone(device):
    x, weight = torch.randn(3, 40, device=device), torch.randn(40, device=device)
    before = x.clone(), weight.clone()
    rms_norm(x, weight, eps=EPS)
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(4, 8).t(), torch.ones(4), "x: must be contiguous, got strides"),
        (torch.zeros(4, 8, dtype=torch.float64), torch.ones(8), "x: must be float32, bfloat16 or float16, got"),
        (torch.zeros(()), torch.ones(()), r"x: must be \[..., C\], got \(\)"),
        (torch.zeros(4, 0), torch.ones(0), "x: must have 1 to 8192 channels, got 0"),
        (torch.zeros(1, 8193), torch.ones(8193), "x: must have 1 to 8192 channels, got 8193"),
        (torch.zeros(4, 8), torch.ones(7), r"weight: must be \[8\], x's channels, got \(7,\)"),
        (torch.zeros(4, 8), torch.ones(8, dtype=torch.int32), "weight: must be float32, bfloat16 or float16, got"),
        (torch.zeros(4, 8), torch.ones(16)[::2], r"weight: must be contiguous, got strides \(2,\)"),
        (torch.zeros(4, 8), torch.ones(8, device="meta"), "weight: must be on cpu, like x, got meta"),
    ],
)
def test_rms_norm_refuses(x, weight, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, eps=EPS)
