"""The counted activations of the DiT against the allocator's record, over shapes, dtypes and lengths of a run."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from tracked import tracked_peak

from wanfast.checkpoint.reader import Reader, memory_reader
from wanfast.config import DiTConfig
from wanfast.dit.memory import dit_activations
from wanfast.dit.model import predict_velocities
from wanfast.dit.weights import expected_tensors, load_block, load_outer
from wanfast.linear import Linear
from wanfast.stored import ScaledWeight

TOLERANCE = 0.05


def _config(dim: int, ffn_dim: int, text_len: int = 32) -> DiTConfig:
    return DiTConfig(
        in_channels=16,
        out_channels=16,
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=4,
        num_layers=2,
        text_dim=32,
        text_len=text_len,
        freq_dim=32,
        patch_size=(1, 2, 2),
        eps=1e-6,
    )


def _reader(config: DiTConfig) -> Reader:
    return memory_reader({name: 0.02 * torch.randn(shape) for name, shape in expected_tensors(config).items()})


def _stored(weights: Any) -> Any:
    """The same weights with every projection in 8 bits."""
    if isinstance(weights, Linear):
        assert isinstance(weights.weight, Tensor)
        values = weights.weight.float().mul(900).to(torch.int8)
        return Linear(ScaledWeight(values, torch.tensor(1 / 900), weights.weight.dtype), weights.bias)
    if isinstance(weights, Tensor):
        return weights
    return replace(weights, **{field.name: _stored(getattr(weights, field.name)) for field in fields(weights)})


@pytest.mark.parametrize(
    ("dim", "ffn_dim", "grid", "dtype", "num_contexts", "chunk_tokens"),
    [
        (256, 512, (4, 32, 32), torch.bfloat16, 2, 128),
        (256, 512, (4, 32, 32), torch.bfloat16, 1, 300),
        (256, 512, (4, 32, 32), torch.bfloat16, 2, 1024),
        (256, 512, (4, 32, 32), torch.float32, 2, 256),
        (256, 512, (2, 24, 40), torch.float32, 1, 4096),
        (256, 4096, (4, 32, 32), torch.bfloat16, 1, 1024),
        (384, 1024, (8, 32, 32), torch.bfloat16, 2, 512),
    ],
)
@torch.no_grad()
def test_the_count_is_the_allocator_s_record(
    dim: int,
    ffn_dim: int,
    grid: tuple[int, int, int],
    dtype: torch.dtype,
    num_contexts: int,
    chunk_tokens: int,
) -> None:
    config = _config(dim, ffn_dim)
    reader = _reader(config)
    outer, blocks = load_outer(reader, config, dtype), [load_block(reader, config, i, dtype) for i in range(2)]
    latents, contexts = torch.randn(1, 16, *grid), [torch.randn(1, 9, 32).to(dtype)] * num_contexts
    got = tracked_peak(
        lambda: predict_velocities(latents, 611, contexts, outer, blocks, config, chunk_tokens=chunk_tokens)
    )
    counted = dit_activations(
        config,
        num_tokens=grid[0] * grid[1] * grid[2] // 4,
        num_contexts=num_contexts,
        itemsize=dtype.itemsize,
        chunk_tokens=chunk_tokens,
    )
    assert sum(counted.values()) == pytest.approx(got, rel=TOLERANCE), counted


@torch.no_grad()
def test_expanded_weights_are_counted() -> None:
    config = _config(512, 2048)
    reader, dtype = _reader(config), torch.bfloat16
    outer, blocks = load_outer(reader, config, dtype), [load_block(reader, config, i, dtype) for i in range(2)]

    packed = [_stored(block) for block in blocks]
    latents, contexts = torch.randn(1, 16, 2, 48, 48), [torch.randn(1, 9, 32).to(dtype)]
    got = tracked_peak(lambda: predict_velocities(latents, 611, contexts, outer, packed, config, chunk_tokens=64))
    counted = dit_activations(config, num_tokens=1152, num_contexts=1, itemsize=2, chunk_tokens=64, is_expanded=True)
    assert sum(counted.values()) == pytest.approx(got, rel=TOLERANCE), counted


def test_shorter_runs_and_one_stream_take_less() -> None:
    def total(**changes: int) -> int:
        sizes = {"num_tokens": 4096, "num_contexts": 2, "itemsize": 2, "chunk_tokens": 1024} | changes
        return sum(dit_activations(_config(256, 1024), **sizes).values())  # type: ignore[arg-type]

    assert total(chunk_tokens=512) < total() < total(chunk_tokens=4096)
    assert total() - total(num_contexts=1) == 4096 * 256 * 4 + 32 * 256 * 2
