"""Opening and loading one expert in each format: a small one with its numbers, and one of full size that is all holes.

`open` reads headers and holds every name and shape to the model; `load` also brings every block into the form it is
computed with, bf16 or as small as it is stored. The peer reads the same file with the format's own library:
`safetensors.torch.load_file`, which maps it (`safe_open` where nothing is loaded), or `gguf.GGUFReader`. Files are in
the page cache in either case.
Run as a script with an engine, a number of blocks to load and a file, it does so once and prints its peak memory.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from side_by_side import compare, compare_memory, print_peak

from wanfast.config import T2V_A14B

SMALL = replace(T2V_A14B.dit, dim=1024, ffn_dim=2816, num_heads=8, num_layers=8)
FORMATS = ("fp16", "fp8_scaled", "int8_lightx2v", "gguf_q8_0", "gguf_q4_0", "ready_exact", "ready_int8")
ROUNDS = 7


def _wanfast(path: Path, num_blocks: int | None) -> Callable[[], Any]:
    from wanfast.checkpoint.bind import check_names
    from wanfast.checkpoint.part import open_part
    from wanfast.dit.weights import dit_config, expected_tensors, load_block, load_outer

    def run() -> Any:
        reader = open_part(path, "dit").reader
        config = dit_config(reader)
        check_names(reader, expected_tensors(config), part="expert")
        if num_blocks == 0:
            return reader
        outer = load_outer(reader, config, torch.bfloat16)
        count = config.num_layers if num_blocks is None else num_blocks
        return outer, [load_block(reader, config, index, torch.bfloat16) for index in range(count)]

    return run


def _library(path: Path, num_blocks: int | None) -> Callable[[], Any]:
    if path.suffix == ".gguf":
        import gguf

        return lambda: gguf.GGUFReader(path)
    if num_blocks == 0:
        from safetensors import safe_open

        return lambda: safe_open(path, "numpy").keys()
    from safetensors.torch import load_file

    return lambda: load_file(path)


ENGINES = {"wanfast": _wanfast, "library": _library}


def _small_file(form: str, folder: Path) -> Path:
    """One small expert with random numbers."""
    from reference.gguf_files import write_gguf
    from reference.quantised import comfy_fp8, is_block_matrix, lightx2v
    from reference.single_files import write

    from wanfast.dit.weights import expected_tensors
    from wanfast.random_weights import random_tensors

    state = random_tensors(expected_tensors(SMALL), seed="high")
    path = folder / f"{form}.safetensors"
    if form.startswith("gguf"):
        kind = form.removeprefix("gguf_").upper()
        path = path.with_suffix(".gguf")
        write_gguf(path, state, lambda name, t: kind if is_block_matrix(name, t) else "F32")
        return path
    if form.startswith("ready"):
        _write_ready(form.removeprefix("ready_"), state, path)
        return path
    forms = {"fp8_scaled": lambda: comfy_fp8(state)[0], "int8_lightx2v": lambda: lightx2v(state, torch.int8)[0]}
    return write(path, forms[form]() if form in forms else {name: t.half() for name, t in state.items()})


def _write_ready(precision: str, state: dict[str, torch.Tensor], path: Path) -> None:
    from wanfast.checkpoint.packed_format import write_packed
    from wanfast.checkpoint.reader import memory_reader
    from wanfast.convert import expert_groups

    write_packed(path, expert_groups(memory_reader(state), precision), {}, lambda num_bytes: None)


def _full_file(form: str, folder: Path) -> Path:
    """One expert of T2V-A14B without its numbers."""
    from reference import meta_files
    from reference.gguf_files import write_header

    from wanfast.checkpoint.packed_format import packed_header
    from wanfast.checkpoint.part import open_part
    from wanfast.convert import expert_groups
    from wanfast.dit.weights import expected_tensors

    shapes = expected_tensors(T2V_A14B.dit)
    path = folder / f"{form}.safetensors"
    if form.startswith("gguf"):
        kind = form.removeprefix("gguf_").upper()
        entries = [(name, shape, _kind_of(name, shape, kind)) for name, shape in shapes.items()]
        write_header(path.with_suffix(".gguf"), entries, architecture="wan", file_type=2)
        return path.with_suffix(".gguf")
    if form.startswith("ready"):
        plain = meta_files.write_meta(folder / "plain.safetensors", meta_files.plain(shapes, "F16"))
        header, ends = packed_header(expert_groups(open_part(plain, "dit").reader, form.removeprefix("ready_")), {})
        path.write_bytes(header)
        with path.open("r+b") as file:
            file.truncate(ends[-1])
        return path
    entries = {
        "fp16": lambda: meta_files.plain(shapes, "F16"),
        "fp8_scaled": lambda: meta_files.fp8_scaled(shapes),
        "int8_lightx2v": lambda: meta_files.lightx2v(shapes, "I8"),
    }
    return meta_files.write_meta(path, entries[form]())


def _kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    is_matrix = name.startswith("blocks.") and len(shape) == 2
    return kind if is_matrix else "F32" if name == "patch_embedding.weight" else "F16"


@pytest.mark.parametrize("form", FORMATS)
def test_load_a_small_expert(benchmark: BenchmarkFixture, form: str, tmp_path: Path) -> None:
    path = _small_file(form, tmp_path)
    ours, theirs = _wanfast(path, None), _library(path, None)
    compare(benchmark, ours, theirs, peer="library", rounds=ROUNDS)
    benchmark.extra_info |= {"file_mb": round(path.stat().st_size / 1e6, 1)}
    compare_memory(benchmark, __file__, "all", str(path), peer="library", is_held=False)


@pytest.mark.parametrize("form", FORMATS)
def test_open_a_full_size_expert(benchmark: BenchmarkFixture, form: str, tmp_path: Path) -> None:
    """Every name and shape of 14 billion parameters, nothing loaded: under 2 s and 500 MB."""
    path = _full_file(form, tmp_path)
    compare(benchmark, _wanfast(path, 0), _library(path, 0), peer="library", rounds=ROUNDS)
    benchmark.extra_info |= {"file_gb": round(path.stat().st_size / 1e9, 2)}
    compare_memory(benchmark, __file__, "0", str(path), peer="library", is_held=False)
    assert benchmark.stats.stats.max < 2 and benchmark.extra_info["peak_mb"] < 500


def _child(engine: str, num_blocks: str, path: str) -> None:
    count = None if num_blocks == "all" else int(num_blocks)
    print_peak(engine, lambda: ENGINES[engine](Path(path), count))


if __name__ == "__main__":
    _child(*sys.argv[1:])
