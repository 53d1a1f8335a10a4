"""Blocks in host memory: pinned where that is allowed and there is room, else in their files until they are copied.

A block of a file that needs no conversion costs no memory here: it is read anew for each copy, and the system keeps as
much of the file in memory as it likes. A block that was converted is kept as far as there is room, else made again.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from wanfast.errors import CheckpointError
from wanfast.residency.mappings import FileRange, MappedFiles
from wanfast.residency.memory import free_host_memory
from wanfast.residency.moves import Key
from wanfast.residency.packing import Layout, Part, lay_out

RESERVE_BYTES = 2 * 2**30  # of the host, left to everything else

# Gives uint8 [bytes] of host memory that a device copies from by itself, or None where the system refuses.
Pin: TypeAlias = Callable[[int], Tensor | None]


class OpenFile:
    """A file that blocks are read from; a file that changes meanwhile is refused."""

    def __init__(self, at: FileRange) -> None:
        """Open it.

        Raises:
            OSError: it cannot be opened, or another file has its name now.
        """
        self.path = at.path
        self._descriptor = os.open(at.path, os.O_RDONLY | os.O_CLOEXEC)
        state = os.fstat(self._descriptor)
        if (state.st_dev, state.st_ino) != at.inode:
            self.close()
            raise FileNotFoundError(f"{at.path}: is another file now")
        self._written_at = state.st_mtime_ns

    def read(self, offset: int, target: Tensor, name: str) -> None:
        """Fill `target`, uint8 [n] on the CPU, from byte `offset`; `name` is for messages.

        Raises:
            CheckpointError: the bytes cannot be read, are not there any more, or were written to since it was opened.
        """
        view, done = memoryview(target.numpy().data), 0
        try:
            while done < len(view):
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(f"{self.path}: {name} is cut short; the file was truncated while in use")
                done += count
            if os.fstat(self._descriptor).st_mtime_ns != self._written_at:
                raise CheckpointError(f"{self.path}: {name} cannot be trusted; the file was written to while in use")
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read ({error.strerror}); check the disk") from None

    def will_read(self, offset: int, num_bytes: int) -> None:
        """Let the system fetch what is read soon."""
        os.posix_fadvise(self._descriptor, offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close it; a second time does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of a block that come from one place."""

    name: str
    begin: int  # in the block
    num_bytes: int
    data: Tensor | None  # uint8 [num_bytes]
    file: OpenFile | None = None  # instead of data
    offset: int = 0  # in the file

    def read(self, begin: int, target: Tensor) -> None:
        """Fill `target` with the piece's bytes from its own byte `begin` on."""
        if self.data is not None:
            target.copy_(self.data[begin : begin + target.nbytes])
        elif self.file is not None:
            self.file.read(self.offset + begin, target, self.name)


@dataclass(frozen=True, slots=True)
class HostBlock:
    """A block's bytes, wherever they are."""

    layout: Layout
    pieces: tuple[Piece, ...]  # by `begin`, without overlap
    is_pinned: bool = False  # then it is one piece

    def read(self, begin: int, target: Tensor) -> None:
        """Fill `target`, uint8 [n] on the CPU, with the block's bytes from `begin` on; gaps are left as they are.

        Raises:
            CheckpointError: a file cannot be read.
        """
        end = begin + target.nbytes
        for piece in self.pieces:
            low, high = max(begin, piece.begin), min(end, piece.begin + piece.num_bytes)
            if low < high:
                piece.read(low - piece.begin, target[low - begin : high - begin])

    def will_read(self) -> None:
        """Let the system fetch what is not in memory."""
        for piece in self.pieces:
            if piece.file is not None:
                piece.file.will_read(piece.offset, piece.num_bytes)


class HostStore:
    """Gives blocks to be copied; `block` may be called by several threads, the rest by one when no other is there."""

    def __init__(self, load: Callable[[Any, int], object], pin: Pin | None, limit: int | None) -> None:
        """Nothing is loaded yet.

        Args:
            load: gives block `index` of expert `name` on the host, checked, in the dtype it computes in.
            pin: where the device gains by it.
            limit: bytes of host memory that may be taken; None is what is free, less a reserve.
        """
        self._load = load
        self._pin = pin
        self._limit = limit
        self._taken = 0
        self._loading = threading.Lock()
        self._kept: dict[Key, HostBlock] = {}
        self._files: dict[tuple[int, int], OpenFile] = {}

    def block(self, key: Key, *, is_copied_again: bool) -> HostBlock:
        """Find a block, or load it; one that is copied again is worth pinned memory.

        Raises:
            CheckpointError: it cannot be read.
        """
        block = self._kept.get(key)
        if block is not None:
            return block
        with self._loading:
            block = self._kept.get(key)
            if block is None:
                block = self._describe(key)
                if is_copied_again:
                    block = self._in_pinned_memory(block)
                own = sum(piece.num_bytes for piece in block.pieces if piece.file is None)
                if block.is_pinned or self._has_room(own):
                    self._kept[key] = block
                    self._taken += own
            return block

    def is_kept(self, key: Key) -> bool:
        """Whether a block was loaded and need not be loaded again."""
        return key in self._kept

    def will_read(self, key: Key) -> None:
        """Let the system fetch a block that is read soon, where it is known to come from a file."""
        if key in self._kept:
            self._kept[key].will_read()

    def close(self) -> None:
        """Let everything go."""
        self._kept.clear()
        self._taken = 0
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _has_room(self, num_bytes: int) -> bool:
        if num_bytes == 0:
            return True
        left = free_host_memory() - RESERVE_BYTES
        return num_bytes <= (left if self._limit is None else min(left, self._limit - self._taken))

    def _in_pinned_memory(self, block: HostBlock) -> HostBlock:
        size = block.layout.num_bytes
        if self._pin is None or not self._has_room(size):
            return block
        memory = self._pin(size)
        if memory is None:
            self._pin = None  # refused once, it is refused again: a limit of the system
            return block
        block.read(0, memory)
        return HostBlock(block.layout, (Piece("", 0, size, memory),), is_pinned=True)

    def _describe(self, key: Key) -> HostBlock:
        layout, parts = lay_out(self._load(*key))
        mapped = MappedFiles()
        names = [f"tensor {part.name} of {key[0]} block {key[1]}" for part in parts]
        return HostBlock(
            layout, tuple(self._piece(part, mapped, name) for part, name in zip(parts, names, strict=True))
        )

    def _piece(self, part: Part, mapped: MappedFiles, name: str) -> Piece:
        begin, size = part.place.offset, part.data.nbytes
        at = mapped.find(part.data)
        file = None if at is None else self._open(at)
        if at is None or file is None:
            return Piece(name, begin, size, part.data)
        return Piece(name, begin, size, None, file, at.offset)

    def _open(self, at: FileRange) -> OpenFile | None:
        if at.inode not in self._files:
            try:
                self._files[at.inode] = OpenFile(at)
            except OSError:  # renamed or deleted: its mapping still holds the right bytes
                return None
        return self._files[at.inode]
