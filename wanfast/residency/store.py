"""Blocks in host memory: pinned where that is allowed and there is room, else in their files until they are copied.

A block that is used as its file has it costs no memory here, once it was loaded and checked: it is read anew for each
copy but the first, and the system keeps as much of the file in memory as it likes. A block that was converted is kept
as far as there is room, else made again.

When room is short, what is needed last goes first: blocks that no announced copy needs any more, then those whose next
copy is furthest away, the rule that also rules the slots. Nothing goes before that: the next generation needs it again,
and reading and rounding it anew takes far longer than a copy.
"""

import math
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor

from wanfast.errors import CheckpointError
from wanfast.mappings import FileRange, MappedFiles
from wanfast.open_file import OpenFile, origin
from wanfast.residency.memory import free_host_memory, give_back_freed
from wanfast.residency.moves import Key
from wanfast.residency.packing import Layout, Part, lay_out

RESERVE_BYTES = 2 * 2**30  # of the host, left to everything else

# Gives uint8 [bytes] of host memory that a device copies from by itself, or None where the system refuses.
Pin: TypeAlias = Callable[[int], Tensor | None]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of a block that come from one place."""

    name: str
    begin: int  # in the block
    num_bytes: int
    data: Tensor | None  # uint8 [num_bytes]
    file: OpenFile | None = None  # where they are too, or instead
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

    def without_files(self) -> "HostBlock":
        """Give the block without the memory of what can be read from files again."""
        pieces = (piece if piece.file is None else replace(piece, data=None) for piece in self.pieces)
        return replace(self, pieces=tuple(pieces))

    @property
    def own_bytes(self) -> int:
        """Host memory that it takes as long as it is kept: what is in no file."""
        return sum(piece.num_bytes for piece in self.pieces if piece.file is None)


class HostStore:
    """Gives blocks to be copied.

    `block`, `is_kept`, `can_keep` and `will_read` may be called by several threads, `copied` by the one that copies,
    the rest by one when no other is there.
    """

    def __init__(self, load: Callable[[Any, int], object], pin: Pin | None, limit: int | None) -> None:
        """Nothing is loaded yet.

        Args:
            load: gives block `index` of expert `name` on the host, checked, in the dtype it computes in.
            pin: where the device gains by it.
            limit: bytes of host memory that may be taken; None is what is free, less a reserve.
        """
        self._load = load
        self._pin = pin
        self._pins = pin is not None
        self._limit = limit
        self._taken = 0
        self._loading = threading.Lock()
        self._kept: dict[Key, HostBlock] = {}
        self._files: dict[tuple[int, int], OpenFile] = {}  # that somebody else has mapped, by inode
        self._is_in_file = False  # whether the last block that was loaded is as its file has it, or nearly so
        self._uses: dict[Key, list[int]] = {}  # announced copies of each block
        self._copies = 0  # of those announced, how many are under way or over
        self._waits: dict[Key, Callable[[], None]] = {}  # for the last copy of a block's pinned memory

    @property
    def taken(self) -> int:
        """Bytes of host memory that blocks take."""
        return self._taken

    def allow(self, limit: int) -> None:
        """Bound the bytes that are taken from here on; what is kept beyond them goes when others need the room."""
        self._limit = limit

    def expect(self, keys: Sequence[Key]) -> None:
        """Announce the copies to come, in order; forget those announced before."""
        uses: dict[Key, list[int]] = {}
        for at, key in enumerate(keys):
            uses.setdefault(key, []).append(at)
        self._uses, self._copies = uses, 0

    def copied(self, key: Key, wait: Callable[[], None]) -> None:
        """Note that the next of the announced copies is under way; `wait` returns when it is over.

        No lock is taken: the thread that copies would wait for the one that loads ahead.
        """
        self._waits[key] = wait
        self._copies += 1

    def block(self, key: Key, *, is_copied_again: bool) -> HostBlock:
        """Find a block, or load it; one that is copied again is worth pinned memory.

        Raises:
            CheckpointError: it cannot be read.
        """
        block = self._kept.get(key)  # the next copy's stays: others only make room that are needed after them
        if block is not None:
            return block
        with self._loading:
            block = self._kept.get(key)
            if block is None:
                needed_at = self._next_copy(key, self._copies + 1)  # by now: loaded ahead, it is for the next copy
                block = self._describe(key)
                if is_copied_again:
                    block = self._in_pinned_memory(block, needed_at)
                if block.is_pinned or self._make_room(block.own_bytes, needed_at):
                    self._kept[key] = block.without_files()
                    self._taken += block.own_bytes
            return block

    def can_keep(self, key: Key, num_bytes: int, *, is_copied_again: bool) -> bool:
        """Whether a block of at most so many bytes may be loaded long before its copy, at the cost of no other's."""
        if self._is_in_file and not (is_copied_again and self._pin is not None):
            return True
        return self._has_room(num_bytes) or self._last_needed(later_than=sys.maxsize) is not None

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
        self._waits.clear()
        self._taken = 0
        self._files.clear()

    def _free(self) -> int:
        return free_host_memory()

    def _has_room(self, num_bytes: int) -> bool:
        if num_bytes == 0:
            return True
        left = self._free() - RESERVE_BYTES
        return num_bytes <= (left if self._limit is None else min(left, self._limit - self._taken))

    def _make_room(self, num_bytes: int, needed_at: float) -> bool:
        """Let go of what is needed later than `needed_at` until there is room; say whether there is."""
        if self._limit is not None and num_bytes > self._limit:
            return num_bytes == 0
        while not self._has_room(num_bytes):
            last = self._last_needed(later_than=needed_at)
            if last is None:
                return False
            self._let_go(last)
        return True

    def _next_copy(self, key: Key, begin: int) -> float:
        """The first of the announced copies of a block from `begin` on."""
        uses = self._uses.get(key, [])
        at = bisect_left(uses, begin)
        return uses[at] if at < len(uses) else math.inf

    def _last_needed(self, *, later_than: float, pinned: int | None = None) -> Key | None:
        """Find the block that is needed last, if it is needed later than that: by copies, or never again.

        Among those that are never needed again, it is the one that was copied first: its copy is over soonest.

        Args:
            later_than: an announced copy.
            pinned: bytes of its pinned memory, where it shall have such.
        """
        needed: list[tuple[float, int, Key]] = []
        for key, block in list(self._kept.items()):  # at once: another thread may keep one more meanwhile
            is_of_use = block.own_bytes > 0 if pinned is None else block.is_pinned and block.own_bytes == pinned
            if is_of_use and (at := self._next_copy(key, self._copies)) > later_than:
                needed.append((at, -self._uses.get(key, [-1])[-1], key))
        return max(needed)[2] if needed else None

    def _let_go(self, key: Key) -> Tensor | None:
        """Forget a block; give its pinned memory, from which no copy is under way any more."""
        block = self._kept.pop(key)
        self._taken -= block.own_bytes
        wait = self._waits.pop(key, None)
        if not block.is_pinned:
            return None
        if wait is not None:
            wait()
        return block.pieces[0].data

    def _in_pinned_memory(self, block: HostBlock, needed_at: float) -> HostBlock:
        if not self._pins:
            return block
        size = block.layout.num_bytes
        memory = self._pinned(size, needed_at)
        if memory is None:
            return block
        block.read(0, memory)
        return HostBlock(block.layout, (Piece("", 0, size, memory),), is_pinned=True)

    def _pinned(self, size: int, needed_at: float) -> Tensor | None:
        """Pin memory, or take that of a block that is needed later."""
        if self._limit is not None and size > self._limit:
            return None
        while True:
            if self._pin is not None and self._has_room(size):
                memory = self._pin(size)
                if memory is not None:
                    return memory
                self._pin = None  # refused once, it is refused again: a limit of the system
            last = self._last_needed(later_than=needed_at, pinned=size if self._pin is None else None)
            if last is None:
                return None
            memory = self._let_go(last)
            if memory is not None and memory.nbytes == size:
                return memory

    def _describe(self, key: Key) -> HostBlock:
        give_back_freed()
        layout, parts = lay_out(self._load(*key))
        mapped = MappedFiles() if any(origin(part.data) is None for part in parts) else None
        names = [f"tensor {part.name} of {key[0]} block {key[1]}" for part in parts]
        pieces = tuple(self._piece(part, mapped, name) for part, name in zip(parts, names, strict=True))
        block = HostBlock(layout, pieces)
        self._is_in_file = 2 * block.own_bytes < sum(piece.num_bytes for piece in pieces)
        return block

    def _piece(self, part: Part, mapped: MappedFiles | None, name: str) -> Piece:
        begin, size, read = part.place.offset, part.data.nbytes, origin(part.data)
        if read is not None:
            return Piece(name, begin, size, part.data, read.file, read.offset)
        at = None if mapped is None else mapped.find(part.data)
        file = None if at is None else self._open(at)
        if at is None or file is None:
            return Piece(name, begin, size, part.data)
        return Piece(name, begin, size, None, file, at.offset)

    def _open(self, at: FileRange) -> OpenFile | None:
        if at.inode not in self._files:
            try:
                seen = at.path.stat()
                file = OpenFile(at.path, seen)
                file.open()
            except (OSError, CheckpointError):  # deleted: its mapping still holds the right bytes
                return None
            if (seen.st_dev, seen.st_ino) != at.inode:  # another file has its name now
                return None
            self._files[at.inode] = file
        return self._files[at.inode]
