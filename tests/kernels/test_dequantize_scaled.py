import pytest
import torch
from torch import Tensor

from wanfast.kernels import dequantize_scaled
from wanfast.kernels.dequantize_scaled import dequantize_scaled_reference, dequantize_scaled_triton

IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [dequantize_scaled_triton, dequantize_scaled_reference], ids=["kernel", "reference"]
)
SHAPES = [(1, 1), (5, 1030), (128, 128), (129, 260)]


def stored(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, device=device, dtype=torch.int8)
    return (torch.randn(shape, device=device) * 40).to(dtype)


def scales(shape: tuple[int, int], kind: str, device: torch.device) -> Tensor:
    rows, columns = shape
    size = {"tensor": (), "row": (rows, 1), "block": ((rows + 127) // 128, (columns + 127) // 128)}[kind]
    return torch.rand(size, device=device) * 0.01 + 1e-4


def truth(values: Tensor, scale: Tensor, kind: str) -> Tensor:
    """Every weight times its scale, looked up index by index, in float64: products of 8 and 24 bits are exact there."""
    rows, columns = torch.arange(values.shape[0])[:, None], torch.arange(values.shape[1])[None, :]
    rows, columns = rows.to(values.device), columns.to(values.device)
    chosen = {
        "tensor": lambda: scale,
        "row": lambda: scale[rows, 0],
        "block": lambda: scale[rows // 128, columns // 128],
    }[kind]()
    return values.double() * chosen.double()


@IMPLEMENTATIONS
@pytest.mark.parametrize("kind", ["tensor", "row", "block"])
@pytest.mark.parametrize("stored_dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_weight_is_its_value_times_its_scale(run, kind, stored_dtype, shape, device):
    values, scale = stored(shape, stored_dtype, device), scales(shape, kind, device)
    want = truth(values, scale, kind).float()  # one rounding: what fp32 multiplication does
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = run(values, scale, dtype=dtype)
        assert got.dtype == dtype
        assert torch.equal(got, want.to(dtype))


@IMPLEMENTATIONS
def test_every_fp8_number_is_read_right(run, device):
    every = torch.arange(256, dtype=torch.uint8, device=device).view(16, 16)
    sign, exponent, mantissa = (every >> 7).double(), ((every >> 3) & 15).double(), (every & 7).double()
    magnitude = torch.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    want = torch.where((every & 127) == 127, torch.nan, magnitude * (1 - 2 * sign)).float()
    got = run(every.view(torch.float8_e4m3fn), torch.tensor(1.0, device=device), dtype=torch.float32)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@IMPLEMENTATIONS
def test_arguments_are_left_alone(run, device):
    values, scale = stored((130, 140), torch.int8, device), scales((130, 140), "block", device)
    before = values.clone(), scale.clone()
    run(values, scale, dtype=torch.float32)
    assert torch.equal(values, before[0]) and torch.equal(scale, before[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": torch.zeros(8, 6)}, "values: must be int8, float8_e4m3fn or float8_e5m2, got torch.float32"),
        ({"values": torch.zeros(8, dtype=torch.int8)}, r"values: must be \[O, I\], not empty, got \(8,\)"),
        ({"values": torch.zeros(6, 8, dtype=torch.int8).T}, "values: must be contiguous, got strides"),
        ({"scale": torch.ones(1, 8)}, r"scale: must be \[\], \[8, 1\] or \[1, 1\] for values \[8, 6\], got \[1, 8\]"),
        ({"scale": torch.ones(8)}, r"scale: must be .*, got \[8\]"),
        ({"scale": torch.ones(8, 1).double()}, "scale: must be float32, got torch.float64"),
        ({"scale": torch.ones(8, 1, device="meta")}, "scale: must be on cpu, like values, got meta"),
        ({"dtype": torch.float64}, "dtype: must be float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_dequantize_scaled_refuses(arguments, message):
    good = {"values": torch.zeros(8, 6, dtype=torch.int8), "scale": torch.ones(8, 1), "dtype": torch.float32}
    dequantize_scaled(**good)
    with pytest.raises(ValueError, match=message):
        dequantize_scaled(**(good | arguments))
