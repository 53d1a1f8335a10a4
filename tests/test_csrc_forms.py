"""The C++ extension in all its forms, as direct sums, in fp32 and bf16, with what follows, against float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close
from torch import Tensor

from wanfast.vae import extension
from wanfast.vae.conv import ConvWeight, causal_conv3d, causal_conv3d_extension, prepare

_C = pytest.importorskip("wanfast._C", reason="wanfast was installed without a C++ compiler")

CL3D = torch.channels_last_3d
# Every way to compute that this CPU has: frames' dtype, whether bf16 is multiplied in pairs, instruction set.
WAYS = [(torch.float32, False, name) for name in _C.instruction_sets()]
WAYS += [(torch.bfloat16, False, name) for name in _C.instruction_sets()]
WAYS += [(torch.bfloat16, True, _C.instruction_sets()[0])] if _C.has_bf16_products() else []
ALL_WAYS = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)).replace("torch.", ""))

# Kernel, frames of history that there may be, and sizes [C, T, H, W] that the form takes.
FORMS = {
    "same": ((3, 3, 3), (0, 1, 2), [(3, 1, 5, 9), (33, 3, 4, 17)]),
    "half_picture": ((1, 3, 3), (0,), [(5, 1, 2, 2), (20, 2, 6, 34), (33, 1, 4, 58)]),
    "half_frames": ((3, 1, 1), (0, 1), [(5, 2, 3, 5), (33, 4, 2, 17)]),
    "double_picture": ((1, 2, 2), (0,), [(5, 1, 1, 1), (20, 2, 3, 5), (33, 1, 4, 31)]),
    "double_frames": ((3, 1, 1), (0, 1, 2), [(5, 1, 3, 5), (33, 2, 2, 17)]),
}
CASES = [
    (form, size, seen, out_channels)
    for (form, (_, histories, sizes)), out_channels in itertools.product(FORMS.items(), (6, 34))
    for size, seen in itertools.product(sizes, histories)
]
ALL_CASES = pytest.mark.parametrize(("form", "size", "seen", "out_channels"), CASES)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape).to(dtype)
    return values.contiguous(memory_format=CL3D) if len(shape) == 5 else values


def problem(form: str, size: tuple[int, ...], seen: int, out_channels: int, dtype: torch.dtype):
    """x, its history of `seen` frames, weight as `prepare` takes it, bias."""
    kernel = FORMS[form][0]
    channels, frames, height, width = size
    x = random(2, channels, frames, height, width, dtype=dtype)
    history = random(2, channels, seen, height, width, dtype=dtype) if seen else None
    sets = (4,) if form == "double_picture" else ()
    return x, history, random(*sets, out_channels, channels, *kernel, dtype=dtype), random(out_channels, dtype=dtype)


def packed(weight: Tensor, form: str, as_pairs: bool) -> ConvWeight:
    sets = weight if form == "double_picture" else weight.unsqueeze(0)
    shape = tuple(sets.shape[1:])
    return ConvWeight(extension.pack(sets, as_pairs=as_pairs), shape, weight.dtype, form, is_packed=True)


def truth(form: str, x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """Each form by its definition, in float64 and without the code under test."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    if form == "half_picture":
        return F.conv3d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=(1, 2, 2))
    if form == "double_picture":
        # The four sets, each on its own doubled picture: an output of parity p sees taps p - 1 and p around its pixel.
        y = x.new_empty((2, weight.shape[1], x.shape[2], 2 * x.shape[3], 2 * x.shape[4]))
        for one, (row, column) in zip(weight, itertools.product((0, 1), repeat=2), strict=True):
            edges = F.pad(x, (1 - column, column, 1 - row, row))
            y[..., row::2, column::2] = F.conv3d(edges, one, bias)
        return y
    lead = 1 if form == "half_frames" else weight.shape[2] - 1
    seen = 0 if history is None else history.shape[2]
    frames = x if history is None else torch.cat((history.double(), x), dim=2)
    edge = weight.shape[3] // 2
    frames = F.pad(frames, (edge, edge, edge, edge, lead - seen, 0))
    y = F.conv3d(frames, weight, bias, stride=(2, 1, 1) if form == "half_frames" else 1)
    if form == "double_frames":
        even, odd = y.chunk(2, dim=1)
        y = torch.stack((even, odd), dim=3).flatten(2, 3)
    return y


