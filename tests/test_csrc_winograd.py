"""Winograd's convolution in the C++ extension, on every instruction set of this CPU, against float64."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close
from torch import Tensor

from wanfast.vae import extension
from wanfast.vae.conv import ConvWeight, causal_conv3d, causal_conv3d_extension, prepare

_C = pytest.importorskip("wanfast._C", reason="wanfast was installed without a C++ compiler")

CL3D = torch.channels_last_3d
SETS = pytest.mark.parametrize("instruction_set", _C.instruction_sets())
FORMS = pytest.mark.parametrize("form", ["same", "double_picture"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def frames(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=CL3D)


def phases(weight: Tensor) -> Tensor:
    """[O, C, 3, 3] taps on a doubled picture to the four sets [4, O, C, 1, 2, 2] on the picture, in float64."""
    sums = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]).double()  # even, odd; one row per tap
    sets = [torch.einsum("ocij,ai,bj->ocab", weight.double(), *pair) for pair in itertools.product(sums, repeat=2)]
    return torch.stack(sets).unsqueeze(3)


def problem(form: str, shape: tuple[int, ...], out_channels: int, seen: int = 0, kt: int = 3):
    """x [B, C, T, H, W], its history, the weight prepared, a bias, and the result in float64."""
    batch, channels, _, height, width = shape
    x, bias = frames(*shape), torch.randn(out_channels)
    if form == "double_picture":
        weight = torch.randn(out_channels, channels, 3, 3)
        doubled = x.double().repeat_interleave(2, 3).repeat_interleave(2, 4)
        want = F.conv3d(doubled, weight.double().unsqueeze(2), bias.double(), padding=(0, 1, 1))
        return x, None, prepare(phases(weight).float(), form), bias, want
    seen = min(seen, kt - 1)
    history = frames(batch, channels, seen, height, width) if seen else None
    weight = torch.randn(out_channels, channels, kt, 3, 3)
    whole = x.double() if history is None else torch.cat((history, x), dim=2).double()
    want = F.conv3d(F.pad(whole, (1, 1, 1, 1, kt - 1 - seen, 0)), weight.double(), bias.double())
    return x, history, prepare(weight), bias, want


def run(x: Tensor, history: Tensor | None, weight: ConvWeight, bias: Tensor | None, **options) -> Tensor:
    return causal_conv3d_extension(x, history, weight, bias, **({"method": "winograd"} | options))


@SETS
@FORMS
@pytest.mark.parametrize("height", range(1, 6))
@pytest.mark.parametrize("width", range(1, 8))
def test_every_small_picture(instruction_set, form, height, width):
    x, history, weight, bias, want = problem(form, (2, 5, 2, height, width), 7, seen=1)
    y = run(x, history, weight, bias, instruction_set=instruction_set)
    assert y.shape == want.shape
    assert_close(got=y, want=want, op="conv3d_fp32")


# x [B, C, T, H, W], O, frames of history: channels around where vectors, panels, passes and blocks end; rows of tiles
# longer than what becomes pixels at a time; pictures of several units, which begin anywhere in a row.
CASES = [
    ((1, 1, 1, 2, 2), 1, 0),
    ((1, 3, 3, 4, 5), 96, 1),
    ((2, 16, 1, 5, 9), 16, 2),
    ((1, 17, 2, 3, 4), 33, 0),
    ((1, 31, 1, 6, 67), 48, 2),
    ((1, 96, 2, 4, 6), 3, 2),
    ((1, 64, 4, 7, 5), 20, 0),
    ((1, 20, 1, 33, 29), 18, 1),
    ((1, 385, 1, 3, 5), 17, 2),
]


@SETS
@pytest.mark.parametrize(("form", "kt"), [("same", 3), ("same", 1), ("double_picture", 1)])
@pytest.mark.parametrize(("shape", "out_channels", "seen"), CASES)
def test_equals_float64(instruction_set, form, kt, shape, out_channels, seen):
    x, history, weight, bias, want = problem(form, shape, out_channels, seen, kt)
    y = run(x, history, weight, bias, instruction_set=instruction_set)
    assert_close(got=y, want=want, op="conv3d_fp32")


@SETS
@FORMS
def test_is_as_exact_as_the_direct_sum(instruction_set, form):
    """Shorter sums make up for the roundings of what is multiplied: measured, a quarter to a half of its square."""
    x, history, weight, bias, want = problem(form, (1, 200, 1, 10, 12), 40, seen=2)
    direct, winograd = (
        float((run(x, history, weight, bias, method=method, instruction_set=instruction_set) - want).square().mean())
        for method in ("direct", "winograd")
    )
    assert 0 < winograd < direct


@SETS
@FORMS
def test_what_follows_is_what_it_is_on_its_own(instruction_set, form):
    x, history, weight, bias, want = problem(form, (2, 21, 2, 5, 19), 35, seen=1)
    residual, norm = frames(*want.shape), torch.randn(35, 1, 1, 1)
    kept, whole = residual.clone(), want + residual.double()
    options = {"instruction_set": instruction_set}
    added = run(x, history, weight, bias, residual=residual, **options)
    assert_close(got=added, want=whole, op="conv3d_fp32")
    assert torch.equal(residual, kept)
    in_place = residual.clone()
    assert run(x, history, weight, bias, residual=in_place, overwrite_residual=True, **options) is in_place
    assert torch.equal(in_place, added)
    normed = run(x, history, weight, bias, residual=residual, norm=norm, **options)
    length = added.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    assert_close(got=normed, want=F.silu(added.double() / length * norm.double()), op="rms_norm_silu")
    assert_close(
        got=run(x, history, weight, None, **options), want=want - bias.double().view(-1, 1, 1, 1), op="conv3d_fp32"
    )


@SETS
@FORMS
def test_any_number_of_threads_gives_the_same_bits(instruction_set, form, set_threads):
    x, history, weight, bias, want = problem(form, (1, 18, 2, 41, 47), 40, seen=1)
    results = []
    for threads in (1, 2, 8):
        set_threads(threads)
        results.append(run(x, history, weight, bias, instruction_set=instruction_set))
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert_close(got=results[0], want=want, op="conv3d_fp32")


@SETS
def test_chunks_and_batches_do_not_change_the_bits(instruction_set):
    x, history, weight, bias, _ = problem("same", (2, 20, 4, 9, 21), 19, seen=2)
    options = {"instruction_set": instruction_set}
    whole = run(x, history, weight, bias, **options)
    assert torch.equal(run(x[1:], history[1:], weight, bias, **options), whole[1:])
    assert torch.equal(run(x[:, :, 2:], x[:, :, :2], weight, bias, **options), whole[:, :, 2:])
    nothing = torch.zeros_like(history)
    assert torch.equal(run(x, None, weight, bias, **options), run(x, nothing, weight, bias, **options))


@SETS
@FORMS
@pytest.mark.parametrize("axis", [3, 4])
def test_strips_cut_at_even_places_have_the_bits_of_the_whole(instruction_set, form, axis):
    x, history, weight, bias, _ = problem(form, (1, 17, 1, 12, 13), 18, seen=2)
    options, scale = {"instruction_set": instruction_set}, 2 if form == "double_picture" else 1
    whole = run(x, history, weight, bias, **options)
    cut, keep = 4, x.shape[axis] - 4
    past = None if history is None else history.narrow(axis, cut, keep)
    strip = run(x.narrow(axis, cut, keep), past, weight, bias, **options)
    inner = (keep - 1) * scale  # without the row or column next to the cut, which sees another picture
    assert torch.equal(strip.narrow(axis, scale, inner), whole.narrow(axis, (cut + 1) * scale, inner))


@SETS
@FORMS
def test_what_is_not_finite_reaches_exactly_the_outputs_that_read_it(instruction_set, form):
    x, history, weight, bias, _ = problem(form, (1, 18, 3, 6, 30), 20, seen=2)
    x[0, 3, 1, 2, 15] = float("nan")
    x[0, 17, 0, 5, 29] = float("inf")
    x[0, 1, 2, 3, 4] = float("-inf")
    if history is not None:
        history[0, 16, 0, 0, 0] = float("-inf")
    got = run(x, history, weight, bias, instruction_set=instruction_set)
    want = run(x, history, weight, bias, instruction_set=instruction_set, method="direct")
    assert torch.equal(got.isfinite(), want.isfinite())
    assert 0 < int(want.isfinite().sum()) < want.numel()
    assert_close(got=got[got.isfinite()], want=want[want.isfinite()], op="conv3d_fp32")


@SETS
@FORMS
def test_reads_and_writes_nothing_outside_its_arguments(instruction_set, form):
    """Each argument lies between NaN pages: reading beside it poisons the result, writing beside it is seen."""
    x, history, weight, bias, want = problem(form, (1, 19, 1, 3, 15), 21, seen=1)

    def between(tensor: Tensor) -> Tensor:
        page = torch.full((tensor.numel() + 4096,), float("nan"))
        return page[2048:-2048].as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    place = between(frames(*want.shape).zero_())
    y = run(
        between(x),
        None if history is None else between(history),
        replace(weight, data=between(weight.data)),
        between(bias),
        residual=place,
        overwrite_residual=True,
        instruction_set=instruction_set,
    )
    assert y is place
    assert_close(got=y, want=want, op="conv3d_fp32")
    page = torch.empty(0).set_(y.untyped_storage())
    assert page[:2048].isnan().all() and page[-2048:].isnan().all()


@FORMS
@pytest.mark.parametrize(("channels", "method"), [(15, "direct"), (16, "winograd"), (40, "winograd")])
def test_channels_choose_the_method(form, channels, method):
    """And nothing else does, so that strips and first chunks are computed as the rest is."""
    for shape in ((1, channels, 1, 1, 1), (1, channels, 3, 24, 40)):
        x, history, weight, bias, _ = problem(form, shape, 24, seen=2)
        got, _ = causal_conv3d(x, history, weight, bias)
        assert torch.equal(got, run(x, history, weight, bias, method=method))
        other = run(x, history, weight, bias, method="direct" if method == "winograd" else "winograd")
        assert shape[-1] == 1 or not torch.equal(got, other)


@SETS
def test_bf16_frames_with_fp32_weights(instruction_set):
    x, history, _, bias, _ = problem("same", (1, 33, 2, 5, 9), 20, seen=1)
    weight = torch.randn(20, 33, 3, 3, 3).bfloat16()
    x, history, bias = x.bfloat16(), history.bfloat16(), bias.bfloat16()
    packed = extension.pack(weight.unsqueeze(0), as_pairs=False)
    prepared = ConvWeight(packed, tuple(weight.shape), torch.bfloat16, "same", is_packed=True)
    y = run(x, history, prepared, bias, instruction_set=instruction_set)
    whole = F.pad(torch.cat((history, x), dim=2).double(), (1, 1, 1, 1, 1, 0))
    assert y.dtype == torch.bfloat16
    assert_close(got=y, want=F.conv3d(whole, weight.double(), bias.double()), op="conv3d_bf16")


@pytest.mark.parametrize(("kernel", "form"), [((3, 1, 1), "same"), ((1, 3, 3), "half_picture"), ((3, 3, 1), "same")])
def test_refuses_what_it_does_not_serve(kernel, form):
    x, weight = frames(1, 16, 1, 4, 4), prepare(torch.randn(16, 16, *kernel), form)
    with pytest.raises(ValueError, match="method: winograd takes 3 x 3 kernels of stride 1"):
        run(x, None, weight, None)


@pytest.mark.parametrize(("odd", "axis"), [(slice(2, None), "rows"), (slice(1, None, 2), "columns")])
def test_refuses_sets_that_are_no_sums_of_taps(odd, axis):
    sets = phases(torch.randn(3, 2, 3, 3)).float()
    prepare(sets, "double_picture")
    spoiled = sets.clone()
    spoiled[odd, 0, 0, 0, 0, 0] += 0.01
    with pytest.raises(ValueError, match=f"weight: must be sums of 3 x 3 taps.*{axis}"):
        prepare(spoiled, "double_picture")
