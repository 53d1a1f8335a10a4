from collections.abc import Iterator
from math import e, log2

import pytest
import torch
from eight_bit import Poisoned

from wanfast.kernels import quantize_queries
from wanfast.kernels.quantize_queries import quantize_queries_reference, quantize_queries_triton

IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [quantize_queries_triton, quantize_queries_reference], ids=["kernel", "reference"]
)
HALF = 0.50001  # a step, with fp32's roundings of the product
SHAPES = pytest.mark.parametrize(
    "shape", [(1, 1, 1, 64), (2, 21, 3, 128), (1, 65, 1, 64), (1, 3, 40, 128), (1, 5, 24, 128)], ids=str
)


@pytest.fixture(autouse=True)
def fresh_int8_is_poisoned(monkeypatch: pytest.MonkeyPatch, fresh_memory_is_nan: None) -> Iterator[None]:
    memory = Poisoned(monkeypatch)
    yield
    memory.assert_whole()


def assert_rounded(q, quantized, *, softmax_scale):
    wide = q.double()
    absmax = wide.abs().amax(-1)
    step = absmax / 127
    torch.testing.assert_close(quantized.scale.double(), step * softmax_scale * log2(e), rtol=1e-6, atol=0)
    assert quantized.values.dtype == torch.int8 and quantized.values.is_contiguous()
    assert quantized.values.shape == q.shape
    assert (quantized.values >= -127).all()
    assert ((quantized.values.double() - wide / step[..., None]).abs() <= HALF).all()


@IMPLEMENTATIONS
@SHAPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_row_is_rounded_by_its_own_scale(run, shape, dtype, device):
    rows = torch.logspace(-3, 3, shape[1] * shape[2], device=device).view(shape[1], shape[2], 1)
    q = (rows * torch.randn(shape, device=device)).to(dtype)
    assert_rounded(q, run(q, softmax_scale=0.3), softmax_scale=0.3)


@IMPLEMENTATIONS
def test_queries_may_be_part_of_a_packed_projection(run, device):
    packed = torch.randn(2, 33, 3, 5, 64, device=device).bfloat16()
    q = packed[:, :, 1, ::2]
    assert_rounded(q, run(q, softmax_scale=1.0), softmax_scale=1.0)
    of_one_head = packed[:, :, 2, 1:2]
    assert_rounded(of_one_head, run(of_one_head, softmax_scale=1.0), softmax_scale=1.0)


@IMPLEMENTATIONS
def test_a_row_of_zeros_stays_zero(run, device):
    q = torch.randn(1, 3, 2, 64, device=device).bfloat16()
    q[0, 1, 1] = 0
    quantized = run(q, softmax_scale=1.0)
    assert not quantized.values[0, 1, 1].any()
    assert quantized.scale.isfinite().all()


@IMPLEMENTATIONS
def test_ties_round_to_even_and_the_largest_is_127(run, device):
    q = torch.zeros(1, 1, 1, 64, device=device)
    q[..., :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -2.5])
    assert run(q, softmax_scale=1.0).values[0, 0, 0, :6].tolist() == [127, 0, 2, 2, 0, -2]


def test_the_softmax_scale_is_that_of_attention_unless_given(device):
    q = torch.randn(1, 2, 1, 64, device=device).bfloat16()
    before = q.clone()
    assert torch.equal(quantize_queries(q).scale, quantize_queries(q, softmax_scale=0.125).scale)
    assert torch.equal(q, before)


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (torch.zeros(2, 3, 4, 64).double(), "q: must be float32, bfloat16 or float16, got torch.float64"),
        (torch.zeros(3, 4, 64), r"q: must be \[B, T, N, D\], none of them 0, got \(3, 4, 64\)"),
        (torch.zeros(1, 0, 4, 64), r"q: must be \[B, T, N, D\], none of them 0"),
        (torch.zeros(1, 2, 4, 96), "q: head dimension must be 64 or 128, got 96"),
        (torch.zeros(1, 64, 4, 2).transpose(1, 3), "q: channels must be adjacent in memory, got strides"),
    ],
)
def test_quantize_queries_refuses(q, message):
    with pytest.raises(ValueError, match=message):
        quantize_queries(q)
