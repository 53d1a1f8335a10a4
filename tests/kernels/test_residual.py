import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from wanfast.kernels import gated_residual
from wanfast.kernels.residual import gated_residual_reference, gated_residual_triton

IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [gated_residual_triton, gated_residual_reference], ids=["kernel", "reference"]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def truth(x: Tensor, y: Tensor, gate: Tensor, first_tokens: int = 0) -> Tensor:
    late = (torch.arange(x.shape[1], device=x.device) >= first_tokens).long()
    return x.double() + gate.double()[:, late.clamp_max(gate.shape[1] - 1)] * y.double()


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 4, 64), (3, 1, 1000), (1, 3, 3072), (2, 2, 5120)], ids=str)
def test_one_row_per_sample_equals_float64(run, dtype, y_dtype, shape, device):
    batch, _, channels = shape
    x, y = torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(y_dtype)
    gate = torch.randn(batch, 1, channels, device=device)
    out = run(x, y, gate)
    assert out.dtype == dtype
    assert_close(got=out, want=truth(x, y, gate), op="gated_residual")


@IMPLEMENTATIONS
@pytest.mark.parametrize("first_tokens", [0, 1, 4, 7])
def test_the_first_tokens_take_a_row_of_their_own(run, first_tokens, device):
    x, y = torch.randn(2, 2, 7, 100, device=device)
    gate = torch.randn(2, 2, 6, 100, device=device)[:, :, 5]
    out = run(x, y, gate, first_tokens=first_tokens)
    assert_close(got=out, want=truth(x, y, gate, first_tokens), op="gated_residual")


@IMPLEMENTATIONS
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_arguments_are_left_alone(run, y_dtype, device):
    x, y = torch.randn(2, 1, 3, 40, device=device)
    y, gate = y.to(y_dtype), torch.randn(1, 2, 40, device=device)
    before = [tensor.clone() for tensor in (x, y, gate)]
    run(x, y, gate, first_tokens=1)
    assert all(torch.equal(tensor, old) for tensor, old in zip((x, y, gate), before, strict=True))


@IMPLEMENTATIONS
@DTYPES
def test_the_result_may_take_the_place_of_x(run, dtype, device):
    x, y = torch.randn(2, 1, 7, 100, device=device)
    x, gate = x.to(dtype), torch.randn(1, 2, 100, device=device)
    want, y_before = run(x.clone(), y, gate, first_tokens=1), y.clone()
    got = run(x, y, gate, first_tokens=1, overwrite=True)
    assert got.data_ptr() == x.data_ptr()
    assert torch.equal(x, want)
    assert torch.equal(y, y_before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 8, 5).transpose(1, 2)}, "x: must be contiguous, got strides"),
        ({"y": torch.zeros(2, 8, 5).transpose(1, 2)}, "y: must be contiguous, got strides"),
        ({"y": torch.zeros(2, 4, 8)}, r"y: must have x's shape \(2, 5, 8\), got \(2, 4, 8\)"),
        ({"y": torch.zeros(2, 5, 8, device="meta")}, "y: must be on cpu, like x, got meta"),
        ({"gate": torch.zeros(2, 5, 8)}, r"gate: must be \[2, 1 or 2, 8\] for x of shape \(2, 5, 8\), got \(2, 5, 8\)"),
        ({"first_tokens": 6}, "first_tokens: must be 0 to 5, the tokens of x, got 6"),
    ],
)
def test_gated_residual_refuses(arguments, message):
    good = {"x": torch.zeros(2, 5, 8), "y": torch.zeros(2, 5, 8), "gate": torch.zeros(2, 2, 8)}
    gated_residual(**good)
    with pytest.raises(ValueError, match=message):
        gated_residual(**(good | arguments))
