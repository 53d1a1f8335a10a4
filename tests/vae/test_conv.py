"""causal_conv3d, whichever path computes it: its definition, its history, its layouts and what it refuses."""

import logging

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close
from torch import Tensor

from wanfast.vae import conv
from wanfast.vae.conv import causal_conv3d, causal_conv3d_reference, prepare

KERNELS = [(3, 3, 3), (3, 1, 1), (1, 1, 1), (1, 3, 3)]
SEEN = [(kernel, seen) for kernel in KERNELS for seen in (None, *range(kernel[0]))]  # every history a kernel can have


@pytest.fixture(params=["extension", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths, on every machine that has both."""
    if request.param == "torch":
        monkeypatch.setattr(conv, "_C", None)
    elif conv._C is None:
        pytest.skip("wanfast was installed without a C++ compiler")
    return str(request.param)


def random_frames(batch: int, channels: int, frames: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, channels, frames, height, width).contiguous(memory_format=torch.channels_last_3d)


def truth(x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition in float64, without the code under test."""
    kt, kh, kw = weight.shape[2:]
    seen = 0 if history is None else history.shape[2]
    frames = x if history is None else torch.cat((history, x), dim=2)
    frames = F.pad(frames.double(), (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1 - seen, 0))
    return F.conv3d(frames, weight.double(), bias.double())


@pytest.mark.parametrize(("kernel", "seen"), SEEN)
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 7, 5), (2, 3, 17), (4, 1, 33)])
def test_equals_the_definition(path, kernel, seen, frames, height, width):
    x = random_frames(2, 5, frames, height, width)
    history = None if seen is None else random_frames(2, 5, seen, height, width)
    weight, bias = torch.randn(7, 5, *kernel), torch.randn(7)
    y, _ = causal_conv3d(x, history, prepare(weight), bias)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert_close(got=y, want=truth(x, history, weight, bias), op="conv3d_fp32")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cuts", [(1, 1, 1, 1, 1, 1), (1, 4, 1), (2, 1, 3), (5, 1)])
def test_cut_into_chunks_equals_whole(path, kernel, cuts):
    x = random_frames(2, 18, sum(cuts), 5, 19)
    weight, bias = prepare(torch.randn(20, 18, *kernel)), torch.randn(20)
    whole, _ = causal_conv3d(x, None, weight, bias)
    history, chunks = None, []
    for chunk in x.split(cuts, dim=2):
        y, history = causal_conv3d(chunk, history, weight, bias)
        chunks.append(y)
    if path == "extension":
        assert torch.equal(torch.cat(chunks, dim=2), whole)
    assert_close(got=torch.cat(chunks, dim=2), want=whole, op="conv3d_fp32")


@pytest.mark.parametrize("seen", [0, 1, 2])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_next_history_is_the_last_frames_seen(path, seen, frames):
    x, before = random_frames(1, 4, frames, 3, 3), random_frames(1, 4, seen, 3, 3)
    _, after = causal_conv3d(x, before, prepare(torch.randn(4, 4, 3, 3, 3)), torch.randn(4))
    assert torch.equal(after, torch.cat((before, x), dim=2)[:, :, -2:])
    assert after.is_contiguous(memory_format=torch.channels_last_3d)


def test_next_history_has_its_own_memory(path):
    x = random_frames(1, 4, 4, 3, 3)
    _, after = causal_conv3d(x, None, prepare(torch.randn(4, 4, 3, 3, 3)), torch.randn(4))
    assert after.untyped_storage().nbytes() == after.numel() * after.element_size()
    kept = after.clone()
    x.zero_()
    assert torch.equal(after, kept)


def test_a_kernel_of_one_frame_keeps_no_history(path):
    _, after = causal_conv3d(random_frames(2, 4, 3, 5, 6), None, prepare(torch.randn(8, 4, 1, 1, 1)), None)
    assert after.shape == (2, 4, 0, 5, 6)


