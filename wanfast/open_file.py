"""Files that weights are read from, never mapped, and which bytes of them a tensor holds.

A page of a mapped file that was cut short ends the process when it is touched; a read that fails is an error with a
name. What a tensor was read from is remembered while its memory lives: who copies it on can read it again from there
instead of keeping it.
"""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wanfast.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.multiprocessing.reductions import StorageWeakRef

Where = Literal["cpu", "meta"]  # meta: shapes alone, nothing is read

_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_PIECE_BYTES = 1 << 24  # at once, where a system cannot read into memory that is there
_MOST_BYTES = 1 << 30  # at once elsewhere: macOS refuses 2 GiB


class OpenFile:
    """A file that is opened when it is first read; one that is not as it was when it was looked at is refused.

    It stays open as long as this lives: one that is deleted, or has another in its place, serves on.
    """

    def __init__(self, path: Path, seen: os.stat_result) -> None:
        """Open nothing yet; `seen` is what the file was like when its header was read."""
        self.path = path
        self._seen = _state(seen)
        self._descriptor = -1
        self._lock = threading.Lock()

    def tensor(self, offset: int, num_bytes: int, name: str, where: Where = "cpu") -> Tensor:
        """Read bytes into memory of their own.

        Args:
            offset: of the first.
            num_bytes: how many.
            name: of what they are, for messages.
            where: "meta" gives a tensor without memory.

        Returns:
            uint8 [num_bytes], whose `origin` is known.

        Raises:
            CheckpointError: as `read`.
        """
        import torch

        data = torch.empty(num_bytes, dtype=torch.uint8, device=where)
        if where == "cpu" and num_bytes:
            self.read(offset, data, name)
            _remember(data, self, offset)
        return data

    def read(self, offset: int, target: Tensor, name: str) -> None:
        """Fill `target`, uint8 [n] on the CPU, from byte `offset`; `name` is for messages.

        Raises:
            CheckpointError: the bytes cannot be read, are not there any more, or were written to since it was opened.
        """
        self._fill(memoryview(target.numpy().data), offset, name)

    def first(self, offset: int, num_bytes: int, name: str) -> bytes:
        """Read bytes without torch.

        Raises:
            CheckpointError: as `read`.
        """
        data = bytearray(num_bytes)
        self._fill(memoryview(data), offset, name)
        return bytes(data)

    def will_read(self, offset: int, num_bytes: int) -> None:
        """Let the system fetch what is read soon."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.open(), offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def _fill(self, view: memoryview, offset: int, name: str) -> None:
        descriptor, done = self.open(), 0
        try:
            while done < len(view):
                count = self._read_some(descriptor, view[done:], offset + done)
                if count == 0:
                    raise CheckpointError(f"{self.path}: {name} is cut short; the file was truncated while in use")
                done += count
            if _state(os.fstat(descriptor)) != self._seen:
                raise CheckpointError(f"{self.path}: {name} cannot be trusted; the file was written to while in use")
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read ({error.strerror}); check the disk") from None

    def _read_some(self, descriptor: int, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [view[:_MOST_BYTES]], offset)
        with self._lock:  # Windows has one place in a file for all threads
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, min(len(view), _PIECE_BYTES))
        view[: len(data)] = data
        return len(data)

    def open(self) -> int:
        """Open it, if it is not open yet, and give its descriptor.

        Raises:
            CheckpointError: it cannot be opened, or is not as it was.
        """
        with self._lock:
            if self._descriptor < 0:
                try:
                    descriptor = os.open(self.path, _FLAGS)
                except OSError as error:
                    text = f"{self.path}: cannot be read any more ({error.strerror}); was it moved, or are many open?"
                    raise CheckpointError(text) from None
                if _state(os.fstat(descriptor)) != self._seen:
                    os.close(descriptor)
                    raise CheckpointError(
                        f"{self.path}: cannot be trusted; it was written to while in use; load the model again"
                    )
                weakref.finalize(self, os.close, descriptor)
                self._descriptor = descriptor
            return self._descriptor


@dataclass(frozen=True, slots=True)
class Origin:
    """Where in a file the bytes of a tensor were read from."""

    file: OpenFile
    offset: int


@dataclass(frozen=True, slots=True)
class _Memory:
    """Memory that was filled from a file."""

    storage: StorageWeakRef  # while it is held, no other storage has its number
    file: weakref.ref[OpenFile]
    offset: int


_memories: dict[int, _Memory] = {}  # by the numbers of their storages
_lock = threading.Lock()
_tidy_at = 1024


def origin(data: Tensor) -> Origin | None:
    """Tell what a contiguous tensor was read from; None where it was made, or its file is not used any more."""
    storage = data.untyped_storage()
    memory = _memories.get(storage._cdata)
    file = None if memory is None else memory.file()
    if memory is None or file is None:
        return None
    return Origin(file, memory.offset + data.data_ptr() - storage.data_ptr())


def _remember(data: Tensor, file: OpenFile, offset: int) -> None:
    global _tidy_at
    from torch.multiprocessing.reductions import StorageWeakRef

    storage = data.untyped_storage()
    weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
    with _lock:
        _memories[storage._cdata] = _Memory(weak, weakref.ref(file), offset)
        if len(_memories) > _tidy_at:
            gone = [number for number, memory in _memories.items() if memory.storage.expired()]  # type: ignore[no-untyped-call]
            for number in gone:
                del _memories[number]
            _tidy_at = max(1024, 2 * len(_memories))


def _state(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
