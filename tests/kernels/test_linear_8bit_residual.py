import pytest
import torch
from eight_bit import EIGHT_BIT, ON_CPU, OTHER_GENERATIONS, product, random_tokens, random_weight, run_as
from tolerance import assert_close
from torch import Tensor

from wanfast.kernels import linear_8bit_residual
from wanfast.kernels.linear_8bit_residual import linear_8bit_residual_reference, linear_8bit_residual_triton

IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [linear_8bit_residual_triton, linear_8bit_residual_reference], ids=["kernel", "reference"]
)
OPS = {torch.int8: "linear_int8", torch.float8_e4m3fn: "linear_e4m3"}


def truth(residual: Tensor, y: Tensor, gate: Tensor | None, first_tokens: int = 0) -> Tensor:
    if gate is None:
        return residual.double() + y
    late = (torch.arange(y.shape[1], device=y.device) >= first_tokens).long()
    return residual.double() + gate.double()[:, late.clamp_max(gate.shape[1] - 1)] * y


@IMPLEMENTATIONS
@EIGHT_BIT
@pytest.mark.parametrize("grouped", [False, True], ids=["token", "group"])
@pytest.mark.parametrize(
    ("batch", "tokens", "outputs", "inputs"),
    [(1, 1, 1, 128), (3, 130, 70, 256), (1, 300, 129, 128), (2, 3, 130, 5120), (1, 2, 64, 13824)],
    ids=str,
)
def test_the_gated_product_is_added_as_in_float64(run, dtype, grouped, batch, tokens, outputs, inputs, device):
    x = random_tokens((batch, tokens, inputs), dtype, device, groups=inputs // 128 if grouped else 1)
    weight, bias = random_weight(outputs, inputs, dtype, device), torch.randn(outputs, device=device)
    residual = torch.randn(batch, tokens, outputs, device=device)
    gate = torch.randn(batch, 1, outputs, device=device)
    want = truth(residual, product(x, weight, bias), gate)
    assert run(x, weight, bias, residual, gate) is residual
    assert_close(got=residual, want=want, op=OPS[dtype])


@IMPLEMENTATIONS
@EIGHT_BIT
@pytest.mark.parametrize("first_tokens", [0, 1, 129, 150])
def test_the_first_tokens_take_a_row_of_their_own(run, dtype, first_tokens, device):
    x, weight = random_tokens((2, 150, 128), dtype, device), random_weight(135, 128, dtype, device)
    residual = torch.randn(2, 150, 135, device=device)
    gate = torch.randn(2, 2, 6, 135, device=device)[:, :, 5]  # a slice, as the six rows of a timestep come
    want = truth(residual, product(x, weight), gate, first_tokens)
    run(x, weight, None, residual, gate, first_tokens=first_tokens)
    assert_close(got=residual, want=want, op=OPS[dtype])


@ON_CPU
@OTHER_GENERATIONS
@EIGHT_BIT
@pytest.mark.parametrize("grouped", [False, True], ids=["token", "group"])
def test_the_tiles_of_other_generations_give_the_same(arch, dtype, grouped, device, monkeypatch):
    run_as(arch, monkeypatch)
    x = random_tokens((2, 131, 256), dtype, device, groups=2 if grouped else 1)
    weight, bias = random_weight(133, 256, dtype, device), torch.randn(133, device=device)
    residual, gate = torch.randn(2, 131, 133, device=device), torch.randn(2, 2, 133, device=device)
    want = truth(residual, product(x, weight, bias), gate, 130)
    linear_8bit_residual_triton(x, weight, bias, residual, gate, first_tokens=130)
    assert_close(got=residual, want=want, op=OPS[dtype])


@IMPLEMENTATIONS
@EIGHT_BIT
@pytest.mark.parametrize("gate_dtype", [torch.bfloat16, None], ids=str)
def test_gates_of_other_dtypes_and_no_gate(run, dtype, gate_dtype, device):
    x, weight = random_tokens((2, 9, 256), dtype, device), random_weight(66, 256, dtype, device)
    residual = torch.randn(2, 9, 66, device=device)
    gate = None if gate_dtype is None else torch.randn(2, 1, 66, device=device).to(gate_dtype)
    want = truth(residual, product(x, weight), gate)
    run(x, weight, None, residual, gate)
    assert_close(got=residual, want=want, op=OPS[dtype])


@IMPLEMENTATIONS
@EIGHT_BIT
def test_low_rank_terms_are_gated_too(run, dtype, device):
    x, weight = random_tokens((2, 131, 256), dtype, device, groups=2), random_weight(66, 256, dtype, device)
    low_rank = torch.randn(2, 131, 20, device=device).half() * 9, torch.randn(66, 20, device=device).half()
    residual, gate = torch.randn(2, 131, 66, device=device), torch.randn(2, 1, 66, device=device)
    want = truth(residual, product(x, weight, None, low_rank), gate)
    run(x, weight, None, residual, gate, low_rank=low_rank)
    assert_close(got=residual, want=want, op=OPS[dtype])


@IMPLEMENTATIONS
def test_nothing_beside_the_residual_is_written(run, device):
    x, weight = random_tokens((1, 5, 128), torch.int8, device), random_weight(70, 128, torch.int8, device)
    memory = torch.full((9, 70), float("nan"), device=device)
    residual = memory[2:7].zero_()[None]
    gate = torch.randn(1, 1, 70, device=device)
    before = [tensor.clone() for tensor in (x.values, x.scale, gate)]
    run(x, weight, None, residual, gate)
    assert_close(got=residual, want=truth(torch.zeros_like(residual), product(x, weight), gate), op="linear_int8")
    assert bool(memory[:2].isnan().all() & memory[7:].isnan().all())
    assert all(torch.equal(a, b) for a, b in zip((x.values, x.scale, gate), before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"residual": torch.zeros(2, 5, 7)}, r"residual: must be \(2, 5, 6\), got \(2, 5, 7\)"),
        ({"residual": torch.zeros(2, 5, 6).half()}, "residual: must be float32, got torch.float16"),
        ({"residual": torch.zeros(2, 6, 5).mT}, "residual: must be contiguous, got strides"),
        ({"residual": torch.zeros(2, 5, 6, device="meta")}, "residual: must be on cpu, like x, got meta"),
        ({"gate": torch.zeros(2, 3, 6)}, r"gate: must be \[2, 1 or 2, 6\]"),
        ({"first_tokens": 6}, "first_tokens: must be 0 to 5, the tokens of x, got 6"),
        ({"x": random_tokens((5, 128), torch.int8, torch.device("cpu"))}, r"x: must be \[B, T, K\], got \(5, 128\)"),
    ],
)
def test_linear_8bit_residual_refuses(arguments, message):
    cpu = torch.device("cpu")
    good = {"x": random_tokens((2, 5, 128), torch.int8, cpu), "weight": random_weight(6, 128, torch.int8, cpu)}
    good |= {"bias": torch.zeros(6), "residual": torch.zeros(2, 5, 6), "gate": torch.zeros(2, 2, 6)}
    linear_8bit_residual(**good)
    with pytest.raises(ValueError, match=message):
        linear_8bit_residual(**(good | arguments))
