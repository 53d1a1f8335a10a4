from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from eight_bit import EIGHT_BIT, ON_CPU, OTHER_GENERATIONS, decibels, product, random_tokens, random_weight, run_as
from tolerance import assert_close
from torch import Tensor

from wanfast.kernels import Quantized, QuantizedWeight, linear_8bit, quantize_rows, quantize_weight
from wanfast.kernels._matmul_8bit import tile_at
from wanfast.kernels._tiles_8bit import EPILOGUES, GENERATIONS, generation_of
from wanfast.kernels.linear_8bit import linear_8bit_reference, linear_8bit_triton

IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [linear_8bit_triton, linear_8bit_reference], ids=["kernel", "reference"]
)
OPS = {torch.int8: "linear_int8", torch.float8_e4m3fn: "linear_e4m3"}


@IMPLEMENTATIONS
@EIGHT_BIT
@pytest.mark.parametrize("grouped", [False, True], ids=["token", "group"])
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"),
    [(1, 1, 128), (5, 7, 256), (129, 300, 384), (300, 130, 256), (3, 130, 5120), (2, 64, 13824)],
    ids=str,
)
def test_the_product_equals_float64(run, dtype, grouped, tokens, outputs, inputs, device):
    groups = inputs // 128 if grouped else 1
    x = random_tokens((tokens, inputs), dtype, device, groups=groups)
    weight = random_weight(outputs, inputs, dtype, device)
    bias = torch.randn(outputs, device=device)
    got = run(x, weight, bias, out_dtype=torch.float32)
    assert_close(got=got, want=product(x, weight, bias), op=OPS[dtype])


@ON_CPU
@OTHER_GENERATIONS
@EIGHT_BIT
@pytest.mark.parametrize("grouped", [False, True], ids=["token", "group"])
def test_the_tiles_of_other_generations_give_the_same(arch, dtype, grouped, device, monkeypatch):
    run_as(arch, monkeypatch)
    x = random_tokens((2, 131, 384), dtype, device, groups=3 if grouped else 1)
    weight, bias = random_weight(301, 384, dtype, device), torch.randn(301, device=device)
    low_rank = torch.randn(2, 131, 5, device=device).half() * 9, torch.randn(301, 5, device=device).half()
    for term in (None, low_rank):
        got = linear_8bit_triton(x, weight, bias, low_rank=term, out_dtype=torch.float32)
        assert_close(got=got, want=product(x, weight, bias, term), op=OPS[dtype])


@IMPLEMENTATIONS
@EIGHT_BIT
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_results_are_rounded_once(run, dtype, out_dtype, bias_dtype, device):
    x, weight = random_tokens((2, 3, 256), dtype, device), random_weight(100, 256, dtype, device)
    bias = None if bias_dtype is None else torch.randn(100, device=device).to(bias_dtype)
    got = run(x, weight, bias, out_dtype=out_dtype)
    assert got.dtype == out_dtype
    assert_close(got=got, want=product(x, weight, bias), op=OPS[dtype])


@IMPLEMENTATIONS
@EIGHT_BIT
def test_more_rows_of_tiles_than_are_run_together(run, dtype, device):
    x, weight = random_tokens((2305, 128), dtype, device), random_weight(129, 128, dtype, device)
    got = run(x, weight, None, out_dtype=torch.float32)
    assert_close(got=got, want=product(x, weight), op=OPS[dtype])


def fenced(tensor: Tensor) -> Tensor:
    """A copy between NaNs, which a product with zero keeps."""
    return torch.empty_like(tensor).copy_(tensor)


