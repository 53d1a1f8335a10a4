"""One block against the reference's arithmetic written out operation by operation, rounding where it rounds."""

import pytest
import torch
import torch.nn.functional as F
from reference.dit import golden_state, golden_tensor, small_config
from torch import Tensor

from wanfast.checkpoint.reader import memory_reader
from wanfast.dit.block import dit_block, self_attention, text_key_values
from wanfast.dit.text import Text
from wanfast.dit.weights import AttentionWeights, BlockWeights, load_block
from wanfast.linear import Linear
from wanfast.rope import rope_rotations

EPS = 1e-6
HEADS = 2
GRID = (2, 2, 3)
TOKENS = 2 * 2 * 3
BATCH = 16
CONFIG = small_config(dim=48, num_heads=HEADS, ffn_dim=80)


def _rounded_linear(x: Tensor, layer: Linear) -> Tensor:
    """Inputs rounded to the weight's dtype, exact sums, the result rounded once."""
    y = x.to(layer.weight.dtype).double() @ layer.weight.double().T
    assert layer.bias is not None
    return (y + layer.bias.double()).to(layer.weight.dtype)


def _layer_norm(x: Tensor) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def _rope(x: Tensor) -> Tensor:
    """Complex128, axis by axis from the definition: each axis counts its frequencies from 1."""
    half = x.shape[-1] // 2
    sizes = (half - 2 * (half // 3), half // 3, half // 3)
    places = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in GRID))
    angles = torch.cat(
        [
            places[:, axis : axis + 1] * 10000.0 ** (-2 * torch.arange(size, dtype=torch.float64) / (2 * size))
            for axis, size in enumerate(sizes)
        ],
        dim=1,
    )
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], half, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2).float()


def _attention(x: Tensor, source: Tensor, weights: AttentionWeights, *, rotates: bool) -> Tensor:
    dtype = weights.q.weight.dtype
    q = _rms_norm(_rounded_linear(x, weights.q), weights.norm_q).unflatten(-1, (HEADS, -1))
    k = _rms_norm(_rounded_linear(source, weights.k), weights.norm_k).unflatten(-1, (HEADS, -1))
    v = _rounded_linear(source, weights.v).unflatten(-1, (HEADS, -1))
    if rotates:
        q, k = _rope(q), _rope(k)
    q, k, v = (heads.to(dtype).transpose(1, 2) for heads in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return _rounded_linear(out.transpose(1, 2).flatten(2), weights.o)


def _reference_block(hidden: Tensor, block: BlockWeights, modulation: Tensor, text: Tensor) -> Tensor:
    """The block as the official code runs it; modulation [B, T, 6, C] has a row per token."""
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.unbind(2)
    a = _layer_norm(hidden).float() * (1 + scale) + shift
    hidden = hidden.float() + _attention(a, a, block.self_attn, rotates=True).float() * gate
    a = _layer_norm(hidden) * block.norm3_weight + block.norm3_bias
    hidden = hidden + _attention(a, text, block.cross_attn, rotates=False)
    a = _layer_norm(hidden) * (1 + ffn_scale) + ffn_shift
    up = F.gelu(_rounded_linear(a, block.ffn_up).float(), approximate="tanh").to(block.ffn_up.weight.dtype)
    return hidden + _rounded_linear(up, block.ffn_down).float() * ffn_gate


def _case(dtype: torch.dtype, stream_dtype: torch.dtype, rows: int) -> tuple[Tensor, BlockWeights, Tensor, Tensor]:
    block = load_block(memory_reader(golden_state(CONFIG)), CONFIG, 0, dtype)
    hidden = golden_tensor("hidden", BATCH, TOKENS, CONFIG.dim).to(stream_dtype)
    modulation = 0.5 * golden_tensor("modulation", BATCH, rows, 6, CONFIG.dim)
    return hidden, block, modulation, golden_tensor("text", BATCH, 16, CONFIG.dim).to(dtype)


def _run(
    hidden: Tensor, block: BlockWeights, modulation: Tensor, text: Tensor, first_tokens: int = 0, **options: int
) -> Tensor:
    rotations = rope_rotations(GRID, CONFIG.head_dim)
    stream = hidden.to(torch.float32, copy=True)
    key_values = text_key_values(Text(text, 1), block.cross_attn, num_heads=HEADS, eps=EPS)
    sizes = {"num_heads": HEADS, "eps": EPS, "first_tokens": first_tokens} | options
    self_attention(stream, block, modulation, rotations, stream_dtype=hidden.dtype, **sizes)
    return dit_block(stream, block, modulation, key_values, rotations, attends_to_itself=False, **sizes)


def _median_error(got: Tensor, want: Tensor) -> float:
    """The median sample's RMS error, relative.

    Two orders of the same fp32 sums now and then round a value near a tie to the other bf16, and from there its whole
    sample differs. A rounding left out or added moves every sample, by 1e-3.
    """
    return float((_rms(got - want) / _rms(want)).median())


def _rms(x: Tensor) -> Tensor:
    return x.square().mean((1, 2)).sqrt()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=["first block", "later blocks"])
def test_a_bf16_block_rounds_where_the_reference_rounds(stream: torch.dtype, rows: int) -> None:
    hidden, block, modulation, text = _case(torch.bfloat16, stream, rows)
    first_tokens = TOKENS // 2 if rows == 2 else 0
    counts = torch.tensor([first_tokens, TOKENS - first_tokens][-rows:])
    got = _run(hidden, block, modulation, text, first_tokens)
    want = _reference_block(hidden, block, modulation.repeat_interleave(counts, dim=1), text)
    assert got.dtype == torch.float32
    assert _median_error(got, want) < 1e-6


def test_an_fp32_block_equals_the_formula() -> None:
    hidden, block, modulation, text = _case(torch.float32, torch.float32, 1)
    got = _run(hidden, block, modulation, text)
    want = _reference_block(hidden, block, modulation.expand(-1, TOKENS, -1, -1), text)
    assert _median_error(got, want) < 1e-6


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 12], ids=["one by one", "two runs and a rest", "exactly all"])
def test_tokens_in_runs_give_what_they_give_at_once(chunk_tokens: int, rows: int) -> None:
    case = _case(torch.float32, torch.float32, rows)
    first_tokens = 7 if rows == 2 else 0  # inside the second run of 5
    whole = _run(*case, first_tokens)
    assert _median_error(_run(*case, first_tokens, chunk_tokens=chunk_tokens), whole) < 1e-6


def test_a_block_writes_to_its_stream_and_to_nothing_else() -> None:
    hidden, block, modulation, text = _case(torch.float32, torch.float32, 1)
    before = modulation.clone(), text.clone()
    want, stream = _run(hidden, block, modulation, text), hidden.clone()
    rotations = rope_rotations(GRID, CONFIG.head_dim)
    key_values = text_key_values(Text(text, 1), block.cross_attn, num_heads=HEADS, eps=EPS)
    got = dit_block(stream, block, modulation, key_values, rotations, num_heads=HEADS, eps=EPS)
    assert got.data_ptr() == stream.data_ptr()
    assert torch.equal(stream, want)
    assert all(torch.equal(*pair) for pair in zip(before, (modulation, text), strict=True))
