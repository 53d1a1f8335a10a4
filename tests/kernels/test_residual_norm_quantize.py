import pytest
import torch
from norm_truth import EPS, added, assert_is_quantized, weighted_norm
from tolerance import assert_close

from wanfast.kernels import residual_layer_norm_modulate_quantize, residual_layer_norm_quantize
from wanfast.kernels._row_norm import RowNorm
from wanfast.kernels.layer_norm_quantize import layer_norm_quantize_reference, layer_norm_quantize_triton
from wanfast.kernels.layer_norm_rotate import layer_norm_rotate_triton


def kernel(norm, dtype, *, rotated):
    return layer_norm_rotate_triton(norm, dtype) if rotated else layer_norm_quantize_triton(norm, dtype)


IMPLEMENTATIONS = pytest.mark.parametrize("run", [kernel, layer_norm_quantize_reference], ids=["kernel", "reference"])
DTYPES = pytest.mark.parametrize(
    ("dtype", "eight_bit"),
    [(torch.float32, torch.int8), (torch.float32, torch.float8_e4m3fn), (torch.bfloat16, torch.int8)],
    ids=str,
)
ROTATED = pytest.mark.parametrize("rotated", [False, True], ids=["as it is", "rotated"])


def check(run, norm: RowNorm, eight_bit: torch.dtype, *, rotated: bool) -> None:
    want = added(norm.x, norm.y, norm.gate, norm.first_tokens)
    others = [tensor for tensor in (norm.y, norm.gate, norm.scale, norm.shift) if tensor is not None]
    before = [tensor.clone() for tensor in others]
    got = run(norm, eight_bit, rotated=rotated)
    assert_close(got=norm.x, want=want, op="gated_residual")
    want = weighted_norm(norm.x, norm.scale, norm.shift, norm.first_tokens)
    assert_is_quantized(got, want, eight_bit, rotated=rotated, rounded=run is kernel)
    assert all(torch.equal(tensor, old) for tensor, old in zip(others, before, strict=True))


@IMPLEMENTATIONS
@ROTATED
@DTYPES
@pytest.mark.parametrize("shape", [(2, 3, 384), (1, 3, 3072), (2, 2, 5120)], ids=str)
def test_a_gated_residual_goes_on_modulated_in_8_bits(run, eight_bit, rotated, dtype, shape, device):
    x = (3 * torch.randn(shape, device=device) + 1).to(dtype)
    y = torch.randn(shape, device=device).bfloat16()
    gate, scale, shift = torch.randn(3, shape[0], 1, shape[2], device=device)
    check(run, RowNorm(x=x, y=y, gate=gate, scale=scale, shift=shift, eps=EPS), eight_bit, rotated=rotated)


@IMPLEMENTATIONS
@ROTATED
@pytest.mark.parametrize("is_gated", [False, True], ids=["added", "gated"])
def test_a_residual_goes_on_with_a_learned_weight_and_bias_in_8_bits(run, rotated, is_gated, device):
    x, y = torch.randn(2, 2, 3, 640, device=device)
    gate = torch.randn(2, 1, 640, device=device) if is_gated else None
    weight, bias = torch.randn(2, 640, device=device)
    check(run, RowNorm(x=x, y=y, gate=gate, scale=weight, shift=bias, eps=EPS), torch.int8, rotated=rotated)


@IMPLEMENTATIONS
@ROTATED
@pytest.mark.parametrize("first_tokens", [0, 1, 5])
def test_the_first_tokens_take_rows_of_their_own(run, rotated, first_tokens, device):
    x, y = torch.randn(2, 2, 5, 256, device=device)
    gate, scale, shift = torch.randn(2, 2, 6, 256, device=device).unbind(2)[1:4]
    norm = RowNorm(x=x, y=y, gate=gate, scale=scale, shift=shift, eps=EPS, first_tokens=first_tokens)
    check(run, norm, torch.int8, rotated=rotated)


@ROTATED
def test_the_public_operations_are_those_above(rotated, device):
    x, y = torch.randn(2, 1, 5, 128, device=device)
    gate, scale, shift = torch.randn(3, 1, 2, 128, device=device)
    for run, rows in (
        (residual_layer_norm_modulate_quantize, (scale, shift)),
        (residual_layer_norm_quantize, (scale[0, 0], shift[0, 0])),
    ):
        stream = x.clone()
        got = run(stream, y, *rows, torch.int8, eps=EPS, gate=gate, first_tokens=2, rotated=rotated)
        assert_close(got=stream, want=added(x, y, gate, 2), op="gated_residual")
        assert_is_quantized(got, weighted_norm(stream, *rows, 2), torch.int8, rotated=rotated, rounded=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(10, 96)}, r"x: must be \[B, T, C\], got \(10, 96\)"),
        ({"y": torch.zeros(2, 4, 96)}, r"y: must have x's shape \(2, 5, 96\), got \(2, 4, 96\)"),
        ({"gate": torch.zeros(2, 5, 96)}, r"gate: must be \[2, 1 or 2, 96\]"),
        ({"first_tokens": -1}, "first_tokens: must be 0 to 5, the tokens of x, got -1"),
        ({"dtype": torch.uint8}, "dtype: must be int8 or float8_e4m3fn, got torch.uint8"),
        ({"rotated": True}, "x: rotated channels must be a multiple of 128, got 96"),
    ],
)
@pytest.mark.parametrize("run", [residual_layer_norm_quantize, residual_layer_norm_modulate_quantize])
def test_residual_norms_into_8_bits_refuse(run, arguments, message):
    modulation = torch.zeros(2, 2, 96)
    rows = (torch.ones(96), torch.ones(96)) if run is residual_layer_norm_quantize else (modulation, modulation)
    good = {"x": torch.zeros(2, 5, 96), "y": torch.zeros(2, 5, 96), "dtype": torch.int8, "gate": modulation}

    def call(x, y, dtype, **options):
        return run(x, y, *rows, dtype, eps=EPS, **options)

    call(**good)
    with pytest.raises(ValueError, match=message):
        call(**(good | arguments))
