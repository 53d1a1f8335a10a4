"""Thousands of damaged files per reader: each is read, or refused by its name, at once and in little memory."""

import gc
import json
import os
import random
import resource
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import loras
from reference.dit import small_config
from reference.gguf_files import write_gguf
from reference.quantised import FORMS
from safetensors.torch import save_file

from wanfast.checkpoint.part import open_parts
from wanfast.checkpoint.reader import Reader, open_gguf, open_pickle, open_safetensors, open_sharded
from wanfast.config import MODELS
from wanfast.errors import CheckpointError
from wanfast.linear import expand
from wanfast.lora import LoraSpec, open_lora

_MEMORY = 1 << 20  # bytes that Python takes for one file
_RESIDENT = 64 << 20  # bytes by which the process grows over all of them
_SECONDS = 1.0
_SPREAD = [0, 1, 7, 0x22, 0x5B, 0x7B, 0x7F, 0x80, 0xFF]
_WORDS = [0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]
_VALUES: list[Any] = [0, -1, 1, 3, 2**31, 2**63, 10**30, 1.5, True, None, "", "F32", "I8", "F8_E4M3", "x", [], {}, [0]]
MODEL = replace(MODELS["t2v-A14B"], dit=small_config())


class Subject:
    """One file that is damaged in place, again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.whole = path.read_bytes()
        self._file = os.open(path, os.O_RDWR)

    def write(self, content: bytes) -> None:
        os.pwrite(self._file, content, 0)
        os.ftruncate(self._file, len(content))

    def close(self) -> None:
        os.close(self._file)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where the machine has such a folder: ten thousand writes to a disk take their time."""
    shared = Path("/dev/shm")
    place = shared / f"wanfast-fuzz-{os.getpid()}" if os.access(shared, os.W_OK) else tmp_path / "fuzz"
    place.mkdir()
    yield place
    for path in place.iterdir():
        path.unlink()
    place.rmdir()


def with_damaged_bytes(whole: bytes, draw: random.Random, header: int) -> bytes:
    """Change one to three things within the header: a byte, a number of 4 or 8 bytes, a piece lost or doubled."""
    content = bytearray(whole)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(min(header, len(content)) or 1)
        kind = draw.randrange(6)
        if kind == 0:
            content[place : place + 1] = bytes([draw.choice(_SPREAD)])
        elif kind == 1:
            content[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 2:
            content[place : place + 8] = struct.pack("<Q", draw.choice(_WORDS))
        elif kind == 3:
            content[place : place + 4] = struct.pack("<I", draw.choice(_WORDS) % 2**32)
        elif kind == 4:
            del content[place : place + draw.randint(1, 9)]
        else:
            content[place:place] = content[place : place + draw.randint(1, 9)]
    if draw.random() < 0.05:
        del content[draw.randrange(len(content)) :]
    return bytes(content)


def with_damaged_values(tree: Any, draw: random.Random) -> bytes:
    """Put another value, or nothing, in one place of a JSON text; a number may be off by a little."""
    changed = copy_of(tree)
    node = changed
    while True:
        key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.9:
            node = node[key]
            continue
        if draw.random() < 0.2:
            del node[key]
        elif isinstance(node[key], list) and draw.random() < 0.5:
            node[key] = [-item if type(item) is int else item for item in node[key]]
        elif type(node[key]) is int and draw.random() < 0.5:
            node[key] += draw.choice([-1, 1, 8, -(2**40)])
        elif draw.random() < 0.2 and isinstance(node, dict):
            node[draw.choice(["", "weight", "x.scale_weight", "scaled_fp8"])] = node.pop(key)
        else:
            node[key] = draw.choice(_VALUES)
        return json.dumps(changed).encode()


def copy_of(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: copy_of(value) for key, value in tree.items()}
    return [copy_of(value) for value in tree] if isinstance(tree, list) else tree


def safetensors_mutant(whole: bytes, draw: random.Random) -> bytes:
    """Damage the bytes of a header, or the values in it with everything around them intact."""
    length = int.from_bytes(whole[:8], "little")
    if draw.random() < 0.4:
        return with_damaged_bytes(whole, draw, 8 + length)
    text = with_damaged_values(parsed(whole[8 : 8 + length]), draw)
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]


@cache
def parsed(text: bytes) -> Any:
    return json.loads(text)


def load_all(reader: Reader) -> None:
    """Load whatever there is; what a header promises must be what comes."""
    for name in reader.names():
        weight = reader.load(name)
        assert (tuple(weight.shape), weight.dtype) == (reader.shape(name), reader.dtype(name))
        if weight.dtype.is_floating_point:
            assert expand(weight).shape == weight.shape


