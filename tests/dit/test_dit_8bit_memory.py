"""The 8-bit DiT's memory and traffic as its kernels have them, with kernels that compute nothing."""

from dataclasses import replace

import pytest
import torch
from played_kernels import Played
from reference.dit import small_config
from tracked import tracked_peak

from wanfast.checkpoint.reader import memory_reader
from wanfast.config import DiTConfig
from wanfast.dit.block_8bit import dit_block_8bit
from wanfast.dit.memory import dit_activations_8bit
from wanfast.dit.model import predict_velocities
from wanfast.dit.packed import pack_block, prepare_block
from wanfast.dit.text import KeyValues
from wanfast.dit.weights import expected_tensors, load_block, load_outer
from wanfast.rope import rope_rotations


def config_of(dim: int, ffn_dim: int) -> DiTConfig:
    sizes = {"dim": dim, "num_heads": dim // 128, "ffn_dim": ffn_dim}
    return replace(small_config(), **sizes, num_layers=2, text_len=32)


@pytest.mark.parametrize(
    ("dim", "ffn_dim", "grid", "num_contexts", "chunk_tokens"),
    [
        (256, 512, (4, 32, 32), 2, 128),
        (256, 512, (4, 32, 32), 1, 300),
        (256, 8192, (4, 32, 32), 1, 1024),
        (384, 1024, (8, 32, 32), 2, 512),
    ],
)
@torch.no_grad()
def test_the_count_is_the_allocator_s_record(
    dim: int,
    ffn_dim: int,
    grid: tuple[int, int, int],
    num_contexts: int,
    chunk_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(dim, ffn_dim)
    reader = memory_reader({name: 0.02 * torch.randn(shape) for name, shape in expected_tensors(config).items()})
    dtype = torch.bfloat16
    outer = load_outer(reader, config, dtype)
    blocks = [pack_block(prepare_block(load_block(reader, config, i, dtype), torch.int8), torch.int8) for i in range(2)]
    latents, contexts = torch.randn(1, 16, *grid), [torch.randn(1, 31, config.text_dim).to(dtype)] * num_contexts
    Played(monkeypatch)
    got = tracked_peak(
        lambda: predict_velocities(latents, 611, contexts, outer, blocks, config, chunk_tokens=chunk_tokens)
    )
    counted = dit_activations_8bit(
        config,
        num_tokens=grid[0] * grid[1] * grid[2] // 4,
        num_contexts=num_contexts,
        chunk_tokens=chunk_tokens,
    )
    assert sum(counted.values()) == pytest.approx(got, rel=0.05), counted


@torch.no_grad()
def test_passes_over_the_tokens_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the operands of products and attention, in units of T * C 16-bit numbers; Wan's own ratio of the FFN.

    An unfused block has 73 (with a stream in 16 bits). Half of what is left is the residual stream in fp32, which three
    norms read and three products read and write: in 16 bits it would be 9 less.
    """
    config = config_of(1280, 13 * 256)
    grid = (8, 32, 32)
    tokens = grid[0] * grid[1] * grid[2]
    reader = memory_reader({name: torch.zeros(shape) for name, shape in expected_tensors(config).items()})
    block = pack_block(prepare_block(load_block(reader, config, 0, torch.bfloat16), torch.int8), torch.int8)
    played = Played(monkeypatch)
    text = KeyValues(*torch.zeros(2, 1, 32, 10, 128).bfloat16(), 1)
    stream, modulation = torch.zeros(1, tokens, 1280), torch.zeros(1, 1, 6, 1280)
    rotations = rope_rotations(grid, 128)
    dit_block_8bit(stream, block, modulation, text, rotations, num_heads=10, eps=1e-6, chunk_tokens=2048)
    passes = {name: size / (tokens * 1280 * 2) for name, size in played.bytes.items()}
    want = {
        "norm": (3 + 251 / tokens) * 2.5,
        "norm and turn": 2 * 1.5,
        "mean of keys": (1 + 2 * 2) * 251 / tokens,
        "round values": 2.5,
        "attention": 0.516,  # with a scale per head
        "residual": 3 * 4,
        "queries for text": 2,
        "round attention to text": 1.5,
        "GELU": 0.516 * 13 * 256 / 1280,
    }
    assert passes == pytest.approx(want, rel=0.03)
    assert sum(passes.values()) < 30.7
