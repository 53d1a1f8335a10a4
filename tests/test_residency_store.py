"""Blocks in host memory and in files: their bytes, what they cost, and what happens when a file changes underneath."""

import ctypes
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from blocks import BLOCK_BYTES, Block, Inner, Loads, is_block, make_block, make_residency, make_residency_in_place
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanfast.checkpoint.reader import Reader, memory_reader, open_safetensors
from wanfast.errors import CheckpointError
from wanfast.mappings import MappedFiles
from wanfast.residency.memory import free_host_memory, named_tensors, weight_bytes
from wanfast.residency.packing import lay_out, packed_bytes, unpack
from wanfast.residency.store import HostStore

PAGES = 40_000  # more bytes than the pages around a truncated end hold
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Some:
    tensors: tuple[Tensor, ...]
    note: str = "kept"


DTYPES = [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64]
tensors = st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES), st.integers(0, 2**31))


def random_bytes(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    numbers = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return numbers.view(dtype).view(shape)


def same(one: Tensor, other: Tensor) -> bool:
    def raw(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(raw(one), raw(other))


@settings(max_examples=200, deadline=None)
@given(st.lists(tensors, max_size=6), st.booleans(), st.integers(1, 64))
def test_a_packed_block_is_the_same_block(
    forms: list[tuple[list[int], torch.dtype, int]], is_transposed: bool, chunk: int
) -> None:
    originals = [random_bytes(*form) for form in forms]
    if is_transposed:
        originals = [tensor.transpose(0, -1) if tensor.dim() else tensor for tensor in originals]
    block = Some(tuple(originals))
    host = HostStore(lambda *_: block, None, None).block(("x", 0), is_copied_again=False)
    run = torch.full((host.layout.num_bytes,), 0xEE, dtype=torch.uint8)
    for begin in range(0, len(run), chunk):
        host.read(begin, run[begin : begin + chunk])
    found = unpack(host.layout, run)
    assert found.note == "kept" and len(found.tensors) == len(originals)
    assert all(same(got, want) for got, want in zip(found.tensors, originals, strict=True))
    assert host.layout.num_bytes <= packed_bytes([tensor.nbytes for tensor in originals])
    assert all(tensor.data_ptr() % 16 == run.data_ptr() % 16 for tensor in found.tensors if tensor.nbytes)


def test_tensors_that_lie_together_keep_their_distances() -> None:
    """So that the matrices of q, k and v, one after the other in a packed file, are one matrix in a slot too."""
    memory = torch.arange(4096, dtype=torch.uint8)
    parts = (memory[1024:2048], memory[0:1024], memory[2048 : 2048 + 32])
    layout, placed = lay_out(Some(parts))
    assert [place.offset for place in layout.template.tensors] == [1024, 0, 2048]
    assert [part.place.offset for part in placed] == [0, 1024, 2048]
    apart, _ = lay_out(Some((memory[0:1024], memory[2048:2080])))
    assert [place.offset for place in apart.template.tensors] == [0, 1024]
    overlapping, _ = lay_out(Some((memory[0:1024], memory[512:1024])))
    assert [place.offset for place in overlapping.template.tensors] == [0, 1024]
    crooked, _ = lay_out(Some((memory[0:1000], memory[1000:1024])))
    assert [place.offset for place in crooked.template.tensors] == [0, 1024]


def write_blocks(path: Path, num_blocks: int = 5) -> None:
    """`make_block`s of both experts in one file, each with a large tensor before it."""
    stored = {}
    for expert in ("high_noise", "low_noise"):
        for index in range(num_blocks):
            for name, tensor in named_tensors(make_block(expert, index)):
                stored[f"{expert}.{index}.{name}"] = tensor
            stored[f"{expert}.{index}.filling"] = torch.zeros(PAGES, dtype=torch.uint8)
    save_file(stored, path)


def loader(reader: Reader) -> Callable[[str, int], Block]:
    def load(expert: str, index: int) -> Block:
        def tensor(name: str) -> Tensor:
            found = reader.load(f"{expert}.{index}.{name}")
            assert isinstance(found, Tensor)
            return found

        inner = Inner(tensor("inner.values"), tensor("inner.scale"))
        return Block(tensor("weight"), inner, extra=(tensor("extra.0"),))

    return load


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    write_blocks(path)
    return path


def mapping_loader(file: Path) -> Callable[[str, int], Block]:
    """As of a model that another library has mapped."""
    tensors = load_file(file)
    return loader(memory_reader(tensors, file))


def test_a_mapped_tensor_is_found_in_its_file(file: Path) -> None:
    block = mapping_loader(file)("low_noise", 3)
    at = MappedFiles().find(block.weight)
    assert at is not None and at.path == file
    content = file.read_bytes()[at.offset : at.offset + block.weight.nbytes]
    assert content == block.weight.numpy().tobytes()
    assert MappedFiles().find(torch.zeros(5)) is None
    assert MappedFiles(file.parent / "no maps").find(block.weight) is None


@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_block_of_a_file_is_loaded_once_and_costs_no_memory(is_mapped: bool, file: Path) -> None:
    loads = Loads()
    from_file = mapping_loader(file) if is_mapped else loader(open_safetensors(file))

    def load(expert: str, index: int) -> Block:
        loads(expert, index)
        return from_file(expert, index)

    store = HostStore(load, None, 0)
    for number in range(3):
        host = store.block(("high_noise", 2), is_copied_again=True)
        run = torch.empty(host.layout.num_bytes, dtype=torch.uint8)
        host.read(0, run)
        assert is_block(unpack(host.layout, run), "high_noise", 2)
        assert all((piece.data is None) == (is_mapped or number > 0) for piece in host.pieces), (
            "read once to be checked"
        )
        assert host.own_bytes == store.taken == 0
    assert len(loads.keys) == 1
    store.will_read(("high_noise", 2))
    store.close()


def run_with_fault(file: Path, fault: Callable[[], None], num_slots: int = 2) -> None:
    """Two passes over the blocks of a file, the fault between them."""
    residency = make_residency(loader(open_safetensors(file)), num_slots=num_slots)
    passes = ["high_noise", "low_noise"] * 2
    residency.begin(passes)
    try:
        for count, expert in enumerate(passes):
            if count == 2:
                fault()
            for index, block in enumerate(residency.blocks(expert)):
                assert is_block(block, expert, index)
    finally:
        residency.release()


def test_a_file_cut_short_in_mid_run_is_an_error_by_name(file: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^{file}: tensor .* of (high|low)_noise block \d .*truncated"):
        run_with_fault(file, lambda: os.truncate(file, 4000))


def test_a_file_written_to_in_mid_run_is_an_error_by_name(file: Path) -> None:
    def overwrite() -> None:
        with file.open("r+b") as stream:
            stream.seek(file.stat().st_size // 2)
            stream.write(b"\0" * 1000)

    with pytest.raises(CheckpointError, match=rf"^{file}: tensor .* written to while in use"):
        run_with_fault(file, overwrite)


def test_a_disk_that_fails_in_mid_run_is_an_error_by_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(CheckpointError, match=rf"^{file}: tensor .* cannot be read \(Input/output error\)"):
        run_with_fault(file, lambda: monkeypatch.setattr(os, "preadv", fail))


def test_short_reads_are_continued(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:7]], offset))
    run_with_fault(file, lambda: None)


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_file_replaced_or_deleted_in_mid_run_is_read_on(file: Path, is_replaced: bool) -> None:
    def change() -> None:
        other = file.with_name("other")
        other.write_bytes(bytes(file.stat().st_size))
        other.replace(file) if is_replaced else file.unlink()

    run_with_fault(file, change)


@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_file_replaced_before_its_blocks_were_read_is_not_mixed_up(is_mapped: bool, file: Path) -> None:
    """What is open, or mapped, still is the old file; Linux tells the name of a mapping with "(deleted)" behind it."""
    load = mapping_loader(file) if is_mapped else loader(open_safetensors(file))
    block = load("high_noise", 0)  # opens
    other = file.with_name("other")
    other.write_bytes(bytes(file.stat().st_size))
    file.with_name(f"{file.name} (deleted)").write_bytes(other.read_bytes())
    other.replace(file)
    residency = make_residency(load, num_slots=2)
    assert all(is_block(found, "high_noise", i) for i, found in enumerate(residency.blocks("high_noise")))
    assert is_block(block, "high_noise", 0)


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (112, 0), (113, 1), (338, 2), (339, 3), (10**6, 5), (None, 5)])
def test_converted_blocks_stay_as_far_as_their_limit_goes(limit: int | None, kept: int) -> None:
    assert BLOCK_BYTES == 113
    loads = Loads()
    store = HostStore(loads, None, limit)
    for _ in range(2):
        loads.keys.clear()
        for index in range(5):
            store.block(("high_noise", index), is_copied_again=False)
    assert loads.keys == [("high_noise", index) for index in range(kept, 5)]
    store.close()
    store.block(("high_noise", 0), is_copied_again=False)
    assert loads.keys[-1] == ("high_noise", 0)


