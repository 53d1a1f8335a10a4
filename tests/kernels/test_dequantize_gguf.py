import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from wanfast.kernels import dequantize_gguf
from wanfast.kernels._gguf_triton import KERNELS
from wanfast.kernels.dequantize_gguf import dequantize_gguf_reference, dequantize_gguf_triton
from wanfast.kernels.gguf_blocks import FORMATS

# Random bytes hold every fp16 number as a scale, and numpy warns of infinity times zero.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

PACKED = [kind for kind, form in FORMATS.items() if form.elements > 1]
KINDS = pytest.mark.parametrize("kind", PACKED)
IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [dequantize_gguf_triton, dequantize_gguf_reference], ids=["kernel", "reference"]
)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def random_rows(kind: str, rows: int, blocks: int) -> Tensor:
    """Draw bytes of every value, so scales that are not finite, negative, subnormal and zero too."""
    return torch.randint(0, 256, (rows, blocks * FORMATS[kind].num_bytes), dtype=torch.uint8)


def truth(rows: Tensor, kind: str) -> Tensor:
    """What gguf's numpy code makes of the rows, fp32."""
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind]))


def assert_identical(got: Tensor, want: Tensor) -> None:
    """Every bit equal; a NaN is any NaN."""
    got = got.cpu()
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    same = got.view(BITS[got.dtype]) == want.view(BITS[want.dtype])
    assert bool((same | want.isnan()).all()), f"{int((~same & ~want.isnan()).sum())} of {want.numel()} values differ"


def test_the_formats_are_those_of_ggml():
    for kind, form in FORMATS.items():
        assert (form.elements, form.num_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert list(KERNELS) == PACKED


@IMPLEMENTATIONS
@KINDS
def test_random_blocks_equal_gguf_to_the_bit(run, kind, device):
    rows, blocks = 3, 37  # 111 blocks: the last program of every kernel is not full
    packed = random_rows(kind, rows, blocks)
    in_features = blocks * FORMATS[kind].elements
    got = run(packed.to(device), kind, in_features=in_features, dtype=torch.float32)
    assert_identical(got, truth(packed, kind))


@IMPLEMENTATIONS
@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_smaller_dtypes_are_rounded_once_from_fp32(run, kind, dtype, device):
    packed = random_rows(kind, 2, 5)
    got = run(packed.to(device), kind, in_features=5 * FORMATS[kind].elements, dtype=dtype)
    assert_identical(got, truth(packed, kind).to(dtype))


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q4_K"])
def test_more_than_one_run_of_the_reference_equals_gguf(kind, device):
    blocks = (1 << 18) // FORMATS[kind].elements + 3
    packed = random_rows(kind, 1, blocks)
    got = dequantize_gguf(packed.to(device), kind, in_features=blocks * FORMATS[kind].elements, dtype=torch.float32)
    assert_identical(got, truth(packed, kind))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_plain_kinds_are_cast(kind, dtype, device):
    packed = random_rows(kind, 3, 40)
    got = dequantize_gguf(packed.to(device), kind, in_features=40, dtype=dtype)
    assert_identical(got, truth(packed, kind).to(dtype))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_numbers_come_back_within_half_a_step(kind, device):
    values = torch.randn(4, 64)
    packed = torch.from_numpy(gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[kind]))
    got = dequantize_gguf(packed.to(device), kind, in_features=64, dtype=torch.float32).cpu()
    steps = {"Q8_0": 254, "Q5_0": 31, "Q5_1": 31, "Q4_0": 15, "Q4_1": 15}[kind]
    span = 2 * values.view(4, 2, 32).abs().amax(-1, keepdim=True).expand(4, 2, 32).reshape(4, 64)
    assert bool(((got - values).abs() <= 1.1 * span / steps).all())


@pytest.mark.parametrize("offset", [1, 2, 34])
def test_rows_that_lie_anywhere_in_memory(offset, device):
    whole = random_rows("Q8_0", 1, 9)
    memory = torch.zeros(offset + whole.numel() + 6, dtype=torch.uint8)
    rows = memory[offset : offset + 3 * 102].view(3, 102)
    rows.copy_(whole[0, :306].view(3, 102))
    before = memory.clone()
    strided = torch.stack((rows, rows), 1)[:, 1]
    for blocks in (rows.to(device), strided.to(device), rows[1:].to(device)):
        got = dequantize_gguf(blocks, "Q8_0", in_features=96, dtype=torch.float32)
        assert_identical(got, truth(blocks.cpu().contiguous(), "Q8_0"))
    assert torch.equal(memory, before)


@IMPLEMENTATIONS
def test_no_rows_are_no_rows(run, device):
    empty = torch.zeros(0, 210, dtype=torch.uint8, device=device)
    assert run(empty, "Q6_K", in_features=256, dtype=torch.bfloat16).shape == (0, 256)


@pytest.mark.parametrize(
    ("blocks", "kind", "in_features", "dtype", "message"),
    [
        (torch.zeros(2, 34, dtype=torch.uint8), "IQ4_XS", 32, torch.float32, "kind: must be one of F32, .*got IQ4_XS"),
        (torch.zeros(2, 34, dtype=torch.uint8), "Q8_0", 32, torch.float64, "dtype: must be float32, bfloat16 or"),
        (torch.zeros(2, 34, dtype=torch.int8), "Q8_0", 32, torch.float32, r"blocks: must be .*got \[2, 34\] int8"),
        (torch.zeros(34, dtype=torch.uint8), "Q8_0", 32, torch.float32, r"blocks: must be .*got \[34\] uint8"),
        (torch.zeros(2, 34, dtype=torch.uint8), "Q8_0", 33, torch.float32, "in_features: must be .* of 32, .*got 33"),
        (torch.zeros(2, 0, dtype=torch.uint8), "Q8_0", 0, torch.float32, "in_features: must be .* of 32, .*got 0"),
        (torch.zeros(2, 68, dtype=torch.uint8), "Q8_0", 32, torch.float32, "blocks: must have 34 bytes .*got 68"),
    ],
)
def test_dequantize_gguf_refuses(blocks, kind, in_features, dtype, message):
    with pytest.raises(ValueError, match=message):
        dequantize_gguf(blocks, kind, in_features=in_features, dtype=dtype)
