"""`wanfast convert` on one expert: seconds beside a plain copy of the file, bytes read and written, and memory.

The peer is `shutil.copyfile` of the source: what moving the bytes costs without looking at them.
Run as a script with a precision, a source and a target, it converts once, from a cold file, and prints what the process
read and wrote, and its peak memory, as JSON.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from side_by_side import compare

from wanfast.config import T2V_A14B

SMALL = replace(T2V_A14B.dit, dim=1024, ffn_dim=2816, num_heads=8, num_layers=8)
PRECISIONS = pytest.mark.parametrize("precision", ["exact", "fp8", "int8"])


def _convert(source: Path, target: Path, precision: str) -> None:
    from wanfast.checkpoint.packed_format import write_packed
    from wanfast.checkpoint.part import open_part
    from wanfast.convert import expert_groups

    write_packed(target, expert_groups(open_part(source, "dit").reader, precision), {}, lambda num_bytes: None)


def _measured(precision: str, source: Path, target: Path) -> dict[str, float]:
    """Convert in a child."""
    command = [sys.executable, __file__, precision, str(source), str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@PRECISIONS
def test_convert_a_small_expert(benchmark: BenchmarkFixture, precision: str, tmp_path: Path) -> None:
    from reference.single_files import write

    from wanfast.dit.weights import expected_tensors
    from wanfast.random_weights import random_tensors

    state = random_tensors(expected_tensors(SMALL), seed="high")
    source = write(tmp_path / "source.safetensors", {name: tensor.half() for name, tensor in state.items()})
    target = tmp_path / "target.safetensors"

    def copy() -> None:
        shutil.copyfile(source, tmp_path / "copy")
        with (tmp_path / "copy").open("r+b") as file:
            os.fsync(file.fileno())

    compare(benchmark, lambda: _convert(source, target, precision), copy, peer="copyfile", rounds=5)
    told = _measured(precision, source, target)
    benchmark.extra_info |= {"source_mb": round(source.stat().st_size / 1e6, 1), **told}
    assert told["bytes_read_over_source"] < 1.05 and told["bytes_written_over_target"] < 1.01


@PRECISIONS
def test_convert_a_full_size_expert(benchmark: BenchmarkFixture, precision: str, tmp_path: Path) -> None:
    """28.6 GB of fp16 that are all holes, in under 8 GB."""
    from reference.meta_files import plain, write_meta

    from wanfast.dit.weights import expected_tensors

    if shutil.disk_usage(tmp_path).free < 40e9:
        pytest.skip("needs 40 GB of room on the disk")
    source = write_meta(tmp_path / "source.safetensors", plain(expected_tensors(T2V_A14B.dit), "F16"))
    told = benchmark.pedantic(_measured, args=(precision, source, tmp_path / "target.safetensors"), rounds=1)
    (tmp_path / "target.safetensors").unlink()
    benchmark.extra_info |= {"source_gb": round(source.stat().st_size / 1e9, 2), **told}
    assert told["peak_mb"] < 8000


def _child(precision: str, source: str, target: str) -> None:
    with Path(source).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    import wanfast.convert  # noqa: F401  what imports read is not counted

    before, start = _io(), time.perf_counter()
    _convert(Path(source), Path(target), precision)
    seconds, after = time.perf_counter() - start, _io()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    told = {
        "child_seconds": round(seconds, 2),
        "bytes_read_over_source": round((after["read_bytes"] - before["read_bytes"]) / Path(source).stat().st_size, 4),
        "bytes_written_over_target": round((after["wchar"] - before["wchar"]) / Path(target).stat().st_size, 4),
        "peak_mb": round(int(peak[1]) / 1e3, 1) if peak else None,
    }
    print(json.dumps(told))


def _io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


if __name__ == "__main__":
    _child(*sys.argv[1:])
