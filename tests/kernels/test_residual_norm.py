import pytest
import torch
from norm_truth import EPS, added, weighted_norm
from tolerance import assert_close

from wanfast.kernels import (
    gated_residual,
    layer_norm,
    layer_norm_modulate,
    residual_layer_norm,
    residual_layer_norm_modulate,
)
from wanfast.kernels._row_norm import RowNorm
from wanfast.kernels.residual_norm import residual_norm_reference, residual_norm_triton

IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [residual_norm_triton, residual_norm_reference], ids=["kernel", "reference"]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def check(run, norm: RowNorm, out_dtype: torch.dtype) -> None:
    """The new stream is held to float64, and the result to the norm of the stream as it was written."""
    x, first_tokens = norm.x, norm.first_tokens
    want = added(x, norm.y, norm.gate, first_tokens)
    others = [tensor for tensor in (norm.y, norm.gate, norm.scale, norm.shift) if tensor is not None]
    before = [tensor.clone() for tensor in others]
    out = run(norm, out_dtype)
    assert (out.dtype, out.shape) == (out_dtype, x.shape)
    assert out.data_ptr() != x.data_ptr()
    assert_close(got=x, want=want, op="gated_residual")
    assert_close(got=out, want=weighted_norm(x, norm.scale, norm.shift, first_tokens), op="layer_norm_modulate")
    assert all(torch.equal(tensor, old) for tensor, old in zip(others, before, strict=True))


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 4, 64), (3, 1, 1000), (1, 3, 3072), (2, 2, 5120)], ids=str)
def test_a_gated_residual_goes_on_modulated(run, dtype, y_dtype, shape, device):
    batch, _, channels = shape
    x = (3 * torch.randn(shape, device=device) + 1).to(dtype)
    y = torch.randn(shape, device=device).to(y_dtype)
    gate, scale, shift = torch.randn(3, batch, 1, channels, device=device)
    check(run, RowNorm(x=x, y=y, gate=gate, scale=scale, shift=shift, eps=EPS), y_dtype)


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("is_gated", [False, True], ids=["added", "gated"])
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 3, 3072), (2, 2, 5120)], ids=str)
def test_a_residual_goes_on_with_a_learned_weight_and_bias(run, dtype, is_gated, shape, device):
    x, y = torch.randn(2, *shape, device=device)
    gate = torch.randn(shape[0], 1, shape[2], device=device) if is_gated else None
    weight, bias = torch.randn(2, shape[2], device=device).to(dtype)
    check(run, RowNorm(x=x, y=y, gate=gate, scale=weight, shift=bias, eps=EPS), dtype)


@IMPLEMENTATIONS
@pytest.mark.parametrize("first_tokens", [0, 1, 4, 7])
def test_the_first_tokens_take_rows_of_their_own(run, first_tokens, device):
    x, y = torch.randn(2, 2, 7, 100, device=device)
    gate, scale, shift = torch.randn(2, 2, 6, 100, device=device).unbind(2)[1:4]
    norm = RowNorm(x=x, y=y, gate=gate, scale=scale, shift=shift, eps=EPS, first_tokens=first_tokens)
    check(run, norm, torch.float32)


@IMPLEMENTATIONS
@pytest.mark.parametrize(("gate_rows", "scale_rows"), [(1, 2), (2, 1)])
def test_gate_and_scale_may_have_other_numbers_of_rows(run, gate_rows, scale_rows, device):
    x, y = torch.randn(2, 1, 5, 40, device=device)
    gate = torch.randn(1, gate_rows, 40, device=device)
    scale, shift = torch.randn(2, 1, scale_rows, 40, device=device)
    check(run, RowNorm(x=x, y=y, gate=gate, scale=scale, shift=shift, eps=EPS, first_tokens=2), torch.float32)


@IMPLEMENTATIONS
def test_a_run_of_tokens_of_the_stream_may_be_updated_alone(run, device):
    stream, y = torch.randn(1, 9, 64, device=device), torch.randn(1, 4, 64, device=device).bfloat16()
    before = stream.clone()
    weight, bias = torch.randn(2, 64, device=device)
    check(run, RowNorm(x=stream[:, 3:7], y=y, scale=weight, shift=bias, eps=EPS), torch.bfloat16)
    assert torch.equal(stream[:, :3], before[:, :3])
    assert torch.equal(stream[:, 7:], before[:, 7:])