@pytest.mark.parametrize(("free", "kept"), [(2 * GIB, 0), (2 * GIB + 112, 0), (2 * GIB + 113, 1)])
def test_memory_of_the_host_is_checked_before_it_is_taken(
    free: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanfast.residency.store.free_host_memory", lambda: free)
    loads, asked = Loads(), []

    def pin(num_bytes: int) -> Tensor:
        asked.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    HostStore(loads, pin, None).block(("high_noise", 0), is_copied_again=True)
    assert asked == []  # packed, it is larger
    store = HostStore(loads, None, None)
    loads.keys.clear()
    store.block(("high_noise", 0), is_copied_again=True)
    store.block(("high_noise", 0), is_copied_again=True)
    assert len(loads.keys) == 2 - kept


def test_only_what_is_copied_again_is_pinned_until_the_system_refuses() -> None:
    asked: list[int] = []

    def pin(num_bytes: int) -> Tensor | None:
        asked.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8) if len(asked) < 3 else None

    store = HostStore(make_block, pin, None)
    assert not store.block(("high_noise", 0), is_copied_again=False).is_pinned
    assert [store.block(("high_noise", i), is_copied_again=True).is_pinned for i in (1, 2, 3, 4)] == [
        True,
        True,
        False,
        False,
    ]
    assert len(asked) == 3
    host = store.block(("high_noise", 1), is_copied_again=False)
    assert host.is_pinned and len(host.pieces) == 1 and host.pieces[0].data is not None
    assert is_block(unpack(host.layout, host.pieces[0].data), "high_noise", 1)


