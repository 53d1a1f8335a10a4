"""The interpreter computes what a GPU would: each fault that tests/interpreter.py repairs, against torch."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")

SIZE = 64


@triton.jit
def _binary_kernel(a_ptr, b_ptr, y_ptr, OP: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)  # in bounds: SIZE values each
    if OP == "add":
        y = a + b
    elif OP == "sub":
        y = a - b
    elif OP == "mul":
        y = a * b
    elif OP == "maximum":
        y = tl.maximum(a, b)
    elif OP == "fma":
        y = tl.fma(a, b, a)
    elif OP == "clamp":
        y = tl.clamp(a, -tl.abs(b), tl.abs(b))
    else:
        y = tl.where(a < b, a, b)
    tl.store(y_ptr + i, y)  # in bounds: SIZE values


BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "fma": lambda a, b: (a.float() * b.float() + a.float()).to(a.dtype),
    "clamp": lambda a, b: a.clamp(-b.abs(), b.abs()),
    "less": torch.minimum,
}


@pytest.mark.parametrize("op", BINARY)
def test_bfloat16_arithmetic_equals_torch(op):
    a, b = torch.randn(2, SIZE).to(torch.bfloat16)
    y = torch.empty_like(a)
    _binary_kernel[(1,)](a, b, y, OP=op, SIZE=SIZE)
    assert torch.equal(y, BINARY[op](a, b))


@triton.jit
def _cast_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))  # in bounds: SIZE values each


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_casts_round_to_nearest(source, target):
    x = torch.randn(4096).to(source)
    y = torch.empty_like(x, dtype=target)
    _cast_kernel[(1,)](x, y, SIZE=4096)
    assert torch.equal(y, x.to(target))


@pytest.mark.parametrize(("target", "largest"), [(torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_casts_to_float8_round_and_saturate(target, largest, scale):
    x = torch.randn(4096) * scale
    x[:2] = torch.tensor([2 * largest, -2 * largest])
    y = torch.zeros(4096, dtype=target)
    _cast_kernel[(1,)](x, y, SIZE=4096)
    assert torch.equal(y.float(), x.clamp(-largest, largest).to(target).float())
    assert y[:2].float().tolist() == [largest, -largest]


@triton.jit
def _dot_kernel(a_ptr, b_ptr, y_ptr, SIZE: tl.constexpr, ACCUMULATOR: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)  # in bounds: SIZE x SIZE values each
    tl.store(y_ptr + at, tl.dot(a, b, out_dtype=ACCUMULATOR))  # in bounds: SIZE x SIZE values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_dots_multiply_values(dtype):
    a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
    y = torch.empty(SIZE, SIZE)
    _dot_kernel[(1,)](a, b, y, SIZE=SIZE, ACCUMULATOR=tl.float32)
    torch.testing.assert_close(y, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_int8_dots_are_exact():
    a, b = (torch.randint(-128, 128, (SIZE, SIZE), dtype=torch.int8) for _ in range(2))
    y = torch.zeros(SIZE, SIZE, dtype=torch.int32)
    _dot_kernel[(1,)](a, b, y, SIZE=SIZE, ACCUMULATOR=tl.int32)
    assert torch.equal(y, a.int() @ b.int())


def test_a_float16_accumulator_rounds():
    a, b = (torch.randn(SIZE, SIZE).half() for _ in range(2))
    y = torch.empty(SIZE, SIZE, dtype=torch.float16)
    _dot_kernel[(1,)](a, b, y, SIZE=SIZE, ACCUMULATOR=tl.float16)
    torch.testing.assert_close(y.float(), a.float() @ b.float(), rtol=1e-3, atol=1e-3)


@triton.jit
def _reduce_kernel(x_ptr, y_ptr, OP: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i[:, None] * SIZE + i[None, :])  # in bounds: SIZE x SIZE values
    y = tl.max(x, 1) if OP == "max" else tl.sum(x, 1)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty))  # in bounds: SIZE values


@pytest.mark.parametrize("op", ["max", "sum"])
def test_bfloat16_reductions_reduce_values(op):
    x = torch.randn(SIZE, SIZE).to(torch.bfloat16)
    y = torch.empty(SIZE, dtype=torch.bfloat16)
    _reduce_kernel[(1,)](x, y, OP=op, SIZE=SIZE)
    assert torch.equal(y, x.amax(1) if op == "max" else x.float().sum(1).to(torch.bfloat16))


@triton.jit
def _unary_kernel(x_ptr, y_ptr, OP: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)  # in bounds: SIZE values
    if OP == "erf":
        y = tl.erf(x)
    elif OP == "rsqrt":
        y = tl.rsqrt(x)
    else:
        y = tl.exp2(x)
    tl.store(y_ptr + i, y)  # in bounds: SIZE values


@pytest.mark.parametrize("op", ["erf", "rsqrt", "exp2"])
def test_functions_of_one_argument(op):
    x = torch.rand(SIZE) + 0.5
    y = torch.empty_like(x)
    _unary_kernel[(1,)](x, y, OP=op, SIZE=SIZE)
    torch.testing.assert_close(y, getattr(torch, op)(x))


@triton.jit
def _loop_kernel(y_ptr, count):
    total = 0
    for i in range(0, count, 2):
        total += i
    tl.store(y_ptr, total)  # in bounds: one value


def test_loops_take_a_run_time_bound():
    y = torch.zeros(1, dtype=torch.int32)
    _loop_kernel[(1,)](y, 9)
    assert y.item() == 0 + 2 + 4 + 6 + 8


@triton.autotune(configs=[triton.Config({"WIDTH": 8}), triton.Config({"WIDTH": 16})], key=["count"])
@triton.jit
def _autotuned_kernel(y_ptr, count, WIDTH: tl.constexpr):
    tl.store(y_ptr, count * WIDTH)  # in bounds: one value


def test_autotune_takes_the_first_configuration():
    y = torch.zeros(1, dtype=torch.int32)
    _autotuned_kernel[(1,)](y, 3)
    assert y.item() == 24