@IMPLEMENTATIONS
@EIGHT_BIT
@pytest.mark.parametrize("rank", [1, 16, 40])
@pytest.mark.parametrize("term_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_rank_terms_are_added(run, dtype, rank, term_dtype, device):
    x, weight = random_tokens((3, 5, 256), dtype, device), random_weight(131, 256, dtype, device)
    t = fenced((torch.randn(3, 5, rank, device=device) * 20).to(term_dtype))
    up = fenced(torch.randn(131, rank, device=device).to(term_dtype))
    bias = torch.randn(131, device=device)
    got = run(x, weight, bias, low_rank=(t, up), out_dtype=torch.float32)
    assert_close(got=got, want=product(x, weight, bias, (t, up)), op=OPS[dtype])


@IMPLEMENTATIONS
@EIGHT_BIT
def test_a_part_of_a_larger_tensor_is_written_and_no_more(run, dtype, device):
    x, weight = random_tokens((1, 130, 128), dtype, device), random_weight(70, 128, dtype, device)
    whole = torch.full((1, 140, 200), float("nan"), device=device, dtype=torch.bfloat16)
    for part in (whole[:, 5:135, 100:170], whole[:, 5:135, 1:71]):
        whole.fill_(float("nan"))
        assert run(x, weight, None, out=part).data_ptr() == part.data_ptr()
        assert_close(got=part, want=product(x, weight), op=OPS[dtype])
        assert int(whole.isnan().sum()) == whole.numel() - part.numel()


@IMPLEMENTATIONS
@EIGHT_BIT
def test_arguments_are_left_alone(run, dtype, device):
    x, weight = random_tokens((3, 256), dtype, device), random_weight(9, 256, dtype, device)
    t, up = torch.randn(3, 4, device=device).half(), torch.randn(9, 4, device=device).half()
    tensors = [x.values, x.scale, weight.values, weight.scale, t, up]
    before = [tensor.clone() for tensor in tensors]
    run(x, weight, None, low_rank=(t, up))
    assert all(torch.equal(tensor.float(), old.float()) for tensor, old in zip(tensors, before, strict=True))


@IMPLEMENTATIONS
def test_no_tokens_are_no_tokens(run, device):
    x, weight = random_tokens((0, 128), torch.int8, device), random_weight(9, 128, torch.int8, device)
    assert run(x, weight, None).shape == (0, 9)


@IMPLEMENTATIONS
@pytest.mark.parametrize("grouped", [False, True], ids=["token", "group"])
@pytest.mark.parametrize("inputs", [128, 13824])
def test_the_largest_sums_are_exact(run, grouped, inputs, device):
    """All products of one sign and the largest there are: FP16 sums of e4m3 do not overflow, nor int32 sums of int8."""
    groups = inputs // 128 if grouped else 1
    for dtype, x_most, w_most in ((torch.float8_e4m3fn, 16.0, -28.0), (torch.int8, 127.0, -127.0)):
        values = torch.full((2, inputs), x_most, device=device).to(dtype)
        x = Quantized(values, torch.ones(2, groups, device=device), False)
        weight = torch.full((3, inputs), w_most, device=device).to(dtype)
        got = run(x, QuantizedWeight(weight, torch.ones(3, device=device), False), None, out_dtype=torch.float32)
        assert torch.allclose(got, torch.full_like(got, inputs * x_most * w_most), rtol=1e-6)


def test_unfitted_weights_would_overflow_fp16_sums(device):
    if not generation_of(device).fp16_sums:
        pytest.skip("this GPU sums in fp32")
    values = torch.full((1, 128), 16.0, device=device).to(torch.float8_e4m3fn)
    weight = torch.full((1, 128), 448.0, device=device).to(torch.float8_e4m3fn)
    ones = torch.ones(1, device=device)
    with pytest.warns(RuntimeWarning) if device.type == "cpu" else nullcontext():
        got = linear_8bit_triton(Quantized(values, ones[None], False), QuantizedWeight(weight, ones, False), None)
    assert not bool(got.isfinite().any())


def activations(channels: int, amplitude: float) -> Tensor:
    """Gaussian tokens with some channels that are larger, the same ones in every token."""
    x = torch.randn(64, 5120)
    x[:, torch.randperm(5120)[:channels]] *= amplitude
    return x


@pytest.mark.parametrize(("channels", "amplitude"), [(0, 1), (8, 5), (8, 10), (8, 20), (8, 40), (64, 20)])
def test_rotation_keeps_int8_accurate_where_channels_stick_out(channels, amplitude):
    """The product of the original operands in float64 against each form of 8 bits: signal over noise in dB."""
    x, weight = activations(channels, amplitude), torch.randn(64, 5120) / 5120**0.5
    want = x.double() @ weight.double().T

    def quality(dtype: torch.dtype, rotated: bool) -> float:
        tokens = quantize_rows(x, dtype, rotated=rotated)
        got = linear_8bit(tokens, quantize_weight(weight, dtype, rotated=rotated), None, out_dtype=torch.float32)
        return decibels(want, got)

    plain, rotated = quality(torch.int8, False), quality(torch.int8, True)
    assert rotated > 35
    assert 27.5 < quality(torch.float8_e4m3fn, False) < 30.5
    if amplitude == 1:
        assert abs(plain - rotated) < 1
    else:
        least = {5: 3, 10: 7, 20: 9, 40: 14}[amplitude]
        assert rotated - plain > least, f"{rotated:.1f} dB rotated, {plain:.1f} dB plain"


@EIGHT_BIT
def test_rotated_operands_give_the_product_of_the_original_ones(dtype, device):
    x, weight = torch.randn(4, 384, device=device), torch.randn(33, 384, device=device)
    tokens = quantize_rows(x, dtype, groups=3, rotated=True)
    got = linear_8bit_triton(tokens, quantize_weight(weight, dtype, rotated=True), None, out_dtype=torch.float32)
    assert decibels(x.double() @ weight.double().T, got) > (38 if dtype == torch.int8 else 27)


@triton.jit(do_not_specialize=["num_m", "num_n"])
def _order_kernel(out_ptr, num_m, num_n):
    row, column = tile_at(num_m, num_n, 8)
    tl.store(out_ptr + tl.program_id(0), row * num_n + column)


@pytest.mark.parametrize(("num_m", "num_n"), [(1, 1), (3, 5), (8, 2), (9, 2), (19, 3)])
def test_every_tile_is_made_once_and_rows_run_together(num_m, num_n, device):
    order = torch.full((num_m * num_n,), -1, dtype=torch.int32, device=device)
    _order_kernel[(num_m * num_n,)](order, num_m, num_n)
    assert sorted(order.tolist()) == list(range(num_m * num_n))
    together = min(num_m, 8)
    assert [tile // num_n for tile in order[:together].tolist()] == list(range(together))


def test_tiles_fit_the_operands():
    for generation in GENERATIONS.values():
        for dtype in OPS:
            for epilogue in EPILOGUES:
                for low_rank in (False, True):
                    tile = generation.tile(dtype, epilogue, grouped=False, low_rank=low_rank)
                    assert 128 % tile.depth == 0
                    assert epilogue != "gelu" or tile.columns == 128
                    assert generation.tile(dtype, epilogue, grouped=True, low_rank=low_rank).depth == 128


def _good() -> dict[str, object]:
    return {
        "x": random_tokens((2, 5, 256), torch.int8, torch.device("cpu")),
        "weight": random_weight(6, 256, torch.int8, torch.device("cpu")),
        "bias": torch.zeros(6),
        "low_rank": (torch.zeros(2, 5, 4).half(), torch.zeros(6, 4).half()),
    }


INT8, ONES = torch.zeros(2, 5, 256, dtype=torch.int8), torch.ones(2, 5, 1)
WEIGHT = torch.zeros(6, 256, dtype=torch.int8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": Quantized(INT8.float(), ONES, False)}, "x.values: must be int8 or float8_e4m3fn, got torch.float32"),
        ({"x": Quantized(INT8.mT, ONES, False)}, "x.values: must be contiguous, got strides"),
        ({"x": Quantized(INT8, ONES[..., 0], False)}, r"x.scale: must be \(2, 5, 1\) or \(2, 5, 2\), got \(2, 5\)"),
        ({"x": Quantized(INT8, torch.ones(2, 5, 256), False)}, "x.scale: must be .*, got"),
        ({"x": Quantized(INT8, ONES.half(), False)}, "x.scale: must be float32, got torch.float16"),
        ({"x": Quantized(INT8, ONES, True)}, "weight.rotated: must be True, like x, got False"),
        (
            {"weight": QuantizedWeight(WEIGHT[:, :128], torch.ones(6), False)},
            "weight.values: must have x's 256 channels",
        ),
        (
            {"weight": QuantizedWeight(WEIGHT.to(torch.float8_e4m3fn), torch.ones(6), False)},
            "must be torch.int8, like x",
        ),
        ({"weight": QuantizedWeight(WEIGHT, torch.ones(6, 1), False)}, r"weight.scale: must be \[6\], got \(6, 1\)"),
        ({"weight": QuantizedWeight(WEIGHT, torch.ones(6).half(), False)}, "weight.scale: must be float32"),
        ({"bias": torch.zeros(7)}, r"bias: must be \[6\], got \(7,\)"),
        ({"bias": torch.zeros(6, device="meta")}, "bias: must be on cpu, like x, got meta"),
        ({"low_rank": (torch.zeros(2, 5, 4).half(), torch.zeros(6, 3).half())}, r"t: must be \(2, 5, 3\), x's tokens"),
        ({"low_rank": (torch.zeros(2, 5, 4).half(), torch.zeros(5, 4).half())}, r"up: must be \[6, R\], got \(5, 4\)"),
        ({"low_rank": (torch.zeros(2, 5, 4), torch.zeros(6, 4))}, "t: must be bfloat16 or float16, got torch.float32"),
        (
            {"low_rank": (torch.zeros(2, 5, 4).half(), torch.zeros(6, 4).bfloat16())},
            "t: must be torch.bfloat16, like up",
        ),
        ({"out_dtype": torch.int8}, "out_dtype: must be float32, bfloat16 or float16, got torch.int8"),
        ({"out": torch.zeros(10, 6)}, r"out: must be \(2, 5, 6\), got \(10, 6\)"),
        ({"out": torch.zeros(2, 6, 5).mT}, "out: must have adjacent columns and evenly spaced rows, got strides"),
        ({"out": torch.zeros(2, 9, 6)[:, :5]}, "out: must have adjacent columns and evenly spaced rows, got strides"),
        ({"out": torch.zeros(2, 5, 6).double()}, "out: must be float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_linear_8bit_refuses(arguments, message):
    good = _good()
    linear_8bit(**good)
    with pytest.raises(ValueError, match=message):
        linear_8bit(**(good | arguments))