@IMPLEMENTATIONS
def test_a_mean_far_above_the_deviation_survives(run, device):
    x, y = 1000 + torch.randn(1, 4, 1000, device=device), torch.randn(1, 4, 1000, device=device)
    gate, scale, shift = torch.zeros(3, 1, 1, 1000, device=device)
    check(run, RowNorm(x=x, y=y, gate=gate, scale=scale, shift=shift, eps=EPS), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_public_operations_equal_a_residual_and_a_norm(dtype, device):
    x, y = torch.randn(2, 1, 5, 96, device=device).to(dtype)
    gate, scale, shift = torch.randn(3, 1, 2, 96, device=device)
    weight, bias = scale[0, 0], shift[0, 0]
    want_x = gated_residual(x, y, gate, first_tokens=2)
    for run, plain, rows, options in (
        (residual_layer_norm_modulate, layer_norm_modulate, (scale, shift), {"first_tokens": 2}),
        (residual_layer_norm, layer_norm, (weight, bias), {}),
    ):
        stream = x.clone()
        got = run(stream, y, *rows, eps=EPS, gate=gate, first_tokens=2, out_dtype=torch.float32)
        assert torch.equal(stream, want_x)
        assert_close(
            got=got,
            want=plain(want_x, *rows, eps=EPS, out_dtype=torch.float32, **options).double(),
            op="layer_norm_modulate",
        )
        assert run(stream, y, *rows, eps=EPS).dtype == dtype


ZEROS = torch.zeros(2, 2, 8)


@pytest.mark.parametrize("run", [residual_layer_norm, residual_layer_norm_modulate])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 8, 5).transpose(1, 2)}, "x: must be contiguous, got strides"),
        ({"x": torch.zeros(10, 8)}, r"x: must be \[B, T, C\], got \(10, 8\)"),
        ({"y": torch.zeros(2, 8, 5).transpose(1, 2)}, "y: must be contiguous, got strides"),
        ({"y": torch.zeros(2, 4, 8)}, r"y: must have x's shape \(2, 5, 8\), got \(2, 4, 8\)"),
        ({"y": torch.zeros(2, 5, 8, device="meta")}, "y: must be on cpu, like x, got meta"),
        ({"gate": torch.zeros(2, 5, 8)}, r"gate: must be \[2, 1 or 2, 8\] for x of shape \(2, 5, 8\), got \(2, 5, 8\)"),
        ({"gate": ZEROS.repeat(1, 1, 2)[..., ::2]}, "gate: channels must be adjacent in memory, got strides"),
        ({"first_tokens": 6}, "first_tokens: must be 0 to 5, the tokens of x, got 6"),
        ({"out_dtype": torch.int8}, "out_dtype: must be float32, bfloat16 or float16, got torch.int8"),
    ],
)
def test_residual_norms_refuse(run, arguments, message):
    rows = (torch.ones(8), torch.ones(8)) if run is residual_layer_norm else (ZEROS, ZEROS)
    good = {"x": torch.zeros(2, 5, 8), "y": torch.zeros(2, 5, 8), "gate": ZEROS, "first_tokens": 0, "out_dtype": None}

    def call(x, y, **options):
        return run(x, y, *rows, eps=EPS, **options)

    call(**good)
    with pytest.raises(ValueError, match=message):
        call(**(good | arguments))


def test_residual_norms_refuse_weights_that_do_not_fit():
    x = torch.zeros(2, 5, 8)
    with pytest.raises(ValueError, match=r"bias: must be \[8\], x's channels, got \(7,\)"):
        residual_layer_norm(x, x.clone(), torch.ones(8), torch.ones(7), eps=EPS)
    with pytest.raises(ValueError, match=r"shift: must have scale's shape \(2, 2, 8\), got \(2, 1, 8\)"):
        residual_layer_norm_modulate(x, x.clone(), ZEROS, ZEROS[:, :1], eps=EPS)