def test_plain_weights_no_bias_and_any_strides_are_accepted(path):
    x, history = torch.randn(5, 2, 3, 9, 4).permute(1, 0, 2, 4, 3), torch.randn(2, 5, 4, 4, 9)[:, :, ::2]
    weight = torch.randn(3, 3, 3, 5, 6).permute(4, 3, 0, 1, 2)
    assert not x.is_contiguous() and not history.is_contiguous() and not weight.is_contiguous()
    y, after = causal_conv3d(x, history, weight, None)
    assert_close(got=y, want=truth(x, history, weight, torch.zeros(6)), op="conv3d_fp32")
    assert torch.equal(after, x[:, :, -2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_take_the_torch_path(dtype):
    x, weight, bias = (
        random_frames(1, 4, 2, 5, 5).to(dtype),
        torch.randn(6, 4, 3, 3, 3).to(dtype),
        torch.randn(6).to(dtype),
    )
    prepared = prepare(weight)
    y, _ = causal_conv3d(x, None, prepared, bias)
    assert not prepared.is_packed and y.dtype == dtype
    want = truth(x, None, weight, bias)
    assert (y.double() - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max()


def test_reference_equals_the_definition():
    x, history = random_frames(2, 3, 2, 5, 4), random_frames(2, 3, 1, 5, 4)
    weight, bias = torch.randn(4, 3, 3, 3, 3), torch.randn(4)
    got = causal_conv3d_reference(x.double(), history.double(), weight.double(), bias.double())
    torch.testing.assert_close(got, truth(x, history, weight, bias), rtol=1e-12, atol=1e-12)


def test_says_once_that_the_extension_is_missing(monkeypatch, caplog):
    monkeypatch.setattr(conv, "_C", None)
    conv._say_extension_is_missing.cache_clear()
    with caplog.at_level(logging.WARNING, logger="wanfast"):
        prepare(torch.randn(2, 2, 3, 3, 3, dtype=torch.float16))
        assert not caplog.records  # torch serves fp16 in any case
        prepare(torch.randn(2, 2, 3, 3, 3))
        prepare(torch.randn(2, 2, 3, 3, 3))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "\n" not in caplog.text.strip() and "C++ extension" in caplog.text


@pytest.mark.parametrize("cut", [(1, 1, 1, 1, 1), (1, 4), (2, 3), (1, 2, 2), (5,)], ids=str)
def test_a_history_that_is_used_again_gives_what_a_new_one_gives(cut):
    frames, weight = random_frames(2, 3, 5, 4, 6), prepare(torch.randn(4, 3, 3, 3, 3))
    kept = fresh = place = None
    for x in frames.split(cut, dim=2):
        y, kept = causal_conv3d(x, kept, weight, None, reuse_history=True)
        want, fresh = causal_conv3d(x, fresh, weight, None)
        assert torch.equal(y, want)
        assert place in (None, kept.data_ptr())
        place = kept.data_ptr()
        assert kept.shape[2] == 2
        assert torch.equal(kept[:, :, 2 - fresh.shape[2] :], fresh)
        assert not kept[:, :, : 2 - fresh.shape[2]].any()


BAD_ARGUMENTS = {
    "x has other channels": ({"x": (1, 5, 2, 6, 6)}, "x: must be .B, 4, T, H, W"),
    "x has four axes": ({"x": (4, 2, 6, 6)}, "x: must be"),
    "x has no frame": ({"x": (1, 4, 0, 6, 6)}, "x: must be"),
    "history is too long": ({"history": (1, 4, 3, 6, 6)}, "history: must be .1, 4, at most 2, 6, 6., got"),
    "history of another batch": ({"history": (2, 4, 2, 6, 6)}, "history: must be"),
    "history of other channels": ({"history": (1, 3, 2, 6, 6)}, "history: must be"),
    "history of another height": ({"history": (1, 4, 2, 5, 6)}, "history: must be"),
    "history of another width": ({"history": (1, 4, 2, 6, 7)}, "history: must be"),
    "history has four axes": ({"history": (4, 2, 6, 6)}, "history: must be"),
    "bias is too short": ({"bias": (7,)}, "bias: must be .8., got"),
    "bias has two axes": ({"bias": (8, 1)}, "bias: must be"),
    "weight has four axes": ({"weight": (8, 4, 3, 3)}, "weight: must be .O, C, kt, kh, kw."),
    "weight is even": ({"weight": (8, 4, 3, 2, 3)}, "weight: must be"),
    "weight is empty": ({"weight": (0, 4, 3, 3, 3)}, "weight: must be"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_refuses_a_bad_shape_by_name(path, name):
    shapes, message = BAD_ARGUMENTS[name]
    good = {"x": (1, 4, 2, 6, 6), "history": (1, 4, 2, 6, 6), "weight": (8, 4, 3, 3, 3), "bias": (8,)}
    with pytest.raises(ValueError, match=message):
        causal_conv3d(**{key: torch.randn(shape) for key, shape in (good | shapes).items()})


@pytest.mark.parametrize("name", ["x", "history", "bias"])
@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"device": "meta"}])
def test_refuses_another_dtype_or_device_by_name(path, name, change):
    arguments = {"x": random_frames(1, 4, 2, 6, 6), "history": random_frames(1, 4, 2, 6, 6), "bias": torch.randn(8)}
    arguments[name] = arguments[name].to(**change)
    with pytest.raises(ValueError, match=f"{name}: must be torch.float32 on cpu like the weight"):
        causal_conv3d(weight=prepare(torch.randn(8, 4, 3, 3, 3)), **arguments)


def test_the_callers_default_dtype_does_not_matter() -> None:
    """Buffers that C++ writes fp32 to are fp32, whatever torch makes by default."""
    x, weight = torch.randn(1, 16, 2, 6, 5), torch.randn(16, 16, 3, 3, 3)
    want = causal_conv3d(x, None, prepare(weight), None)[0]
    try:
        torch.set_default_dtype(torch.bfloat16)
        got = causal_conv3d(x, None, prepare(weight), None)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32 and torch.equal(got, want)
