import pytest
import torch
from torch import Tensor

from wanfast.kernels import rms_norm_rope_quantize
from wanfast.kernels.quantize_queries import QuantizedQueries, quantize_queries_reference
from wanfast.kernels.rms_norm_rope_quantize import rms_norm_rope_quantize_reference, rms_norm_rope_quantize_triton
from wanfast.rope import apply_rope, rope_rotations

EPS = 1e-6
LOG2_E = 1.4426950408889634
IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [rms_norm_rope_quantize_triton, rms_norm_rope_quantize_reference], ids=["kernel", "reference"]
)
DTYPES = pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)


def truth(x: Tensor, weight: Tensor, rotations: Tensor) -> Tensor:
    """Queries in float64, but for the rounding that Wan makes before the weight."""
    normalised = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    y = (normalised.to(x.dtype).double() * weight.double()).to(torch.promote_types(x.dtype, weight.dtype)).double()
    pairs = torch.view_as_complex(y.unflatten(-1, (-1, rotations.shape[-1], 2)))
    return torch.view_as_real(pairs * rotations[:, None].to(torch.complex128)).flatten(-2)


def empty_queries(x: Tensor, head_dim: int) -> QuantizedQueries:
    shape = (*x.shape[:2], x.shape[-1] // head_dim, head_dim)
    values = torch.full(shape, -128, dtype=torch.int8, device=x.device)  # which no query is rounded to
    return QuantizedQueries(values, torch.empty(shape[:-1], dtype=torch.float32, device=x.device))


def assert_nearest(got: QuantizedQueries, want: Tensor, softmax_scale: float) -> None:
    values, scale = got.values.double(), got.scale.double()[..., None] / (softmax_scale * LOG2_E)
    absmax = want.abs().amax(-1, keepdim=True)
    assert (values.abs().amax(-1) == 127).all()
    # Where fp32 noise meets the edge between two 16-bit numbers, a rounding before the weight goes the other way.
    edge = ((scale * 127 / absmax - 1).abs() > 2e-6).double().mean()
    assert edge <= 0.02
    assert ((scale * 127 / absmax - 1).abs() <= 2.0**-7).all()
    off = (values * scale - want).abs() / scale
    assert (off > 0.501).double().mean() <= 0.001
    assert (off <= 1.5).all()


def setup(shape, head_dim, dtype, weight_dtype, device) -> tuple[Tensor, Tensor, Tensor]:
    x = (3 * torch.randn(shape, device=device)).to(dtype)
    weight = (1 + 0.3 * torch.randn(shape[-1], device=device)).to(weight_dtype)
    return x, weight, rope_rotations((2, 3, -(-shape[1] // 6)), head_dim)[: shape[1]].clone().to(device)


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize(
    ("shape", "head_dim"),
    [((2, 3, 64), 64), ((1, 5, 128), 128), ((2, 7, 320), 64), ((1, 3, 3072), 128), ((2, 2, 5120), 128)],
    ids=str,
)
def test_every_query_is_the_nearest_int8(run, dtype, weight_dtype, shape, head_dim, device):
    x, weight, rotations = setup(shape, head_dim, dtype, weight_dtype, device)
    got = run(x, weight, rotations, empty_queries(x, head_dim), eps=EPS, softmax_scale=0.3)
    assert_nearest(got, truth(x, weight, rotations), 0.3)


@IMPLEMENTATIONS
def test_it_is_the_norm_the_rotation_and_the_rounding_in_turn(run, device):
    x, weight, rotations = setup((2, 5, 640), 128, torch.float32, torch.float32, device)
    normalised = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight
    want = quantize_queries_reference(apply_rope(normalised.view(2, 5, 5, 128), rotations), softmax_scale=128**-0.5)
    got = run(x, weight, rotations, empty_queries(x, 128), eps=EPS, softmax_scale=128**-0.5)
    torch.testing.assert_close(got.scale, want.scale, rtol=2e-6, atol=0)
    assert (got.values != want.values).double().mean() < 1e-3
    assert (got.values - want.values).abs().max() <= 1


@IMPLEMENTATIONS
def test_x_may_be_a_slice_and_the_result_some_tokens_of_one_of_two_tensors_in_one(run, device):
    qkv, weight, rotations = setup((2, 12, 3 * 256), 64, torch.float16, torch.float32, device)
    x, weight, rotations = qkv[:, 1:10, 256:512], weight[256:512].clone(), rotations[:9]
    values = torch.full((2, 14, 2, 4, 64), -128, dtype=torch.int8, device=device)
    scale = torch.full((2, 14, 2, 4), torch.nan, device=device)
    part = QuantizedQueries(values[:, 4:13, 1], scale[:, 4:13, 1])
    assert run(x, weight, rotations, part, eps=EPS, softmax_scale=1.0) is part
    assert_nearest(part, truth(x, weight, rotations), 1.0)
    part.values[:] = -128
    part.scale[:] = torch.nan
    assert (values == -128).all()
    assert scale.isnan().all()


@IMPLEMENTATIONS
def test_a_head_of_zeros_stays_zero(run, device):
    x, weight, rotations = setup((1, 3, 256), 64, torch.bfloat16, torch.float32, device)
    x[:, 1, 64:128] = 0
    got = run(x, weight, rotations, empty_queries(x, 64), eps=EPS, softmax_scale=1.0)
    assert (got.values[:, 1, 1] == 0).all()
    assert got.scale.isfinite().all()


def test_fresh_queries_are_contiguous_and_scaled_by_the_root_of_the_head_dimension(device):
    x, weight, rotations = setup((2, 3, 256), 64, torch.bfloat16, torch.float32, device)
    before = [tensor.clone() for tensor in (x, weight, rotations)]
    got = rms_norm_rope_quantize(x, weight, rotations, eps=EPS)
    assert got.values.is_contiguous()
    assert got.scale.is_contiguous()
    assert_nearest(got, truth(x, weight, rotations), 0.125)
    assert all(torch.equal(tensor, old) for tensor, old in zip((x, weight, rotations), before, strict=True))


def _out(values=None, scale=None) -> QuantizedQueries:
    values = torch.zeros(2, 5, 2, 64, dtype=torch.int8) if values is None else values
    return QuantizedQueries(values, torch.zeros(2, 5, 2) if scale is None else scale)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 5, 96)}, r"weight: must be \[96\], x's channels"),
        ({"rotations": torch.ones(5, 16, dtype=torch.complex64)}, "head dimension D must be 64 or 128, got 32"),
        ({"out": _out(torch.zeros(2, 5, 128, dtype=torch.int8))}, r"out.values: must be \(2, 5, 2, 64\), got"),
        ({"out": _out(torch.zeros(2, 5, 2, 64))}, "out.values: must be torch.int8, got torch.float32"),
        (
            {"out": _out(torch.zeros(2, 5, 64, 2, dtype=torch.int8).transpose(2, 3))},
            "out.values: a token must be contiguous, got strides",
        ),
        ({"out": _out(scale=torch.zeros(2, 2, 5).transpose(1, 2))}, "out.scale: a token must be contiguous"),
        ({"out": _out(scale=torch.zeros(2, 5, 2).half())}, "out.scale: must be torch.float32, got torch.float16"),
        ({"out": _out(scale=torch.zeros(2, 5, 2, device="meta"))}, "out.scale: must be on cpu, like x, got meta"),
    ],
)
def test_rms_norm_rope_quantize_refuses(arguments, message):
    rotations = torch.ones(5, 32, dtype=torch.complex64)
    good = {"x": torch.zeros(2, 5, 128), "weight": torch.ones(128), "rotations": rotations}
    rms_norm_rope_quantize(**good, eps=EPS, out=_out())
    with pytest.raises(ValueError, match=message):
        rms_norm_rope_quantize(**({"out": _out()} | good | arguments), eps=EPS)
