"""The umT5 encoder beside transformers' on the same weights: seconds in this process, peak memory in a child each.

Times are of one thread's CPU clock, so that what else runs on the machine counts for neither. transformers runs as the
reference does, on ids padded to 512 with a mask, and in its default attention, its fastest here.
Run as a script with an engine, a dtype, a number of tokens and a folder, it encodes once and prints its peak memory.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from side_by_side import compare, compare_memory, print_peak
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCAB, TEXT_LEN = 4096, 512
ROUNDS = 8

Encode = Callable[[], Tensor]


def _ids(num_tokens: int) -> list[int]:
    drawn = torch.randint(2, VOCAB, (num_tokens - 1,), generator=torch.Generator().manual_seed(0))
    return [*drawn.tolist(), 1]


def _wanfast(folder: Path, dtype: torch.dtype, num_tokens: int) -> Encode:
    from wanfast.checkpoint.names import text_from_transformers
    from wanfast.checkpoint.reader import open_folder
    from wanfast.text.umt5 import encode_text
    from wanfast.text.weights import load_block, load_outer, text_config

    stored = open_folder(folder)
    reader = stored.renamed(text_from_transformers(stored.names()))
    config = text_config(reader)
    outer = load_outer(reader, config, dtype)
    blocks = [load_block(reader, config, index, dtype) for index in range(config.num_layers)]
    ids = _ids(num_tokens)
    return lambda: encode_text(ids, outer, blocks, config)


def _transformers(folder: Path, dtype: torch.dtype, num_tokens: int) -> Encode:
    from transformers import UMT5EncoderModel

    model = UMT5EncoderModel.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.zeros(1, TEXT_LEN, dtype=torch.int64)
    ids[0, :num_tokens] = torch.tensor(_ids(num_tokens))
    mask = (torch.arange(TEXT_LEN) < num_tokens).long()[None]
    return lambda: model(ids, attention_mask=mask).last_hidden_state[0, :num_tokens]


ENGINES = {"wanfast": _wanfast, "transformers": _transformers}


@pytest.fixture(scope="module", params=DTYPES)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """One encoder on disk in the dtype it computes in, as real ones are."""
    from reference.text import umt5_encoder

    from wanfast.config import TextConfig

    config = TextConfig(
        vocab_size=VOCAB,
        dim=1024,
        attention_dim=1024,
        ffn_dim=2560,
        num_heads=16,
        num_layers=4,
        num_buckets=32,
        max_distance=128,
        eps=1e-6,
    )
    path = tmp_path_factory.mktemp(f"text_{request.param}")
    umt5_encoder(config).to(DTYPES[request.param]).save_pretrained(path)
    return request.param, path


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("num_tokens", [TEXT_LEN, 60])
@torch.inference_mode()
def test_text_encoder(benchmark: Any, stored: tuple[str, Path], num_tokens: int) -> None:
    dtype, folder = stored
    ours, theirs = (build(folder, DTYPES[dtype], num_tokens) for build in ENGINES.values())
    _check(ours(), theirs(), dtype)

    benchmark.extra_info |= {"threads": torch.get_num_threads(), "clock": "thread CPU seconds"}
    compare(benchmark, ours, theirs, peer="transformers", rounds=ROUNDS, clock=time.thread_time)
    compare_memory(benchmark, __file__, dtype, str(num_tokens), str(folder), peer="transformers")


def _check(got: Tensor, want: Tensor, dtype: str) -> None:
    if dtype == "fp32":
        from tolerance import assert_close

        assert_close(got=got, want=want, op="umt5_fp32")
    else:  # its default attention rounds in other places than the reference: see tests/text/test_umt5.py for equality
        error = (got.float() - want.float()).square().mean().sqrt() / want.float().square().mean().sqrt()
        assert error < 0.03


@torch.inference_mode()
def _child(engine: str, dtype: str, num_tokens: str, folder: str) -> None:
    torch.set_num_threads(1)  # so that two runs agree: each thread of a matrix product keeps buffers of its own
    print_peak(engine, lambda: ENGINES[engine](Path(folder), DTYPES[dtype], int(num_tokens)))


if __name__ == "__main__":
    _child(*sys.argv[1:])
