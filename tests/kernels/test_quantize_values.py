import pytest
import torch

from wanfast.kernels import quantize_values
from wanfast.kernels.quantize_values import (
    LARGEST_VALUE,
    quantize_values_reference,
    quantize_values_triton,
    stored_tokens,
)

E4M3, FP16 = torch.float8_e4m3fn, torch.float16
IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [quantize_values_triton, quantize_values_reference], ids=["kernel", "reference"]
)
DTYPES = pytest.mark.parametrize("dtype", [E4M3, FP16], ids=["e4m3", "fp16"])
ROUNDING = {E4M3: 2.0**-4, FP16: 2.0**-11}  # of a normal number, relative
SMALLEST = {E4M3: 2.0**-10, FP16: 2.0**-25}  # half the step of the smallest numbers


def test_each_run_of_32_is_stored_as_tensor_cores_leave_weights():
    stored = stored_tokens(64, E4M3).tolist()
    assert sorted(stored) == list(range(64))
    for b in range(2):
        for j in range(2):
            for q in range(4):
                for h in range(4):
                    assert stored[b + 2 * j + 4 * q + 16 * h] == b + 2 * q + 8 * j + 16 * h
    assert stored_tokens(64, FP16).tolist() == list(range(64))


def test_a_lane_keeps_the_weights_that_it_computed():
    """PTX ISA, mma.m16n8k32: a lane's accumulators of q . k are the bytes of its operand for the product with v."""
    stored = stored_tokens(32, E4M3)
    for lane in range(4):
        accumulators = {8 * n + 2 * lane + i for n in range(4) for i in range(2)}  # columns of C, four tiles of 8
        operand = {4 * lane + i + 16 * half for half in range(2) for i in range(4)}  # columns of A
        assert {int(stored[place]) for place in operand} == accumulators


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (2, 64, 2, 128), (2, 65, 3, 64), (1, 190, 1, 128)], ids=str)
def test_every_token_is_rounded_once_and_stands_in_its_place(run, dtype, shape, device):
    batch, tokens, heads, dim = shape
    v = torch.randn(shape, device=device).bfloat16()
    mean, inverse = torch.randn(batch, heads, dim, device=device), torch.rand(batch, heads, dim, device=device) / 8
    values = run(v, mean, inverse, dtype=dtype)
    blocks = -(-tokens // 64)
    assert values.dtype == dtype and values.is_contiguous()
    assert values.shape == (batch, heads, blocks, dim, 64)

    places = values.double().transpose(3, 4).reshape(batch, heads, blocks * 64, dim)
    in_order = torch.empty_like(places)
    in_order[:, :, stored_tokens(blocks * 64, dtype).to(device)] = places
    want = ((v.double() - mean.double()[:, None]) * inverse.double()[:, None]).transpose(1, 2)
    error = (in_order[:, :, :tokens] - want).abs()
    assert (error <= (1 + 1e-4) * torch.maximum(ROUNDING[dtype] * want.abs(), torch.tensor(SMALLEST[dtype]))).all()
    assert not in_order[:, :, tokens:].any()


@DTYPES
def test_no_value_exceeds_what_fp16_sums_allow(dtype, device):
    v = torch.randn(1, 200, 2, 64, device=device).bfloat16()
    v[:, 7] *= 3e4
    v[:, 11, 1] = -1e30
    quantized = quantize_values(v, dtype=dtype)
    assert quantized.values.float().abs().max() == LARGEST_VALUE[dtype]
    largest = quantized.values.float().abs().amax((2, 4))
    assert (largest == LARGEST_VALUE[dtype]).all()  # of every channel: none of the range is left unused


@DTYPES
def test_scale_and_mean_give_the_values_back(dtype, device):
    v = (torch.randn(2, 130, 3, 64, device=device) + 20 * torch.randn(3, 64, device=device)).bfloat16()
    before = v.clone()
    quantized = quantize_values(v, dtype=dtype)
    assert quantized.tokens == 130
    torch.testing.assert_close(quantized.mean.double(), v.double().mean(1), rtol=1e-5, atol=1e-5)
    places = quantized.values.float().transpose(3, 4).flatten(2, 3)[:, :, stored_tokens(192, dtype).argsort()]
    got = (places * quantized.scale[:, :, None] + quantized.mean[:, :, None])[:, :, :130].transpose(1, 2)
    centred = (v.double() - v.double().mean(1, keepdim=True)).abs()
    step = centred.amax(1, keepdim=True) * SMALLEST[dtype] / LARGEST_VALUE[dtype]
    assert ((got - v.double()).abs() <= 1.01 * torch.maximum(ROUNDING[dtype] * centred, step) + 1e-5).all()
    assert torch.equal(v, before)


@DTYPES
def test_a_channel_that_never_changes_is_its_mean(dtype, device):
    v = torch.randn(1, 70, 1, 64, device=device)
    v[..., 3] = -7.25
    quantized = quantize_values(v, dtype=dtype)
    assert not quantized.values[:, :, :, 3].any()
    assert quantized.mean[0, 0, 3] == -7.25 and quantized.scale[0, 0, 3] == 1


@IMPLEMENTATIONS
def test_values_may_be_part_of_a_packed_projection(run, device):
    v = torch.randn(2, 66, 3, 5, 64, device=device).bfloat16()[:, :, 1, ::2]
    mean, inverse = torch.zeros(2, 3, 64, device=device), torch.full((2, 3, 64), 0.125, device=device)
    got, want = run(v, mean, inverse, dtype=FP16), run(v.contiguous(), mean, inverse, dtype=FP16)
    assert torch.equal(got, want)
    assert torch.equal(got[:, :, 0].transpose(2, 3), (v[:, :64].half() / 8).transpose(1, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"v": torch.zeros(2, 3, 4, 96)}, "v: head dimension must be 64 or 128, got 96"),
        ({"v": torch.zeros(2, 3, 64)}, r"v: must be \[B, T, N, D\], none of them 0, got \(2, 3, 64\)"),
        ({"dtype": torch.bfloat16}, "dtype: must be float8_e4m3fn or float16, got torch.bfloat16"),
    ],
)
def test_quantize_values_refuses(arguments, message):
    good = {"v": torch.zeros(2, 3, 4, 64), "dtype": E4M3}
    quantize_values(**good)
    with pytest.raises(ValueError, match=message):
        quantize_values(**(good | arguments))