def fuzz(
    subject: Subject,
    mutate: Callable[[bytes, random.Random], bytes],
    use: Callable[[Path], object],
    *,
    count: int,
) -> None:
    """Use a file as it is, then damaged in `count` ways.

    Some must be refused and some not, or the damage would be of no kind that tells anything.
    """
    draw = random.Random(0)
    path = subject.path
    named = str(path if len(os.listdir(path.parent)) == 1 else path.parent)  # or a shard beside it
    refused, slowest, peak = 0, 0.0, 0
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.collect()
    use(path)
    tracemalloc.start(1)
    try:
        for number in range(count):
            content = mutate(subject.whole, draw)
            subject.write(content)
            tracemalloc.reset_peak()
            before, start = tracemalloc.get_traced_memory()[0], time.perf_counter()
            try:
                use(path)
            except CheckpointError as error:
                assert named in str(error), f"mutant {number}: {error}"
                refused += 1
            except Exception as error:
                error.add_note(f"mutant {number}: {content[:2000]!r}")
                raise
            slowest = max(slowest, time.perf_counter() - start)
            peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
        subject.close()
    assert count // 5 < refused < count
    assert slowest < _SECONDS, "a header must not keep a reader busy"
    assert peak < _MEMORY, "a header must not make a reader take memory"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * 1024 < _RESIDENT, "nor torch"


def small_state() -> dict[str, torch.Tensor]:
    """Enough of a DiT to be told as one."""
    shapes = {
        "patch_embedding.weight": (4, 2, 1, 2, 2),
        "blocks.0.self_attn.q.weight": (4, 8),
        "blocks.0.self_attn.q.bias": (4,),
        "blocks.0.ffn.0.weight": (6, 4),
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_safetensors(folder: Path) -> None:
    path = folder / "a.safetensors"
    state = {name: tensor.bfloat16() if tensor.dim() == 2 else tensor for name, tensor in small_state().items()}
    save_file(state, path, metadata={"format": "pt"})
    fuzz(Subject(path), safetensors_mutant, lambda path: load_all(open_safetensors(path)), count=4000)


def test_gguf(folder: Path) -> None:
    path = folder / "a.gguf"
    state = {"blocks.0.self_attn.q.weight": torch.ones(2, 32), "blocks.0.self_attn.q.bias": torch.ones(2)}

    def keys(writer: Any) -> None:
        writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
        writer.add_array("comfy.gguf.orig_shape.blocks.0.self_attn.q.weight", [2, 32])

    write_gguf(path, state, lambda name, _: "Q8_0" if name.endswith("weight") else "F32", prepare=keys)
    subject = Subject(path)
    header = len(subject.whole) - 128
    fuzz(
        subject,
        lambda whole, draw: with_damaged_bytes(whole, draw, header),
        lambda path: load_all(open_gguf(path)),
        count=4000,
    )


def test_index_json(folder: Path) -> None:
    state, weight_map = small_state(), {}
    for number, name in enumerate(state):
        save_file({name: state[name]}, folder / f"{number}.safetensors")
        weight_map[name] = f"{number}.safetensors"
    index = folder / "a.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 640}, "weight_map": weight_map}))

    def mutate(whole: bytes, draw: random.Random) -> bytes:
        if draw.random() < 0.5:
            return with_damaged_bytes(whole, draw, len(whole))
        return with_damaged_values(parsed(whole), draw)

    fuzz(Subject(index), mutate, lambda path: open_sharded(path), count=2000)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_zip_pickles(folder: Path) -> None:
    path = folder / "a.pth"
    torch.save(small_state(), path)
    fuzz(
        Subject(path),
        lambda whole, draw: with_damaged_bytes(whole, draw, len(whole)),
        lambda path: load_all(open_pickle(path)),
        count=1000,
    )


@pytest.mark.parametrize("form", FORMS)
def test_scaled_markers(form: str, folder: Path) -> None:
    path = folder / "a.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in FORMS[form](small_state())[0].items()}, path)
    fuzz(
        Subject(path),
        safetensors_mutant,
        lambda path: [load_all(part.reader) for part in open_parts(path)],
        count=300,
    )


def test_loras(folder: Path) -> None:
    path = folder / "a.safetensors"
    factors = loras.random_factors({"blocks.0.self_attn.q": (48, 48), "blocks.1.ffn.0": (80, 48)})
    loras.write_lora(path, factors, alpha=2.0, more={"diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 48)})
    fuzz(Subject(path), safetensors_mutant, lambda path: open_lora(LoraSpec(path), MODEL), count=1000)