MEMINFO = "MemTotal: 100 kB\nMemAvailable:   64 kB\n"


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = {"memory.max": "30000", "memory.current": "20000", "memory.stat": "anon 1\ninactive_file 5000\n"}
V1 = {
    "memory.limit_in_bytes": "30000",
    "memory.usage_in_bytes": "28000",
    "memory.stat": "inactive_file 1\ntotal_inactive_file 3000\n",
}


@pytest.mark.parametrize(
    ("cgroup", "folder", "files", "want"),
    [
        (None, "", {}, 65536),
        ("0::/\n", "sys/fs/cgroup", V2, 15000),
        ("0::/a/b\n", "sys/fs/cgroup/a", V2, 15000),  # the limit is the parent's
        ("0::/a/b\n", "sys/fs/cgroup", V2, 15000),
        ("0::/\n", "sys/fs/cgroup", V2 | {"memory.max": "max"}, 65536),
        ("0::/\n", "sys/fs/cgroup", V2 | {"memory.max": "100"}, 0),
        ("0::/\n", "sys/fs/cgroup", V2 | {"memory.max": "900000000"}, 65536),
        ("5:cpu,memory:/job\n0::/\n", "sys/fs/cgroup/memory/job", V1, 5000),
        ("5:cpu,memory:/job\n0::/\n", "sys/fs/cgroup/memory", V1, 5000),  # seen from inside a container
        ("5:cpu:/job\n", "sys/fs/cgroup/memory/job", V1, 65536),
    ],
)
def test_free_memory_of_the_host_minds_containers(
    cgroup: str | None, folder: str, files: dict[str, str], want: int, tmp_path: Path
) -> None:
    files = {f"{folder}/{name}": text for name, text in files.items()} | {"proc/meminfo": MEMINFO}
    if cgroup is not None:
        files["proc/self/cgroup"] = cgroup
    assert free_host_memory(write_tree(tmp_path, files)) == want


def test_this_machine_has_some_memory_free() -> None:
    assert 0 < free_host_memory() < 2**50


def test_bytes_of_weights_are_those_of_their_tensors() -> None:
    assert weight_bytes(make_block("high_noise", 0)) == BLOCK_BYTES


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library")
@pytest.mark.parametrize("is_in_place", [False, True])
def test_what_was_freed_is_the_systems_before_the_next_block_is_loaded(is_in_place: bool) -> None:
    """The C library holds on to tensors of a few megabytes; here small ones that stay lie between them."""

    def own() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    torch.ones(25 * 2**20, dtype=torch.uint8)  # from now on such pieces are not given back when they are freed
    freed, stay = [], []
    for _ in range(20):
        freed.append(torch.ones(8 * 2**20, dtype=torch.uint8))
        stay.append(torch.ones(1000, dtype=torch.uint8))
    before = own()
    freed.clear()
    if is_in_place:
        next(make_residency_in_place(num_slots=None).blocks("high_noise"))
    else:
        HostStore(make_block, None, None).block(("high_noise", 0), is_copied_again=False)
    assert before - own() > 140 * 2**20 and len(stay) == 20
