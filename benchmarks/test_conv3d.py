"""The extension's causal convolution beside torch's, each as the VAE would call it: what makes one chunk of frames.

    torch, contiguous      cat with the history, pad, conv3d in NCDHW memory: the reference implementation's own way
    torch, channels last   cat and conv3d in NDHWC memory with the weight laid out once: torch at its best
    direct                 the extension's direct sum, where it would take fewer products

Every round times all of them, one after the other, so that a slow spell of the machine meets all alike. One thread is
timed in CPU seconds, which other processes disturb little; all threads in seconds. GFLOP/s count every tap, also where
Winograd's way takes 2.25 times fewer products: a share of the peak above 1 is no mistake.
"""

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from wanfast.vae.conv import causal_conv3d, causal_conv3d_extension, causal_conv3d_reference, prepare

pytest.importorskip("wanfast._C", reason="wanfast was installed without a C++ compiler")

ROUNDS = 5
CL3D = torch.channels_last_3d


@dataclass(frozen=True, slots=True)
class Case:
    """One convolution of a VAE, on part of a frame where the whole takes seconds."""

    name: str
    channels: int
    out_channels: int
    size: tuple[int, int, int]  # frames, rows, columns
    kernel: tuple[int, int, int] = (3, 3, 3)

    @property
    def flops(self) -> int:
        """Of one call: two per product."""
        return 2 * self.channels * self.out_channels * torch.Size(self.size + self.kernel).numel()


CASES = [
    Case("2.1 level 3", 96, 96, (4, 60, 208)),
    Case("2.1 level 2", 192, 192, (4, 60, 104)),
    Case("2.1 level 1", 384, 384, (2, 60, 104)),
    Case("2.1 middle", 384, 384, (1, 60, 104)),
    Case("2.1 decoder in", 16, 384, (1, 60, 104)),
    Case("2.1 decoder out", 96, 3, (4, 60, 208)),
    Case("2.1 encoder in", 3, 96, (4, 60, 208)),
    Case("2.1 time", 384, 768, (2, 60, 104), (3, 1, 1)),
    Case("2.1 shortcut", 192, 384, (4, 60, 104), (1, 1, 1)),
    Case("2.2 encoder level 0", 160, 160, (4, 44, 80)),
    Case("2.2 decoder level 3", 256, 256, (4, 44, 80)),
    Case("2.2 middle", 1024, 1024, (1, 22, 40)),
    Case("2.2 decoder out", 256, 12, (4, 44, 80)),
]


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def core_peak(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, float]:
    """GFLOP/s of one core by dtype, measured; without a compiler none, without bf16 products no bf16."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return {}
    program = tmp_path_factory.mktemp("peak") / "fma_peak"
    source = Path(__file__).with_name("fma_peak.cpp")
    subprocess.run([compiler, "-std=c++17", "-O3", "-march=native", str(source), "-o", str(program)], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(DTYPES.values(), map(float, printed), strict=False))


def _contiguous(x: Tensor, history: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _, kh, kw = weight.shape[2:]
    return F.conv3d(F.pad(torch.cat((history, x), dim=2), (kw // 2, kw // 2, kh // 2, kh // 2)), weight, bias)


def _contenders(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], Tensor]]:
    """The extension first."""
    generator = torch.Generator().manual_seed(0)
    frames, height, width = case.size
    x = torch.randn(1, case.channels, frames, height, width, generator=generator).to(dtype)
    history = torch.randn(1, case.channels, case.kernel[0] - 1, height, width, generator=generator).to(dtype)
    weight = torch.randn(case.out_channels, case.channels, *case.kernel, generator=generator).to(dtype)
    bias = torch.randn(case.out_channels, generator=generator).to(dtype)
    x_last, history_last = x.contiguous(memory_format=CL3D), history.contiguous(memory_format=CL3D)
    weight_last, prepared = weight.contiguous(memory_format=CL3D), prepare(weight)
    takes_fewer = prepared.is_packed and dtype == torch.float32 and case.kernel[1:] == (3, 3)
    direct = {"direct": lambda: causal_conv3d_extension(x_last, history_last, prepared, bias, method="direct")}
    return {
        "extension": lambda: causal_conv3d(x_last, history_last, prepared, bias)[0],
        **(direct if takes_fewer else {}),
        "torch_channels_last": lambda: causal_conv3d_reference(x_last, history_last, weight_last, bias),
        "torch_contiguous": lambda: _contiguous(x, history, weight, bias),
        "truth": lambda: _contiguous(x.float(), history.float(), weight.float(), bias.float()),
    }


@torch.inference_mode()
def _compare(
    benchmark: BenchmarkFixture,
    case: Case,
    dtype: torch.dtype,
    peak: float | None,
    timer: Callable[[], float],
    threads: int,
) -> None:
    from tolerance import assert_close

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    contenders = _contenders(case, dtype)
    want = contenders.pop("truth")()
    for contender in contenders.values():
        assert_close(got=contender(), want=want, op="conv3d_fp32" if dtype == torch.float32 else "conv3d_bf16")

    ours, *peers = contenders
    seconds: dict[str, list[float]] = {peer: [] for peer in peers}

    def time_peers() -> None:
        for peer, spent in seconds.items():
            start = timer()
            contenders[peer]()
            spent.append(timer() - start)

    benchmark.pedantic(contenders[ours], setup=time_peers, rounds=ROUNDS)
    torch.set_num_threads(before)
    fastest, middle = benchmark.stats.stats.min, benchmark.stats.stats.median
    benchmark.extra_info |= {"threads": threads, "gflops": round(case.flops / fastest / 1e9, 1)}
    if peak is not None:
        benchmark.extra_info["share_of_peak"] = round(case.flops / fastest / 1e9 / (peak * threads), 3)
    for peer, spent in seconds.items():
        benchmark.extra_info |= {
            f"{peer}_gflops": round(case.flops / min(spent) / 1e9, 1),
            f"{peer}_seconds_over_ours": round(statistics.median(spent) / middle, 3),
            f"{peer}_fastest_over_our_fastest": round(min(spent) / fastest, 3),
        }


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_thread(benchmark: BenchmarkFixture, core_peak: dict[torch.dtype, float], case: Case, dtype: str) -> None:
    kind = DTYPES[dtype]
    _compare(benchmark, case, kind, core_peak.get(kind), time.process_time, threads=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_all_threads(benchmark: BenchmarkFixture, core_peak: dict[torch.dtype, float], case: Case, dtype: str) -> None:
    kind = DTYPES[dtype]
    _compare(benchmark, case, kind, core_peak.get(kind), time.perf_counter, threads=torch.get_num_threads())