def normed(y: Tensor, norm: Tensor) -> Tensor:
    y = y.double()
    return F.silu(y / y.norm(dim=1, keepdim=True).clamp_min(1e-12) * norm.double())


def op(dtype: torch.dtype) -> str:
    return "conv3d_fp32" if dtype == torch.float32 else "conv3d_bf16"


@ALL_WAYS
@ALL_CASES
def test_equals_float64(way, form, size, seen, out_channels):
    dtype, as_pairs, instruction_set = way
    x, history, weight, bias = problem(form, size, seen, out_channels, dtype)
    want = truth(form, x, history, weight, bias)
    prepared = packed(weight, form, as_pairs)
    y = causal_conv3d_extension(x, history, prepared, bias, method="direct", instruction_set=instruction_set)
    assert y.shape == want.shape == prepared.out_shape(x) and y.dtype == dtype
    assert_close(got=y, want=want, op=op(dtype))


@ALL_WAYS
@pytest.mark.parametrize("form", FORMS)
def test_what_follows_is_what_it_is_on_its_own(way, form):
    """The residual is added before the one rounding; the norm and SiLU have the bits of the pass of their own."""
    dtype, as_pairs, instruction_set = way
    _, histories, sizes = FORMS[form]
    x, history, weight, bias = problem(form, sizes[-1], histories[-1], 34, dtype)
    want = truth(form, x, history, weight, bias)
    residual, norm = random(*want.shape, dtype=dtype), random(want.shape[1], 1, 1, 1, dtype=dtype)
    prepared, kept = packed(weight, form, as_pairs), residual.clone()

    def run(**options):
        return causal_conv3d_extension(
            x, history, prepared, bias, method="direct", instruction_set=instruction_set, **options
        )

    added = run(residual=residual)
    assert_close(got=added, want=want + residual.double(), op=op(dtype))
    both = run(residual=residual, norm=norm)
    assert torch.equal(residual, kept)
    in_place = residual.clone()
    assert run(residual=in_place, overwrite_residual=True) is in_place and torch.equal(in_place, added)
    on_its_own = torch.empty_like(added)
    extension.norm_silu(added, norm, on_its_own, instruction_set=instruction_set)
    assert torch.equal(both, on_its_own)
    assert_close(got=run(norm=norm), want=normed(run(), norm), op="rms_norm_silu")


@ALL_WAYS
@pytest.mark.parametrize("channels", [3, 16, 31, 96, 200])
def test_norm_and_silu_equal_float64(way, channels):
    dtype, _, instruction_set = way
    x, norm = random(2, channels, 2, 5, 7, dtype=dtype) * 8, random(channels, 1, 1, 1, dtype=dtype) * 4
    x[0, :, 1, 2, 3] = 0.0
    y = torch.full_like(x, float("nan"))
    extension.norm_silu(x, norm, y, instruction_set=instruction_set)
    assert_close(got=y, want=normed(x, norm), op="rms_norm_silu")
    extension.norm_silu(x, norm, x, instruction_set=instruction_set)
    assert torch.equal(x, y)


@ALL_WAYS
def test_silu_of_large_and_small_values(way):
    """Of one channel the norm is the sign, so the weight sets what SiLU sees: far beyond where exp overflows."""
    dtype, _, instruction_set = way
    values = torch.cat((torch.linspace(-200, 200, 401), torch.tensor([1e-20, -1e-20, 1e30]))).to(dtype)
    for value in values:
        x = torch.ones(1, 1, 1, 1, 2, dtype=dtype)
        y = torch.empty_like(x)
        extension.norm_silu(x, value.view(1, 1, 1, 1), y, instruction_set=instruction_set)
        want, relative = F.silu(value.double()), 2**-7 if dtype == torch.bfloat16 else 2e-6
        # Below -87 the exact value is smaller than 1e-36, and what is returned smaller than 1e-35.
        assert torch.allclose(y.double(), want.expand_as(y), rtol=relative, atol=1e-35)


