import pytest
import torch
from norm_truth import EPS, assert_is_quantized, weighted_norm

from wanfast.kernels import layer_norm_modulate_quantize, layer_norm_quantize
from wanfast.kernels._row_norm import RowNorm
from wanfast.kernels._tiles import MAX_CHANNELS
from wanfast.kernels.layer_norm_quantize import layer_norm_quantize_reference, layer_norm_quantize_triton
from wanfast.kernels.layer_norm_rotate import layer_norm_rotate_triton, rotated_tile


def kernel(norm, dtype, *, rotated):
    return layer_norm_rotate_triton(norm, dtype) if rotated else layer_norm_quantize_triton(norm, dtype)


IMPLEMENTATIONS = pytest.mark.parametrize("run", [kernel, layer_norm_quantize_reference], ids=["kernel", "reference"])
DTYPES = pytest.mark.parametrize(
    ("dtype", "eight_bit"),
    [
        (torch.float32, torch.int8),
        (torch.float32, torch.float8_e4m3fn),
        (torch.float16, torch.int8),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
    ids=str,
)
EIGHT_BIT = pytest.mark.parametrize("eight_bit", [torch.int8, torch.float8_e4m3fn], ids=str)
ROTATED = pytest.mark.parametrize("rotated", [False, True], ids=["as it is", "rotated"])


def check(run, norm, eight_bit, *, rotated=False):
    before = norm.x.clone()
    got = run(norm, eight_bit, rotated=rotated)
    want = weighted_norm(norm.x, norm.scale, norm.shift, norm.first_tokens)
    assert_is_quantized(got, want, eight_bit, rotated=rotated, rounded=run is kernel)
    assert torch.equal(norm.x, before)


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 1, 1000), (1, 3, 3072), (2, 2, 5120)], ids=str)
def test_modulated_tokens_become_the_nearest_8_bit_ones(run, eight_bit, dtype, shape, device):
    x = (3 * torch.randn(shape, device=device) + 1).to(dtype)
    scale, shift = torch.randn(2, shape[0], 1, shape[2], device=device)
    check(run, RowNorm(x=x, scale=scale, shift=shift, eps=EPS), eight_bit)


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("shape", [(2, 3, 128), (1, 2, 2176), (1, 3, 3072), (2, 2, 5120)], ids=str)
def test_rotated_tokens_become_the_nearest_8_bit_ones(run, eight_bit, dtype, shape, device):
    x = (3 * torch.randn(shape, device=device) + 1).to(dtype)
    x[:, 0, 5] = 200  # an outlier, which a rotation spreads
    scale, shift = torch.randn(2, shape[0], 1, shape[2], device=device)
    check(run, RowNorm(x=x, scale=scale, shift=shift, eps=EPS), eight_bit, rotated=True)


@IMPLEMENTATIONS
@ROTATED
@pytest.mark.parametrize("first_tokens", [0, 1, 4, 7])
def test_the_first_tokens_take_a_row_of_their_own(run, rotated, first_tokens, device):
    x = torch.randn(2, 7, 384, device=device)
    scale, shift = torch.randn(2, 2, 2, 384, device=device)
    norm = RowNorm(x=x, scale=scale, shift=shift, eps=EPS, first_tokens=first_tokens)
    check(run, norm, torch.int8, rotated=rotated)


@IMPLEMENTATIONS
@ROTATED
def test_first_tokens_have_no_effect_on_one_row(run, rotated, device):
    x = torch.randn(2, 7, 128, device=device)
    scale, shift = torch.randn(2, 2, 1, 128, device=device)
    check(run, RowNorm(x=x, scale=scale, shift=shift, eps=EPS, first_tokens=3), torch.int8, rotated=rotated)


@IMPLEMENTATIONS
@ROTATED
def test_modulation_may_be_a_slice_an_expanded_batch_or_bfloat16(run, rotated, device):
    x = torch.randn(2, 5, 256, device=device)
    six = torch.randn(2, 2, 6, 256, device=device)
    scale, shift = six[:, :, 1], six.bfloat16()[:1, :, 4].expand(2, 2, 256)
    norm = RowNorm(x=x, scale=scale, shift=shift, eps=EPS, first_tokens=2)
    check(run, norm, torch.int8, rotated=rotated)


