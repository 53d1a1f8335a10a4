"""Files that are read: one that changes in use is an error by name, and what was read is known by its memory."""

import gc
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wanfast import open_file as open_file_module
from wanfast.checkpoint.reader import open_file
from wanfast.errors import CheckpointError
from wanfast.open_file import origin


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_that_is_cut_short_in_use_is_an_error_by_name(suffix: str, tmp_path: Path) -> None:
    """In a mapping it would end the process."""
    path = tmp_path / f"a.{suffix}"
    tensors = {"a": torch.ones(100, 100), "b": torch.ones(100, 100)}
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    reader = open_file(path)
    kept = reader.load("a")
    os.truncate(path, 50_000)
    for take in (lambda: reader.load("b"), lambda: reader.load_rows("b", [99])):
        with pytest.raises(CheckpointError, match=rf"a\.{suffix}: tensor b is cut short; .* truncated while in use"):
            take()
    for take in (lambda: reader.load("a"), lambda: reader.ref("b").first_bytes(8)):
        with pytest.raises(CheckpointError, match=rf"a\.{suffix}: tensor [ab] cannot be trusted; .* written to while"):
            take()
    assert torch.equal(kept, tensors["a"])


@pytest.mark.parametrize("change", [os.truncate, lambda path, _: path.write_bytes(b"")])
def test_a_file_that_changes_between_its_header_and_its_numbers_is_refused(
    change: Callable[[Path, int], object], tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(10_000)}, path)
    reader = open_file(path)
    change(path, 500)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be trusted; it was written to"):
        reader.load("a")


def test_without_preadv_the_same_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where a file has one place for all threads."""
    monkeypatch.delattr(os, "preadv")
    monkeypatch.setattr("wanfast.open_file._PIECE_BYTES", 1000)
    tensors = {"a": torch.randn(700), "b": torch.randn(900)}
    save_file(tensors, tmp_path / "a.safetensors")
    reader = open_file(tmp_path / "a.safetensors")
    with ThreadPoolExecutor(4) as pool:
        for name, found in zip("ab" * 50, pool.map(reader.load, "ab" * 50), strict=True):
            assert torch.equal(found, tensors[name])


def test_what_a_tensor_was_read_from_is_known_while_its_memory_lives(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.randn(300), "b": torch.randn(500).bfloat16()}, path)
    reader, content = open_file(path), path.read_bytes()
    for name in "ab":
        tensor = reader.load(name)
        for part in (tensor, tensor[40:60], tensor.detach().reshape(-1).view(torch.uint8)[16:99]):
            at = origin(part)
            assert at is not None and at.file.path == path
            assert content[at.offset : at.offset + part.nbytes] == part.view(torch.uint8).numpy().tobytes()
        assert origin(tensor.clone()) is None and origin(tensor.float() * 2) is None
    kept = reader.load("a")
    for _ in range(3000):  # memory is used again, and what it was before is forgotten
        reader.load("b")
        assert origin(torch.empty(500, dtype=torch.bfloat16)) is None
    assert origin(kept) is not None and len(open_file_module._memories) < 1100
    del reader, at
    gc.collect()
    assert origin(kept) is None  # nobody reads that file any more


def test_a_file_that_was_replaced_is_not_held_open(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100)}, path)
    reader = open_file(path)
    save_file({"a": torch.zeros(100)}, tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").replace(path)
    open_before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(20):
        with pytest.raises(CheckpointError, match="cannot be trusted"):
            reader.load("a")
    assert (len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0) < open_before + 10


def test_no_more_is_read_at_once_than_a_system_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of the token table in fp32 on macOS."""
    sizes, own = [], os.preadv

    def preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        sizes.append(sum(map(len, views)))
        return own(descriptor, views, offset)

    monkeypatch.setattr("wanfast.open_file._MOST_BYTES", 1000)
    monkeypatch.setattr(os, "preadv", preadv)
    tensor = torch.randn(900)
    save_file({"a": tensor}, tmp_path / "a.safetensors")
    assert torch.equal(open_file(tmp_path / "a.safetensors").load("a"), tensor)
    assert sizes == [1000, 1000, 1000, 600]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_rows_are_those_of_the_tensor_alone(suffix: str, tmp_path: Path) -> None:
    """What lies before and behind them in the file is another tensor's."""
    path = tmp_path / f"a.{suffix}"
    tensors = {name: torch.randn(8, 4) for name in "abc"} | {"none": torch.empty(0, 4), "thin": torch.empty(3, 0)}
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    reader = open_file(path)
    assert torch.equal(reader.load_rows("b", [7, 0, 7]), tensors["b"][[7, 0, 7]])
    for name, rows in (("b", []), ("none", []), ("thin", [2, 1])):
        assert reader.load_rows(name, rows).shape == (len(rows), *tensors[name].shape[1:])
    for name, row in (("b", 8), ("b", -1), ("none", 0)):
        with pytest.raises(
            ValueError, match=rf"^rows: must be from 0 to -?\d in .*a\.{suffix}: tensor {name}, got {row}$"
        ):
            reader.load_rows(name, [row])
