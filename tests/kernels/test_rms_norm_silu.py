import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from wanfast.kernels import rms_norm_silu
from wanfast.kernels.rms_norm_silu import pixel_tile, rms_norm_silu_reference, rms_norm_silu_triton
from wanfast.vae.blocks import norm_silu

IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [rms_norm_silu_triton, rms_norm_silu_reference], ids=["kernel", "reference"]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
LAYOUTS = pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format], ids=["last", "first"])


def truth(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    length = x.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
    n = x / length * weight.double().view(-1, *[1] * (x.dim() - 2))
    return n * torch.sigmoid(n)


def video(*shape: int, layout: torch.memory_format, dtype: torch.dtype, device) -> Tensor:
    return (3 * torch.randn(shape, device=device) + 0.5).to(dtype).contiguous(memory_format=layout)


@IMPLEMENTATIONS
@LAYOUTS
@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 1, 3, 5), (1, 7, 2, 3, 5), (1, 96, 2, 7, 9), (2, 160, 1, 5, 5), (1, 384, 3, 1, 7), (1, 1024, 1, 3, 3)],
    ids=str,
)
def test_rms_norm_silu_equals_float64(run, layout, dtype, shape, device):
    x = video(*shape, layout=layout, dtype=dtype, device=device)
    weight = (2 * torch.randn(shape[1], 1, 1, 1, device=device) * shape[1] ** 0.5).to(dtype)
    before = x.clone()
    y = run(x, weight)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    assert_close(got=y, want=truth(x, weight), op="rms_norm_silu")
    assert torch.equal(x, before)


@IMPLEMENTATIONS
@LAYOUTS
@DTYPES
def test_the_result_may_take_the_place_of_x(run, layout, dtype, device):
    x = video(2, 24, 2, 5, 7, layout=layout, dtype=dtype, device=device)
    weight = torch.randn(24, 1, 1, 1, device=device).to(dtype)
    want = run(x.clone(memory_format=torch.preserve_format), weight)
    got = run(x, weight, overwrite=True)
    assert got.data_ptr() == x.data_ptr()
    assert torch.equal(x, want)


@IMPLEMENTATIONS
@LAYOUTS
def test_a_run_of_frames_may_be_taken_alone(run, layout, device):
    whole = video(2, 12, 4, 3, 5, layout=layout, dtype=torch.float32, device=device)
    weight = torch.randn(12, device=device)
    before = whole.clone()
    y = run(whole[:, :, 1:3], weight)
    assert_close(got=y, want=truth(whole[:, :, 1:3], weight), op="rms_norm_silu")
    run(whole[:, :, 1:3], weight, overwrite=True)
    assert_close(got=whole[:, :, 1:3], want=y.double(), op="rms_norm_silu")
    assert torch.equal(whole[:, :, [0, 3]], before[:, :, [0, 3]])


@IMPLEMENTATIONS
@LAYOUTS
def test_pictures_and_rows_are_videos_too(run, layout, device):
    x = video(2, 12, 1, 3, 5, layout=layout, dtype=torch.float32, device=device)
    weight = torch.randn(12, device=device)
    want = run(x, weight)
    assert_close(got=run(x[:, :, 0], weight), want=want[:, :, 0].double(), op="rms_norm_silu")
    assert_close(got=run(x[:, :, 0, 0], weight), want=want[:, :, 0, 0].double(), op="rms_norm_silu")


@IMPLEMENTATIONS
@LAYOUTS
def test_pixels_of_zeros_and_of_hardly_anything(run, layout, device):
    x = torch.zeros(1, 16, 1, 2, 2, device=device).contiguous(memory_format=layout)
    x[0, :, 0, 0, 1] = 1e-13  # shorter than the smallest length: divided by that
    x[0, :, 0, 1, 0] = 1e-10
    weight = torch.full((16,), 4.0, device=device)
    y = run(x, weight)
    assert (y[0, :, 0, 0, 0] == 0).all()
    assert_close(got=y, want=truth(x, weight), op="rms_norm_silu")


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # to infinity, and on to 0
@IMPLEMENTATIONS
def test_large_values_neither_overflow_nor_lose_their_sign(run, device):
    x = torch.zeros(1, 4, 1, 1, 2, device=device)
    x[0, :, 0, 0, 0] = torch.tensor([1.0, -1.0, 1e-3, -1e-3], device=device)
    x[0, :, 0, 0, 1] = 1e15
    weight = torch.full((4,), 500.0, device=device)  # exp(500 / sqrt(2)) is beyond fp32
    assert_close(got=run(x, weight), want=truth(x, weight), op="rms_norm_silu")


@IMPLEMENTATIONS
@LAYOUTS
@pytest.mark.parametrize("channels", [1, 96])
def test_it_is_what_the_vae_computes(run, layout, channels, device):
    x = video(1, channels, 2, 4, 6, layout=layout, dtype=torch.float32, device=device)
    weight = torch.rand(channels, 1, 1, 1, device=device) * channels**0.5
    assert_close(got=run(x, weight), want=norm_silu(x, weight).double(), op="rms_norm_silu")


def test_a_tile_covers_the_channels_and_fits_the_registers():
    for channels in range(1, 1025):
        for channels_last in (True, False):
            tile = pixel_tile(channels, channels_last=channels_last)
            assert tile["HEAD"] <= channels <= tile["HEAD"] + tile["TAIL"]
            numbers = tile["PIXELS"] * (tile["HEAD"] + tile["TAIL"])
            assert numbers <= 64 * 32 * tile["num_warps"], (channels, tile)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 8, 3).double()}, "x: must be float32, bfloat16 or float16, got torch.float64"),
        ({"x": torch.zeros(2, 8)}, r"x: must be \[B, C, ...\], none of them 0, got \(2, 8\)"),
        ({"x": torch.zeros(2, 8, 0)}, r"x: must be \[B, C, ...\], none of them 0, got \(2, 8, 0\)"),
        ({"x": torch.zeros(1, 1025, 1)}, "x: must have at most 1024 channels, got 1025"),
        ({"x": torch.zeros(2, 8, 3, 4, 8)[..., :5]}, "x: pixels must be evenly spaced, got strides"),
        ({"weight": torch.ones(7, 1, 1, 1)}, r"weight: must be 8 numbers, x's channels, got \(7, 1, 1, 1\)"),
        ({"weight": torch.ones(8, dtype=torch.int32)}, "weight: must be float32, bfloat16 or float16, got"),
        ({"weight": torch.ones(16)[::2]}, "weight: must be contiguous, got strides"),
        ({"weight": torch.ones(8, device="meta")}, "weight: must be on cpu, like x, got meta"),
    ],
)
def test_rms_norm_silu_refuses(arguments, message):
    good = {"x": torch.zeros(2, 8, 3, 4, 5), "weight": torch.ones(8)}
    rms_norm_silu(**good)
    with pytest.raises(ValueError, match=message):
        rms_norm_silu(**(good | arguments))