@IMPLEMENTATIONS
@EIGHT_BIT
@ROTATED
@pytest.mark.parametrize("shape", [(3, 128), (2, 3, 1280)], ids=str)
def test_a_learned_weight_and_bias_are_every_token_s(run, eight_bit, rotated, shape, device):
    x = torch.randn(shape, device=device) + 2
    weight, bias = torch.randn(2, shape[-1], device=device).bfloat16()
    check(run, RowNorm(x=x, scale=weight, shift=bias, eps=EPS), eight_bit, rotated=rotated)


@IMPLEMENTATIONS
def test_a_mean_far_above_the_deviation_survives(run, device):
    x = 1000 + torch.randn(1, 4, 1000, device=device)
    scale, shift = torch.zeros(2, 1, 1, 1000, device=device)
    got = run(RowNorm(x=x, scale=scale, shift=shift, eps=EPS), torch.int8, rotated=False)
    want = weighted_norm(x, scale, shift)
    assert (got.values.double() * got.scale - want).abs().max() <= 0.51 * got.scale.max()


@IMPLEMENTATIONS
@EIGHT_BIT
@ROTATED
def test_a_constant_token_is_its_shift_and_zeros_are_zeros(run, eight_bit, rotated, device):
    x = torch.full((1, 3, 256), 3.0, device=device)
    scale, shift = torch.randn(2, 1, 2, 256, device=device)
    shift[:, 1] = 0
    got = run(RowNorm(x=x, scale=scale, shift=shift, eps=EPS, first_tokens=1), eight_bit, rotated=rotated)
    assert (got.values[0, 0].float() != 0).any()
    assert (got.values[0, 1:].float() == 0).all()
    assert (got.scale[0, 1:] == 1).all()


def test_a_rotated_tile_holds_every_run():
    for channels in range(128, MAX_CHANNELS + 1, 128):
        runs = rotated_tile(channels)["RUNS"]
        assert runs.bit_count() == 1
        assert max(16, channels // 128) <= runs <= max(16, channels // 64), channels


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_the_public_operations_are_those_above(dtype, device):
    x = torch.randn(1, 3, 256, device=device)
    scale, shift = torch.randn(2, 1, 2, 256, device=device)
    for rotated in (False, True):
        norm = RowNorm(x=x, scale=scale, shift=shift, eps=EPS, first_tokens=1)
        got = layer_norm_modulate_quantize(x, scale, shift, dtype, eps=EPS, first_tokens=1, rotated=rotated)
        want = weighted_norm(x, scale, shift, norm.first_tokens)
        assert_is_quantized(got, want, dtype, rotated=rotated, rounded=True)
        got = layer_norm_quantize(x, scale[0, 0], shift[0, 0], dtype, eps=EPS, rotated=rotated)
        want = weighted_norm(x, scale[0, 0], shift[0, 0])
        assert_is_quantized(got, want, dtype, rotated=rotated, rounded=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 256, 5).transpose(1, 2)}, "x: must be contiguous, got strides"),
        ({"x": torch.zeros(10, 256)}, r"x: must be \[B, T, C\], got \(10, 256\)"),
        ({"scale": torch.zeros(2, 3, 256)}, r"scale: must be \[2, 1 or 2, 256\] for x of shape \(2, 5, 256\)"),
        ({"scale": torch.zeros(2, 1, 256)}, r"shift: must have scale's shape \(2, 1, 256\), got \(2, 2, 256\)"),
        ({"first_tokens": 6}, "first_tokens: must be 0 to 5, the tokens of x, got 6"),
        ({"dtype": torch.float16}, "dtype: must be int8 or float8_e4m3fn, got torch.float16"),
    ],
)
def test_layer_norm_modulate_quantize_refuses(arguments, message):
    zeros = torch.zeros(2, 2, 256)
    good = {"x": torch.zeros(2, 5, 256), "scale": zeros, "shift": zeros, "dtype": torch.int8, "rotated": True}
    layer_norm_modulate_quantize(**good, eps=EPS)
    with pytest.raises(ValueError, match=message):
        layer_norm_modulate_quantize(**(good | arguments), eps=EPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(7)}, r"weight: must be \[96\], x's channels, got \(7,\)"),
        ({"bias": torch.ones(96).double()}, "bias: must be float32, bfloat16 or float16, got torch.float64"),
        ({"rotated": True}, "x: rotated channels must be a multiple of 128, got 96"),
    ],
)
def test_layer_norm_quantize_refuses(arguments, message):
    good = {"x": torch.zeros(5, 96), "weight": torch.ones(96), "bias": torch.zeros(96), "dtype": torch.int8}
    layer_norm_quantize(**good, eps=EPS)
    with pytest.raises(ValueError, match=message):
        layer_norm_quantize(**(good | arguments), eps=EPS)
