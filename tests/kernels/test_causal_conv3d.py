from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close
from torch import Tensor

from wanfast.kernels import PackedConv, causal_conv3d, pack_conv
from wanfast.kernels._conv_forms import FORMS, FormName, causal_conv3d_reference
from wanfast.kernels._conv_tiles import conv_tile
from wanfast.kernels.causal_conv3d import causal_conv3d_triton, fuses_norm

Run = Callable[..., Tensor]
IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [causal_conv3d_triton, causal_conv3d_reference], ids=["kernel", "reference"]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
KERNELS: dict[FormName, tuple[int, int]] = {
    "same": (3, 3),
    "half_picture": (1, 3),
    "half_frames": (3, 1),
    "double_picture": (1, 3),  # before its taps are summed
    "double_frames": (3, 1),
}


def frames(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn(shape, device=device) + 0.25
    return x.to(dtype).contiguous(memory_format=torch.channels_last_3d)


def vector(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(size, device=device).to(dtype)


def weight_of(
    form: FormName, channels: int, out_channels: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, PackedConv]:
    """A weight as the checkpoint has it, and packed; under a doubling in quarters, so that sums of taps are exact."""
    kt, side = KERNELS[form]
    shape = (out_channels, channels, kt, side, side)
    if form != "double_picture":
        weight = (torch.randn(shape, device=device) / (channels * kt * side * side) ** 0.5).to(dtype)
        return weight, pack_conv(weight, form)
    weight = (torch.randint(-4, 5, shape, device=device) / 4).to(dtype)
    before, here, after = weight.unbind(3)
    rows = torch.stack((torch.stack((before, here + after), 3), torch.stack((before + here, after), 3)))
    before, here, after = rows.unbind(5)
    folded = torch.stack((torch.stack((before, here + after), 5), torch.stack((before + here, after), 5)), 1)
    return weight, pack_conv(folded.flatten(0, 1), form)


def truth(form: FormName, x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The official layers in float64: joined, padded, convolved, put in turn."""
    x, weight = x.double(), weight.double()
    seen = 0 if history is None else history.shape[2]
    x = x if history is None else torch.cat((history.double(), x), dim=2)
    lead = 1 if form == "half_frames" else weight.shape[2] - 1
    x = F.pad(x, (0, 0, 0, 0, lead - seen, 0))
    bias = None if bias is None else bias.double()
    if form == "half_picture":
        return F.conv3d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=(1, 2, 2))
    if form == "half_frames":
        return F.conv3d(x, weight, bias, stride=(2, 1, 1))
    if form == "double_picture":
        x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
    y = F.conv3d(x, weight, bias, padding=(0, weight.shape[3] // 2, weight.shape[4] // 2))
    if form == "double_frames":
        y = torch.stack(y.chunk(2, dim=1), dim=3).flatten(2, 3)
    return y


def normed(y: Tensor, norm: Tensor) -> Tensor:
    n = y / y.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12) * norm.double().view(-1, 1, 1, 1)
    return n * torch.sigmoid(n)


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize(
    ("form", "channels", "out_channels", "size", "seen"),
    [
        ("same", 5, 7, (1, 7, 5), 0),
        ("same", 5, 7, (2, 9, 15), 1),  # 135 pixels: more than a tile
        ("same", 17, 100, (1, 3, 5), 2),
        ("half_picture", 20, 40, (2, 6, 10), 0),
        ("half_frames", 24, 24, (4, 5, 7), 1),
        ("half_frames", 24, 24, (3, 3, 5), 0),
        ("double_picture", 16, 24, (2, 5, 7), 0),
        ("double_frames", 16, 20, (1, 5, 7), 0),
        ("double_frames", 16, 96, (3, 5, 3), 2),
    ],
)
def test_equals_float64(run, dtype, form, channels, out_channels, size, seen, device):
    weight, packed = weight_of(form, channels, out_channels, dtype, device)
    x = frames(2, channels, *size, dtype=dtype, device=device)
    history = frames(2, channels, seen, *size[1:], dtype=dtype, device=device) if seen else None
    bias = vector(out_channels, dtype, device)
    want = truth(form, x, history, weight, None)
    if bias is not None:
        want = truth(form, x, history, weight, bias)
    before = x.clone()
    y = run(x, history, packed, bias)
    assert y.dtype == dtype and tuple(y.shape) == packed.out_shape(x)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert_close(got=y, want=want, op="causal_conv3d")
    assert torch.equal(x, before)


@IMPLEMENTATIONS
@pytest.mark.parametrize("out_channels", [96, 192, 256, 128, 64, 48, 32, 16])
def test_every_tile_and_both_ends_equal_float64(run, out_channels, device):
    """A residual on top; and a norm behind, in the same program where it has all outputs."""
    dtype = torch.float16
    weight = (torch.randn(out_channels, 32, 1, 3, 3, device=device) / 17).to(dtype)
    packed = pack_conv(weight)
    x = frames(1, 32, 1, 5, 7, dtype=dtype, device=device)
    bias, norm = vector(out_channels, dtype, device), vector(out_channels, dtype, device) * 8
    residual = frames(*packed.out_shape(x), dtype=dtype, device=device)
    want = truth("same", x, None, weight, bias)
    assert_close(got=run(x, None, packed, bias, residual=residual), want=want + residual, op="causal_conv3d")
    assert fuses_norm(packed)
    got = run(x, None, packed, bias, norm=norm)
    assert_close(got=got, want=normed(want, norm), op="causal_conv3d_norm")
    got = run(x, None, packed, bias, residual=residual, norm=norm)
    assert_close(got=got, want=normed(want + residual, norm), op="causal_conv3d_norm")


def test_a_norm_that_is_not_in_the_tile_is_a_kernel_of_its_own(device):
    dtype = torch.float16
    weight = (torch.randn(384, 16, 1, 1, 1, device=device) / 4).to(dtype)
    packed = pack_conv(weight)
    assert not fuses_norm(packed)
    x, norm = frames(1, 16, 1, 3, 5, dtype=dtype, device=device), vector(384, dtype, device) * 8
    got = causal_conv3d_triton(x, None, packed, None, norm=norm)
    assert_close(got=got, want=normed(truth("same", x, None, weight, None), norm), op="causal_conv3d_two_roundings")


@IMPLEMENTATIONS
@pytest.mark.parametrize("cuts", [(1, 2, 2), (3, 1, 1), (2, 3)], ids=str)
def test_chunks_read_where_they_lie_equal_the_whole(run, cuts, device):
    """Chunk and history are views of one tensor: nothing beside them is read, and nothing is joined."""
    _, packed = weight_of("same", 16, 16, torch.float16, device)
    whole = frames(1, 16, 5, 3, 6, dtype=torch.float16, device=device)
    want = run(whole, None, packed, None)
    chunks, start = [], 0
    for count in cuts:
        history = whole[:, :, max(start - 2, 0) : start]
        chunks.append(run(whole[:, :, start : start + count], history, packed, None))
        start += count
    assert torch.equal(torch.cat(chunks, dim=2), want)


@IMPLEMENTATIONS
def test_what_is_masked_does_not_matter(run, device):
    """Frames before and after the chunk, in the same memory, are NaN."""
    _, packed = weight_of("same", 10, 12, torch.float16, device)
    memory = torch.full((1, 5, 3, 4, 10), float("nan"), dtype=torch.float16, device=device)
    memory[:, 2:4] = torch.randn(1, 2, 3, 4, 10, device=device)
    x = memory.movedim(-1, 1)[:, :, 2:4]
    want = run(x.contiguous(memory_format=torch.channels_last_3d), None, packed, None)
    assert torch.equal(run(x, None, packed, None), want)
    assert want.isfinite().all()


@IMPLEMENTATIONS
def test_the_result_may_take_the_residuals_place(run, device):
    _, packed = weight_of("same", 16, 100, torch.float16, device)
    x = frames(1, 16, 1, 9, 15, dtype=torch.float16, device=device)
    residual = frames(*packed.out_shape(x), dtype=torch.float16, device=device)
    want = run(x, None, packed, None, residual=residual.clone(memory_format=torch.preserve_format))
    got = run(x, None, packed, None, residual=residual, overwrite_residual=True)
    assert got.data_ptr() == residual.data_ptr()
    assert torch.equal(got, want)


def test_sums_in_fp16_cost_about_one_rounding(device):
    """Beside the rounding of the result; numbers as after a norm and SiLU."""
    weight, packed = weight_of("same", 96, 32, torch.float16, device)
    x = F.silu(frames(1, 96, 1, 5, 7, dtype=torch.float16, device=device))
    want = truth("same", x, None, weight, None)
    got = causal_conv3d_triton(x, None, packed, None, fp16_sums=True)
    assert_close(got=got, want=want, op="causal_conv3d_fp16_sums")
    exact = causal_conv3d_triton(x, None, packed, None)
    assert not torch.equal(got, exact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_tiles_fill_what_is_packed(form, arch):
    for channels in (3, 12, 16, 48, 96, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 2048):
        tile = conv_tile(channels, channels, arch)
        assert -(-channels // 16) * 16 % tile.depth == 0
        if channels % 16 == 0:
            assert channels % tile.columns == 0, "no column is wasted"
        assert tile.rows * tile.columns // (32 * tile.num_warps) <= 128, "fp32 sums in a thread's registers"


def good() -> dict[str, object]:
    packed = pack_conv(torch.zeros(8, 4, 3, 3, 3))
    x = torch.zeros(1, 4, 2, 6, 6).contiguous(memory_format=torch.channels_last_3d)
    residual = torch.zeros(1, 8, 2, 6, 6).contiguous(memory_format=torch.channels_last_3d)
    return {"x": x, "history": x, "weight": packed, "bias": torch.zeros(8), "residual": residual}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(1, 4, 2, 6, 6).double()}, "x: must be float32, bfloat16 or float16, got torch.float64"),
        ({"x": torch.zeros(1, 5, 2, 6, 6)}, r"x: must be \[B, 4, T, H, W\], none of them 0, got \(1, 5, 2, 6, 6\)"),
        ({"x": torch.zeros(4, 2, 6, 6)}, r"x: must be \[B, 4, T, H, W\]"),
        ({"x": torch.zeros(1, 4, 2, 6, 6)}, "x: must be channels last, frame after frame, got strides"),
        ({"x": torch.zeros(1, 4, 2, 6, 6, dtype=torch.float16)}, "weight: must be torch.float16, like x, got"),
        ({"history": torch.zeros(1, 4, 3, 6, 6)}, r"history: must be \[1, 4, at most 2, 6, 6\], got"),
        ({"history": torch.zeros(1, 4, 2, 6, 7)}, r"history: must be \[1, 4, at most 2, 6, 6\], got"),
        ({"history": torch.zeros(1, 4, 2, 6, 6)}, "history: must be channels last, frame after frame, got strides"),
        ({"history": torch.zeros(1, 4, 2, 6, 6, device="meta")}, "history: must be on cpu, like x, got meta"),
        ({"bias": torch.zeros(7)}, r"bias: must be 8 numbers, got \(7,\)"),
        ({"bias": torch.zeros(16)[::2]}, "bias: must be contiguous, got strides"),
        ({"norm": torch.zeros(8).half()}, "norm: must be torch.float32, like x, got torch.float16"),
        ({"residual": torch.zeros(1, 8, 2, 6, 5)}, r"residual: must be \(1, 8, 2, 6, 6\), got"),
        ({"residual": torch.zeros(1, 8, 2, 6, 6)}, "residual: must be channels last, contiguous, got strides"),
    ],
)
def test_refuses(arguments, message):
    causal_conv3d(**good())
    with pytest.raises(ValueError, match=message):
        causal_conv3d(**(good() | arguments))


def test_refuses_what_a_form_does_not_have():
    x = torch.zeros(1, 4, 1, 6, 5).contiguous(memory_format=torch.channels_last_3d)
    with pytest.raises(ValueError, match="x: rows and columns must be multiples of 2 for half_picture, got"):
        causal_conv3d(x, None, pack_conv(torch.zeros(8, 4, 1, 3, 3), "half_picture"), None)
    with pytest.raises(ValueError, match="x: must have at least 2 frames for half_frames, got 1"):
        causal_conv3d(x, None, pack_conv(torch.zeros(8, 4, 3, 1, 1), "half_frames"), None)
    with pytest.raises(ValueError, match="norm: must be None for double_frames, got a weight"):
        causal_conv3d(x, None, pack_conv(torch.zeros(8, 4, 3, 1, 1), "double_frames"), None, norm=torch.ones(8))


@pytest.mark.parametrize(
    ("shape", "form", "message"),
    [
        ((8, 4, 3, 3, 3), "other", "form: must be one of same, half_picture, half_frames, double_picture, double_fr"),
        ((8, 4, 3, 3), "same", r"weight: must be \[O, C, 1 or 3, k, k\], k 1 or 3, not empty, for same, got"),
        ((8, 4, 3, 3, 1), "same", "weight: must be"),
        ((8, 0, 3, 3, 3), "same", "weight: must be"),
        ((8, 4, 3, 3, 3), "half_picture", r"weight: must be \[O, C, 1, k, k\], k 3, not empty, for half_picture, got"),
        ((3, 8, 4, 1, 2, 2), "double_picture", r"weight: must be \[4, O, C, 1, k, k\], k 2"),
        ((7, 4, 3, 1, 1), "double_frames", "weight: must have an even number of outputs for double_frames, got 7"),
    ],
)
def test_packing_refuses(shape, form, message):
    with pytest.raises(ValueError, match=message):
        pack_conv(torch.zeros(shape), form)