@ALL_WAYS
def test_nan_reaches_exactly_the_outputs_that_read_it(way):
    dtype, as_pairs, instruction_set = way
    x, history, weight, bias = problem("half_picture", (18, 1, 6, 30), 0, 20, dtype)
    x[0, 3, 0, 2, 15] = float("nan")
    y = causal_conv3d_extension(
        x, history, packed(weight, "half_picture", as_pairs), bias, method="direct", instruction_set=instruction_set
    )
    assert torch.equal(y.isnan(), truth("half_picture", x, history, weight, bias).isnan())
    pixels = torch.randn(1, 5, 1, 1, 3).to(dtype).contiguous(memory_format=CL3D)
    pixels[0, 4, 0, 0, 1] = float("nan")
    extension.norm_silu(pixels, torch.ones(5), pixels, instruction_set=instruction_set)
    assert pixels.isnan()[0, :, 0, 0].any(0).tolist() == [False, True, False]


@ALL_WAYS
def test_a_nan_stays_one_whatever_its_bits(way):
    """Rounding to bf16 adds to the bits: those of this NaN would become a zero's."""
    dtype, as_pairs, instruction_set = way
    x, _, weight, _ = problem("same", (3, 1, 2, 5), 0, 18, dtype)
    prepared = packed(weight, "same", as_pairs)
    bias = torch.full((18,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    y = torch.zeros(prepared.out_shape(x), dtype=dtype).contiguous(memory_format=CL3D)
    extension.convolve(
        x, None, prepared.data, prepared.shape, "same", bias, y, method="direct", instruction_set=instruction_set
    )
    assert y.isnan().all()


@ALL_WAYS
@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_threads_gives_the_same_bits(way, form, set_threads):
    dtype, as_pairs, instruction_set = way
    x, history, weight, bias = problem(form, (40, 2, 12, 62), FORMS[form][1][-1], 48, dtype)
    prepared, results = packed(weight, form, as_pairs), []
    norm = random(prepared.out_shape(x)[1], 1, 1, 1, dtype=dtype)
    for threads in (1, 2, 8):
        set_threads(threads)
        results.append(
            causal_conv3d_extension(
                x, history, prepared, bias, norm=norm, method="direct", instruction_set=instruction_set
            )
        )
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_bf16_takes_the_extension_where_torch_has_no_matrix_units(monkeypatch):
    weight = torch.randn(4, 4, 3, 3, 3).bfloat16()
    is_vector = _C.instruction_sets() != ["portable"] and not _C.has_bf16_matrices()
    assert prepare(weight).is_packed == extension.serves(torch.bfloat16) == is_vector
    monkeypatch.setattr(extension, "_C", None)
    assert not extension.serves(torch.bfloat16) and extension.instruction_sets() == []


@pytest.mark.skipif(not _C.has_bf16_products(), reason="this CPU has no bf16 products")
def test_refuses_pairs_on_an_instruction_set_without_products():
    x, history, weight, bias = problem("same", (4, 1, 3, 3), 0, 4, torch.bfloat16)
    with pytest.raises(ValueError, match="avx2 has no bf16 products"):
        causal_conv3d_extension(x, history, packed(weight, "same", True), bias, instruction_set="avx2")


BAD_ARGUMENTS = {
    "odd rows": ("half_picture", (4, 1, 3, 4), {}, "x: must have an even number of rows and columns"),
    "odd frames": ("half_frames", (4, 3, 3, 4), {}, "x: must have an even number of frames"),
    "residual": ("same", (4, 1, 3, 4), {"residual": torch.zeros(2, 6, 1, 3, 3)}, "residual: must be .2, 6, 1, 3, 4."),
    "norm": ("double_frames", (4, 1, 3, 4), {"norm": torch.ones(6, 1, 1, 1)}, "norm: must be .3, 1, 1, 1."),
    "residual's dtype": (
        "same",
        (4, 1, 3, 4),
        {"residual": torch.zeros(2, 6, 1, 3, 4).half()},
        "residual: must be t",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_refuses_a_bad_argument_by_name(name):
    form, size, options, message = BAD_ARGUMENTS[name]
    x, history, weight, bias = problem(form, size, 0, 6, torch.float32)
    with pytest.raises(ValueError, match=message):
        causal_conv3d(x, history, prepare(weight, form), bias, **options)


def test_refuses_a_weight_of_another_form():
    with pytest.raises(ValueError, match="weight: must have a kernel of"):
        prepare(torch.randn(4, 4, 3, 3, 3), "half_frames")
    with pytest.raises(ValueError, match="weight: must have an even number of outputs"):
        prepare(torch.randn(5, 4, 3, 1, 1), "double_frames")
