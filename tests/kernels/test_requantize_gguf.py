import gguf
import numpy as np
import pytest
import torch
from eight_bit import EIGHT_BIT, decibels
from torch import Tensor

from wanfast.kernels import requantize_gguf
from wanfast.kernels._quantized import Quantized, QuantizedWeight, dequantize_reference, quantize_reference
from wanfast.kernels.gguf_blocks import FORMATS
from wanfast.kernels.requantize_gguf import KERNELS, requantize_gguf_reference, requantize_gguf_triton

IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [requantize_gguf_triton, requantize_gguf_reference], ids=["kernel", "reference"]
)
ROTATED = pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])


def random_blocks(kind: str, rows: int, in_features: int) -> Tensor:
    """Random numbers with scales of either sign between 2^-8 and 2^-6, as weights have them."""
    form = FORMATS[kind]
    blocks = torch.randint(0, 256, (rows, in_features // form.elements, form.num_bytes), dtype=torch.uint8)
    for at in form.scales_at:
        halves = (torch.rand(blocks.shape[:2]) * 2**-7 + 2**-8).half() * (torch.randint(0, 2, blocks.shape[:2]) * 2 - 1)
        blocks[..., at : at + 2] = halves.half()[..., None].view(torch.uint8)
    return blocks.flatten(1)


def truth(blocks: Tensor, kind: str) -> Tensor:
    """What gguf's numpy code makes of the rows, fp32."""
    return torch.from_numpy(gguf.quants.dequantize(blocks.cpu().numpy(), gguf.GGMLQuantizationType[kind]).copy())


def back(weight: QuantizedWeight) -> Tensor:
    """The weight in fp32, rotated back."""
    return dequantize_reference(Quantized(weight.values, weight.scale[:, None], weight.rotated)).cpu()


@IMPLEMENTATIONS
@EIGHT_BIT
@ROTATED
@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("in_features", [256, 768, 5120])
def test_rows_are_those_of_gguf_rounded_once(run, dtype, rotated, kind, in_features, device):
    blocks = random_blocks(kind, 3, in_features)
    got = run(blocks.to(device), kind, in_features=in_features, dtype=dtype, rotated=rotated)
    want = quantize_reference(truth(blocks, kind), dtype, rotated=rotated)
    assert got.values.dtype == dtype
    assert got.scale.shape == (3,)
    assert got.rotated == rotated
    assert torch.allclose(got.scale.cpu()[:, None], want.scale, rtol=3e-3 if rotated else 1e-6)
    off = (got.values.float().cpu() != want.values.float()).float().mean()
    assert off <= (0.15 if rotated else 0.001)  # a rotation rounds to bf16 first, and one value may differ by a step
    best = decibels(truth(blocks, kind), dequantize_reference(want))
    assert decibels(truth(blocks, kind), back(got)) > best - 0.2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", [kind for kind in FORMATS if FORMATS[kind].elements > 1 and kind not in KERNELS])
def test_other_kinds_go_through_bf16(kind, device):
    blocks = random_blocks(kind, 3, 512)
    got = requantize_gguf_triton(blocks.to(device), kind, in_features=512, dtype=torch.int8, rotated=True)
    want = requantize_gguf_reference(blocks, kind, in_features=512, dtype=torch.int8, rotated=True)
    exact = truth(blocks, kind)
    assert decibels(exact, back(got)) > decibels(exact, back(want)) - 1


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_numbers_go_to_memory_that_is_given(kind, device):
    blocks = random_blocks(kind, 5, 512).to(device)
    want = requantize_gguf(blocks, kind, in_features=512, dtype=torch.int8, rotated=False)
    memory = torch.zeros(7, 512, dtype=torch.int8, device=device)
    for run in (requantize_gguf, requantize_gguf_triton):
        memory.fill_(-128)
        got = run(blocks, kind, in_features=512, dtype=torch.int8, rotated=False, out=memory[1:6])
        assert got.values.data_ptr() == memory[1:6].data_ptr()
        assert float((got.values != want.values).float().mean()) < (0.01 if kind in KERNELS else 0.15)
        assert bool((memory[[0, 6]] == -128).all())


def test_a_weight_of_zeros_stays_zeros(device):
    blocks = torch.zeros(2, 272, dtype=torch.uint8, device=device)
    got = requantize_gguf_triton(blocks, "Q8_0", in_features=256, dtype=torch.int8, rotated=True)
    assert not bool(got.values.any())
    assert got.scale.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "IQ4_XS"}, "kind: must be one of F32, .*got IQ4_XS"),
        ({"dtype": torch.float16}, "dtype: must be int8 or float8_e4m3fn, got torch.float16"),
        ({"in_features": 96}, "blocks: must have 102 bytes per row"),
        (
            {"blocks": torch.zeros(3, 102, dtype=torch.uint8), "in_features": 96},
            "must be a multiple of 128 where rotated",
        ),
        ({"out": torch.zeros(3, 256)}, r"out: must be \(3, 256\) torch.int8, got \(3, 256\) torch.float32"),
        ({"out": torch.zeros(256, 3, dtype=torch.int8).T}, "out: must be contiguous, got strides"),
        ({"out": torch.zeros(3, 256, dtype=torch.int8, device="meta")}, "out: must be on cpu, like blocks, got meta"),
    ],
)
def test_requantize_gguf_refuses(arguments, message):
    good = {"blocks": torch.zeros(3, 272, dtype=torch.uint8), "kind": "Q8_0", "in_features": 256}
    good |= {"dtype": torch.int8, "rotated": True}
    requantize_gguf(**good)
    with pytest.raises(ValueError, match=message):
        requantize_gguf(**(good | arguments))


def test_every_finite_scale_is_drawn():
    """The helper above keeps what it is for: blocks whose numbers are finite and differ."""
    for kind in FORMATS:
        if FORMATS[kind].elements > 1:
            values = truth(random_blocks(kind, 2, 512), kind)
            assert bool(values.isfinite().all()) and np.unique(values).size > 100
