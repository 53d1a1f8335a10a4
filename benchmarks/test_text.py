"""The umT5 encoder beside transformers' on the same weights: seconds in this process, peak memory in a child each.

Every round times both, one after the other, on one thread and its CPU clock, so that what else runs on the machine
counts for neither. transformers runs as the reference does, on ids padded to 512 with a mask, and in its default
attention, its fastest here.
Run as a script with an engine, a dtype, a number of tokens and a folder, it encodes once and prints its peak memory.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
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


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("num_tokens", [TEXT_LEN, 60])
@torch.inference_mode()
def test_text_encoder(benchmark: Any, stored: tuple[str, Path], num_tokens: int) -> None:
    dtype, folder = stored
    ours, theirs = (build(folder, DTYPES[dtype], num_tokens) for build in ENGINES.values())
    _check(ours(), theirs(), dtype)

    peer_seconds: list[float] = []

    def time_peer() -> None:
        start = time.thread_time()
        theirs()
        peer_seconds.append(time.thread_time() - start)

    benchmark.pedantic(ours, setup=time_peer, rounds=ROUNDS)
    peaks = {engine: _peak_megabytes(engine, dtype, num_tokens, folder) for engine in ENGINES}
    seconds, peer = benchmark.stats.stats.median, statistics.median(peer_seconds)
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "clock": "thread CPU seconds",
        "transformers_seconds": round(peer, 4),
        "transformers_seconds_over_ours": round(peer / seconds, 3),
        "transformers_fastest_over_our_fastest": round(min(peer_seconds) / benchmark.stats.stats.min, 3),
        "encode_peak_mb": peaks["wanfast"],
        "transformers_encode_peak_mb": peaks["transformers"],
    }
    assert peaks["wanfast"] <= peaks["transformers"]


def _check(got: Tensor, want: Tensor, dtype: str) -> None:
    if dtype == "fp32":
        from tolerance import assert_close

        assert_close(got=got, want=want, op="umt5_fp32")
    else:  # its default attention rounds in other places than the reference: see tests/text/test_umt5.py for equality
        error = (got.float() - want.float()).square().mean().sqrt() / want.float().square().mean().sqrt()
        assert error < 0.03


def _peak_megabytes(engine: str, dtype: str, num_tokens: int, folder: Path) -> float:
    """Most memory that loading and one encoding add to a fresh process after its imports."""
    command = [sys.executable, __file__, engine, dtype, str(num_tokens), str(folder)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _memory_kilobytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


@torch.inference_mode()
def _main(engine: str, dtype: str, num_tokens: str, folder: str) -> None:
    if engine == "transformers":
        from transformers import UMT5EncoderModel  # noqa: F401  (what an import costs is not an encoder's memory)
    else:
        import wanfast.text.umt5  # noqa: F401
    torch.set_num_threads(1)  # so that two runs agree: each thread of a matrix product keeps buffers of its own
    imported = _memory_kilobytes("VmRSS")
    ENGINES[engine](Path(folder), DTYPES[dtype], int(num_tokens))()
    print(round((_memory_kilobytes("VmHWM") - imported) / 1024, 1))


if __name__ == "__main__":
    _main(*sys.argv[1:])
