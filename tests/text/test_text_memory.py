"""The counted activations of the text encoder against the allocator's record."""

import pytest
import torch
from tracked import tracked_peak

from wanfast.checkpoint.reader import memory_reader
from wanfast.config import TextConfig
from wanfast.text.memory import text_activations
from wanfast.text.umt5 import encode_texts
from wanfast.text.weights import expected_tensors, load_block, load_outer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("dim", "ffn_dim", "num_heads", "num_tokens", "num_prompts"),
    [
        (128, 256, 4, 300, 2),
        (128, 1024, 4, 512, 1),
        (256, 640, 8, 128, 2),
        (256, 2048, 8, 256, 1),
    ],
)
def test_the_count_is_the_allocator_s_record(
    dim: int, ffn_dim: int, num_heads: int, num_tokens: int, num_prompts: int, dtype: torch.dtype
) -> None:
    _hold(dim, ffn_dim, num_heads, num_tokens, num_prompts, dtype)


def test_every_prompt_is_counted() -> None:
    _hold(256, 512, 2, 64, 6, torch.float32)


@torch.no_grad()
def _hold(dim: int, ffn_dim: int, num_heads: int, num_tokens: int, num_prompts: int, dtype: torch.dtype) -> None:
    config = TextConfig(
        vocab_size=50,
        dim=dim,
        attention_dim=dim,
        ffn_dim=ffn_dim,
        num_heads=num_heads,
        num_layers=2,
        num_buckets=32,
        max_distance=128,
        eps=1e-6,
    )
    reader = memory_reader({name: 0.05 * torch.randn(shape) for name, shape in expected_tensors(config).items()})
    outer, blocks = load_outer(reader, config, dtype), [load_block(reader, config, index, dtype) for index in range(2)]
    prompts = [tuple(index % 50 for index in range(num_tokens))] * num_prompts
    got = tracked_peak(lambda: encode_texts(prompts, outer, iter(blocks), config))
    counted = text_activations(config, num_tokens=num_tokens, num_prompts=num_prompts, itemsize=dtype.itemsize)
    assert counted == pytest.approx(got, rel=0.05)
