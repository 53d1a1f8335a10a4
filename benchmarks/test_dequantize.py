"""Expanding GGUF weights on the CPU beside gguf's own numpy code.

gguf makes fp32; where bf16 is wanted, as the engine does, it is followed by torch's cast. gguf works on one core, so
both do here, and the time is the process's own: a busy machine does not change who is faster.
"""

import time
from collections.abc import Callable

import gguf
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from side_by_side import compare
from torch import Tensor

KINDS = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_0", "Q5_1", "Q4_0", "Q4_1")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS, IN_FEATURES = 1280, 5120  # a quarter of a projection of the 14B models
ROUNDS = 10

Expand = Callable[[], Tensor]


def _rows(kind: str) -> Tensor:
    elements, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (ROWS, IN_FEATURES // elements, num_bytes), dtype=torch.uint8, generator=generator)
    rows &= 0b10111111  # in the upper byte of an fp16 scale: below 2, so every value is finite
    return rows.flatten(1)


def _wanfast(kind: str, dtype: torch.dtype) -> Expand:
    from wanfast.kernels import dequantize_gguf

    rows = _rows(kind)
    return lambda: dequantize_gguf(rows, kind, in_features=IN_FEATURES, dtype=dtype)


def _gguf(kind: str, dtype: torch.dtype) -> Expand:
    rows, kind_number = _rows(kind).numpy(), gguf.GGMLQuantizationType[kind]
    return lambda: torch.from_numpy(gguf.quants.dequantize(rows, kind_number)).to(dtype)


ENGINES = {"wanfast": _wanfast, "gguf": _gguf}


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_gguf(benchmark: BenchmarkFixture, kind: str, dtype: str) -> None:
    ours, theirs = (build(kind, DTYPES[dtype]) for build in ENGINES.values())
    assert torch.equal(ours(), theirs())
    compare(benchmark, ours, theirs, peer="gguf", rounds=ROUNDS, clock=time.process_time)
    assert benchmark.extra_info["gguf_fastest_over_our_fastest"] >= 1
