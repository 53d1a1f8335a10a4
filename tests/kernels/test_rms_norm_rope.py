import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from wanfast.kernels import rms_norm, rms_norm_rope
from wanfast.kernels.rms_norm_rope import rms_norm_rope_reference, rms_norm_rope_triton
from wanfast.rope import apply_rope, rope_rotations

EPS = 1e-6
IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [rms_norm_rope_triton, rms_norm_rope_reference], ids=["kernel", "reference"]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def truth(x: Tensor, weight: Tensor, rotations: Tensor) -> Tensor:
    """The definition, in float64: no rounding but the arguments'."""
    x = x.double()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()
    y = y.unflatten(-1, (-1, 2 * rotations.shape[-1]))
    cos, sin = rotations.real.double()[:, None], rotations.imag.double()[:, None]
    even, odd = y[..., ::2], y[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def rotations_of(tokens: int, head_dim: int, device) -> Tensor:
    return rope_rotations((2, 3, -(-tokens // 6)), head_dim)[:tokens].clone().to(device)


def empty_heads(x: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*x.shape[:2], x.shape[-1] // head_dim, head_dim, dtype=dtype, device=x.device)


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize(
    ("shape", "head_dim"),
    [((2, 5, 4), 4), ((2, 3, 6), 2), ((1, 7, 72), 24), ((2, 3, 1000), 40), ((1, 3, 3072), 128), ((2, 2, 5120), 128)],
    ids=str,
)
def test_rms_norm_rope_equals_float64(run, dtype, shape, head_dim, device):
    x = (3 * torch.randn(shape, device=device)).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype)
    rotations = rotations_of(shape[1], head_dim, device)
    y = run(x, weight, rotations, empty_heads(x, head_dim, dtype), eps=EPS)
    assert_close(got=y, want=truth(x, weight, rotations), op="rms_norm_rope")


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_roundings_are_those_of_the_norm_followed_by_the_rotation(run, dtype, weight_dtype, out_dtype, device):
    x = torch.randn(2, 5, 256, device=device).to(dtype)
    weight = torch.randn(256, device=device).to(weight_dtype)
    rotations = rotations_of(5, 64, device)
    y = run(x, weight, rotations, empty_heads(x, 64, out_dtype), eps=EPS)
    chain = apply_rope(rms_norm(x, weight, eps=EPS).view(2, 5, 4, 64), rotations).to(out_dtype)
    # Only where fp32 noise falls on the edge between two 16-bit numbers may one of the roundings go the other way.
    differs = (y.float() - chain.float()).abs() > 1e-6 * chain.float().abs().max()
    assert differs.float().mean() < 0.01


@IMPLEMENTATIONS
def test_x_may_be_a_slice_of_some_tokens_of_a_fused_projection(run, device):
    qkv = torch.randn(2, 11, 3 * 96, device=device).half()[:, 2:9]
    weight, rotations = torch.randn(96, device=device), rotations_of(7, 32, device)
    for x in qkv.split(96, dim=-1):
        y = run(x, weight, rotations, empty_heads(x, 32, torch.float16), eps=EPS)
        assert_close(got=y, want=truth(x, weight, rotations), op="rms_norm_rope")


@IMPLEMENTATIONS
def test_the_result_may_be_some_tokens_of_one_of_several_tensors_in_one(run, device):
    whole = torch.full((2, 11, 2, 3, 32), 7.0, device=device, dtype=torch.bfloat16)
    x = torch.randn(2, 4, 96, device=device).bfloat16()
    weight, rotations = torch.randn(96, device=device), rotations_of(11, 32, device)
    out = whole[:, 5:9, 1]
    assert run(x, weight, rotations[5:9], out, eps=EPS) is out
    assert_close(got=out, want=truth(x, weight, rotations[5:9]), op="rms_norm_rope")
    out[:] = 7
    assert (whole == 7).all()


@IMPLEMENTATIONS
def test_eps_is_added_to_the_mean_square(run, device):
    x, weight = torch.full((1, 2, 48), 1e-3, device=device), torch.ones(48, device=device)
    rotations = rotations_of(2, 24, device)
    y = run(x, weight, rotations, empty_heads(x, 24, torch.float32), eps=EPS)
    assert_close(got=y, want=truth(x, weight, rotations), op="rms_norm_rope")
    zeros = run(torch.zeros_like(x), weight, rotations, empty_heads(x, 24, torch.float32), eps=EPS)
    assert torch.equal(zeros, torch.zeros_like(zeros))


def test_a_fresh_result_has_x_s_dtype_unless_another_is_asked_for_and_arguments_are_left_alone(device):
    x, weight = torch.randn(2, 3, 48, device=device).half(), torch.randn(48, device=device)
    rotations = rotations_of(3, 24, device)
    before = [tensor.clone() for tensor in (x, weight, rotations)]
    y = rms_norm_rope(x, weight, rotations, eps=EPS)
    assert (y.dtype, y.shape, y.is_contiguous()) == (torch.float16, (2, 3, 2, 24), True)
    assert rms_norm_rope(x, weight, rotations, eps=EPS, out_dtype=torch.float32).dtype == torch.float32
    out = torch.empty_like(y)
    assert rms_norm_rope(x, weight, rotations, eps=EPS, out=out) is out
    assert torch.equal(out, y)
    assert all(torch.equal(tensor, old) for tensor, old in zip((x, weight, rotations), before, strict=True))


ROTATIONS = torch.ones(5, 4, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 16, 5).transpose(1, 2)}, "x: channels must be adjacent in memory, got strides"),
        ({"x": torch.zeros(5, 16)}, r"x: must be \[B, T, C\], got \(5, 16\)"),
        ({"x": torch.zeros(2, 5, 16).double()}, "x: must be float32, bfloat16 or float16, got torch.float64"),
        ({"x": torch.zeros(2, 5, 2)}, "x: must have 4 to 8192 channels, got 2"),
        ({"x": torch.zeros(2, 5, 8200)}, "x: must have 4 to 8192 channels, got 8200"),
        ({"weight": torch.ones(15)}, r"weight: must be \[16\], x's channels, got \(15,\)"),
        ({"rotations": ROTATIONS.real}, "rotations: must be complex64, got torch.float32"),
        (
            {"rotations": ROTATIONS[:4]},
            r"rotations: must be \[5, D / 2\], D a divisor of x's 16 channels, got \(4, 4\)",
        ),
        ({"rotations": ROTATIONS[:, :3].clone()}, r"rotations: must be \[5, D / 2\].*got \(5, 3\)"),
        ({"rotations": ROTATIONS.repeat(1, 2)[:, ::2]}, "rotations: must be contiguous, got strides"),
        ({"rotations": ROTATIONS.conj()}, "rotations: must hold their values"),
        ({"rotations": ROTATIONS.to("meta")}, "rotations: must be on cpu, like x, got meta"),
        ({"out": torch.zeros(2, 5, 16)}, r"out: must be \(2, 5, 2, 8\), got \(2, 5, 16\)"),
        ({"out": torch.zeros(2, 2, 5, 8).transpose(1, 2)}, "out: the heads of a token must be adjacent in memory"),
        ({"out": torch.zeros(2, 5, 2, 8).double()}, "out: must be float32, bfloat16 or float16, got torch.float64"),
        ({"out": torch.zeros(2, 5, 2, 8, device="meta")}, "out: must be on cpu, like x, got meta"),
        ({"out_dtype": torch.int8}, "out_dtype: must be float32, bfloat16 or float16, got torch.int8"),
    ],
)
def test_rms_norm_rope_refuses(arguments, message):
    good = {"x": torch.zeros(2, 5, 16), "weight": torch.ones(16), "rotations": ROTATIONS}
    rms_norm_rope(**good, eps=EPS)
    with pytest.raises(ValueError, match=message):
        rms_norm_rope(**(good | arguments), eps=EPS)
