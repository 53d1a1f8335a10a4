import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from wanfast.kernels import layer_norm_modulate
from wanfast.kernels.modulate import layer_norm_modulate_reference, layer_norm_modulate_triton

EPS = 1e-6
IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [layer_norm_modulate_triton, layer_norm_modulate_reference], ids=["kernel", "reference"]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def truth(x: Tensor, scale: Tensor, shift: Tensor, first_tokens: int = 0) -> Tensor:
    centred = x.double() - x.double().mean(-1, keepdim=True)
    normalised = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
    late = (torch.arange(x.shape[1], device=x.device) >= first_tokens).long()
    row = late.clamp_max(scale.shape[1] - 1)
    return normalised * (1 + scale.double()[:, row]) + shift.double()[:, row]


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 4, 64), (3, 1, 1000), (1, 3, 3072), (2, 2, 5120)], ids=str)
def test_one_row_per_sample_equals_float64(run, dtype, shape, device):
    batch, _, channels = shape
    x = (3 * torch.randn(shape, device=device) + 1).to(dtype)
    scale, shift = torch.randn(2, batch, 1, channels, device=device)
    y = run(x, scale, shift, eps=EPS)
    assert y.dtype == dtype
    assert_close(got=y, want=truth(x, scale, shift), op="layer_norm_modulate")


@IMPLEMENTATIONS
@pytest.mark.parametrize("first_tokens", [0, 1, 4, 7])
def test_the_first_tokens_take_a_row_of_their_own(run, first_tokens, device):
    x = torch.randn(2, 7, 100, device=device)
    scale, shift = torch.randn(2, 2, 2, 100, device=device)
    y = run(x, scale, shift, eps=EPS, first_tokens=first_tokens)
    assert_close(got=y, want=truth(x, scale, shift, first_tokens), op="layer_norm_modulate")


@IMPLEMENTATIONS
def test_first_tokens_have_no_effect_on_one_row(run, device):
    x = torch.randn(2, 7, 100, device=device)
    scale, shift = torch.randn(2, 2, 1, 100, device=device)
    assert torch.equal(run(x, scale, shift, eps=EPS, first_tokens=3), run(x, scale, shift, eps=EPS))


@IMPLEMENTATIONS
def test_modulation_may_be_a_slice_or_an_expanded_batch(run, device):
    x = torch.randn(2, 5, 96, device=device)
    six = torch.randn(2, 2, 6, 96, device=device)
    scale, shift = six[:, :, 1], six[:1, :, 4].expand(2, 2, 96)
    y = run(x, scale, shift, eps=EPS, first_tokens=2)
    assert_close(got=y, want=truth(x, scale, shift, 2), op="layer_norm_modulate")


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_result_is_rounded_once_to_the_dtype_asked_for(run, dtype, out_dtype, device):
    x = torch.randn(1, 3, 100, device=device).to(dtype)
    scale, shift = torch.randn(2, 1, 1, 100, device=device)
    y = run(x, scale, shift, eps=EPS, out_dtype=out_dtype)
    assert y.dtype == out_dtype
    assert_close(got=y, want=truth(x, scale, shift), op="layer_norm_modulate")


@IMPLEMENTATIONS
def test_modulation_may_be_bfloat16(run, device):
    x = torch.randn(1, 3, 100, device=device)
    scale, shift = torch.randn(2, 1, 1, 100, device=device).bfloat16()
    assert_close(got=run(x, scale, shift, eps=EPS), want=truth(x, scale, shift), op="layer_norm_modulate")


@IMPLEMENTATIONS
def test_a_mean_far_above_the_deviation_survives(run, device):
    x = 1000 + torch.randn(1, 4, 1000, device=device)
    scale, shift = torch.zeros(2, 1, 1, 1000, device=device)
    y = run(x, scale, shift, eps=EPS, out_dtype=torch.float16)
    assert_close(got=y, want=truth(x, scale, shift), op="layer_norm_modulate")


def test_arguments_are_left_alone(device):
    x, scale, shift = torch.randn(1, 3, 40, device=device), *torch.randn(2, 1, 2, 40, device=device)
    before = [tensor.clone() for tensor in (x, scale, shift)]
    layer_norm_modulate(x, scale, shift, eps=EPS, first_tokens=1)
    assert all(torch.equal(tensor, old) for tensor, old in zip((x, scale, shift), before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 8, 5).transpose(1, 2)}, "x: must be contiguous, got strides"),
        ({"x": torch.zeros(10, 8)}, r"x: must be \[B, T, C\], got \(10, 8\)"),
        (
            {"scale": torch.zeros(2, 3, 8)},
            r"scale: must be \[2, 1 or 2, 8\] for x of shape \(2, 5, 8\), got \(2, 3, 8\)",
        ),
        ({"scale": torch.zeros(2, 1, 8)}, r"shift: must have scale's shape \(2, 1, 8\), got \(2, 2, 8\)"),
        ({"shift": torch.zeros(1, 2, 8)}, r"shift: must be \[2, 1 or 2, 8\]"),
        ({"shift": torch.zeros(2, 2, 16)[..., ::2]}, "shift: channels must be adjacent in memory, got strides"),
        ({"shift": torch.zeros(2, 2, 8).double()}, "shift: must be float32, bfloat16 or float16, got torch.float64"),
        ({"shift": torch.zeros(2, 2, 8, device="meta")}, "shift: must be on cpu, like x, got meta"),
        ({"first_tokens": 6}, "first_tokens: must be 0 to 5, the tokens of x, got 6"),
        ({"first_tokens": -1}, "first_tokens: must be 0 to 5, the tokens of x, got -1"),
        ({"out_dtype": torch.float64}, "out_dtype: must be float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_layer_norm_modulate_refuses(arguments, message):
    good = {"x": torch.zeros(2, 5, 8), "scale": torch.zeros(2, 2, 8), "shift": torch.zeros(2, 2, 8)}
    layer_norm_modulate(**good, eps=EPS)
    with pytest.raises(ValueError, match=message):
        layer_norm_modulate(**(good | arguments), eps=EPS)
