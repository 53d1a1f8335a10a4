import gguf
import pytest
import torch
from eight_bit import EIGHT_BIT, decibels, random_tokens, wide
from tolerance import assert_close
from torch import Tensor

from wanfast.kernels import Quantized, linear_8bit, linear_stored, quantize_rows, requantize_gguf
from wanfast.kernels._tiles_8bit import GENERATIONS
from wanfast.kernels.gguf_blocks import FORMATS
from wanfast.kernels.linear_stored import (
    UNPACKED_TOKENS,
    linear_stored_reference,
    linear_stored_triton,
    unpacks_in_prologue,
)

IMPLEMENTATIONS = pytest.mark.parametrize(
    "run", [linear_stored_triton, linear_stored_reference], ids=["kernel", "reference"]
)
KINDS = pytest.mark.parametrize("kind", UNPACKED_TOKENS)


def random_blocks(kind: str, rows: int, in_features: int, device: torch.device) -> Tensor:
    """Random numbers, with scales and minimums of either sign between 2^-8 and 2^-6."""
    form = FORMATS[kind]
    blocks = torch.randint(0, 256, (rows, in_features // form.elements, form.num_bytes), dtype=torch.uint8)
    for at in form.scales_at:
        signs = torch.randint(0, 2, blocks.shape[:2]) * 2 - 1
        halves = ((torch.rand(blocks.shape[:2]) * 2**-7 + 2**-8) * signs).half()
        blocks[..., at : at + 2] = halves[..., None].view(torch.uint8)
    return blocks.flatten(1).to(device)


def centred_blocks(kind: str, rows: int, in_features: int, device: torch.device) -> Tensor:
    """Blocks whose numbers lie around zero, as a model's do: in Q4_K every minimum is 7.5 times its scale."""
    blocks = random_blocks(kind, rows, in_features, device)
    if kind == "Q4_K":
        each = blocks.view(-1, 144)
        each[:, 2:4] = (each[:, :2].contiguous().view(torch.float16) * 7.5).view(torch.uint8)
        each[:, 8:12] = each[:, 4:8]
        each[:, 12:16] = (each[:, 12:16] & 15) * 17
    return blocks


def product(x: Quantized, blocks: Tensor, kind: str) -> Tensor:
    """Tokens times what gguf's numpy code makes of the blocks, in float64."""
    weight = gguf.quants.dequantize(blocks.cpu().numpy(), gguf.GGMLQuantizationType[kind])
    return wide(x) @ torch.from_numpy(weight.copy()).double().T.to(x.device)


@IMPLEMENTATIONS
@KINDS
@pytest.mark.parametrize("grouped", [False, True], ids=["token", "group"])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 1, 256), (70, 130, 768), (3, 66, 5120)], ids=str)
def test_the_product_equals_float64(run, kind, grouped, tokens, outputs, inputs, device):
    x = random_tokens((tokens, inputs), torch.int8, device, groups=inputs // 128 if grouped else 1)
    blocks, bias = random_blocks(kind, outputs, inputs, device), torch.randn(outputs, device=device)
    got = run(x, blocks, kind, bias, out_dtype=torch.float32)
    assert_close(got=got, want=product(x, blocks, kind) + bias.double(), op="linear_stored")


@IMPLEMENTATIONS
@KINDS
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_rank_terms_are_added_and_results_rounded_once(run, kind, out_dtype, device):
    x, blocks = random_tokens((2, 5, 256), torch.int8, device), random_blocks(kind, 67, 256, device)
    t, up = torch.randn(2, 5, 20, device=device).half() * 9, torch.randn(67, 20, device=device).half()
    got = run(x, blocks, kind, None, low_rank=(t, up), out_dtype=out_dtype)
    assert got.dtype == out_dtype
    assert_close(got=got, want=product(x, blocks, kind) + t.double() @ up.double().T, op="linear_stored")


@IMPLEMENTATIONS
def test_more_rows_of_tiles_than_are_run_together(run, device):
    x, blocks = random_tokens((577, 128), torch.int8, device), random_blocks("Q8_0", 65, 128, device)
    got = run(x, blocks, "Q8_0", None, out_dtype=torch.float32)
    assert_close(got=got, want=product(x, blocks, "Q8_0"), op="linear_stored")


@IMPLEMENTATIONS
@KINDS
def test_a_part_of_a_larger_tensor_is_written_and_no_more(run, kind, device):
    x, blocks = random_tokens((1, 70, 256), torch.int8, device), random_blocks(kind, 70, 256, device)
    whole = torch.full((1, 80, 200), float("nan"), device=device)
    part = whole[:, 5:75, 100:170]
    run(x, blocks, kind, None, out=part)
    assert_close(got=part, want=product(x, blocks, kind), op="linear_stored")
    assert int(whole.isnan().sum()) == whole.numel() - part.numel()


@EIGHT_BIT
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
def test_every_form_of_tokens_meets_the_weight(dtype, rotated, kind, device):
    """Through the operation, and through the weight rounded to 8 bits: the product of the original tokens."""
    x = torch.randn(4, 512, device=device)
    blocks = centred_blocks(kind, 40, 512, device)
    tokens = quantize_rows(x, dtype, rotated=rotated)
    want = product(Quantized(x, torch.ones(4, 1, device=device), False), blocks, kind)
    least = 36 if dtype == torch.int8 else 26
    assert decibels(want, linear_stored(tokens, blocks, kind, None, out_dtype=torch.float32)) > least
    weight = requantize_gguf(blocks, kind, in_features=512, dtype=dtype, rotated=rotated)
    assert decibels(want, linear_8bit(tokens, weight, None, out_dtype=torch.float32)) > least - 1


def test_few_plain_int8_tokens_unpack_and_others_do_not():
    cpu = torch.device("cpu")  # decides as an RTX 4090 does
    for kind, most in UNPACKED_TOKENS.items():
        assert unpacks_in_prologue(random_tokens((2, most // 2, 256), torch.int8, cpu), kind)
        assert not unpacks_in_prologue(random_tokens((most + 1, 256), torch.int8, cpu), kind)
        assert not unpacks_in_prologue(random_tokens((1, 256), torch.int8, cpu, rotated=True), kind)
        assert not unpacks_in_prologue(random_tokens((1, 256), torch.float8_e4m3fn, cpu), kind)
    assert not unpacks_in_prologue(random_tokens((1, 256), torch.int8, cpu), "Q6_K")
    assert not GENERATIONS[90].unpacks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "Q5_9"}, "kind: must be one of F32, .*got Q5_9"),
        ({"blocks": torch.zeros(6, 136, dtype=torch.uint8)}, "blocks: must have 272 bytes per row .*got 136"),
        ({"blocks": torch.zeros(6, 272, dtype=torch.uint8, device="meta")}, "blocks: must be on cpu, like x, got meta"),
        ({"bias": torch.zeros(7)}, r"bias: must be \[6\], got \(7,\)"),
        ({"out_dtype": torch.int8}, "out_dtype: must be float32, bfloat16 or float16, got torch.int8"),
        ({"out": torch.zeros(2, 6, 5).mT}, "out: must have adjacent columns and evenly spaced rows, got strides"),
        ({"x": Quantized(torch.zeros(2, 5, 256), torch.ones(2, 5, 1), False)}, "x.values: must be int8"),
    ],
)
def test_linear_stored_refuses(arguments, message):
    good = {"x": random_tokens((2, 5, 256), torch.int8, torch.device("cpu")), "kind": "Q8_0", "bias": None}
    good |= {"blocks": torch.zeros(6, 272, dtype=torch.uint8)}
    linear_stored(**good)
    with pytest.raises(ValueError, match=message):
        linear_stored(**(good | arguments))
