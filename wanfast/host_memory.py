"""What a generation takes of the host's memory beside a GPU, and what it reads from files for want of more.

Both come from the moves that the residency makes, the second by playing them with its own store; computed.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from wanfast.dit.chunking import Chunking
from wanfast.open_file import OpenFile
from wanfast.plan import Plan
from wanfast.residency.cuda import BOUNCE_BYTES
from wanfast.residency.mover import copied_again
from wanfast.residency.moves import Key, plan_moves
from wanfast.residency.packing import Layout
from wanfast.residency.store import RESERVE_BYTES, HostBlock, HostStore, Piece

HOST_RESERVE_BYTES = RESERVE_BYTES  # left to the system, this program's own code and what encodes the file
_WAITING_TENSORS = 8  # latents, two predictions, what the last step began from; texts and pictures as much again
_WAITING_CHUNKS = 3  # of frames: two that wait for the encoder, and the one it has
_FP32 = 4

Runs = tuple[tuple[str, int], ...]  # experts and how many passes each makes in a row


@dataclass(frozen=True, slots=True)
class Kept:
    """Blocks in host memory, in numbers of them."""

    most: int  # that are worth keeping in a run
    at_once: int  # that are needed again at the same time: with room for these, none is read twice


def passes_of(plan: Plan, chunking: Chunking) -> Runs:
    """Count the passes over each expert's blocks, in order."""
    experts = [step.expert for step in plan.steps for _ in range(step.num_forwards if chunking.in_turn else 1)]
    return tuple((expert, len(list(passes))) for expert, passes in groupby(experts))


@lru_cache(maxsize=1024)
def kept_blocks(runs: Runs, num_blocks: int, num_slots: int, *, is_as_stored: bool) -> Kept:
    """Count the blocks that host memory is taken for.

    Args:
        runs: as `passes_of` gives them.
        num_blocks: of each expert.
        num_slots: on the device.
        is_as_stored: whether blocks are copied as they lie in their files: then one that is copied once costs
            no memory.
    """
    moves = _moves(runs, num_blocks, num_slots)
    left = Counter(moves)
    again = sum(count > 1 for count in left.values())
    seen: set[Key] = set()
    at_once = 0
    for key in moves:
        left[key] -= 1
        if left[key]:
            seen.add(key)
        else:
            seen.discard(key)
        at_once = max(at_once, len(seen))
    return Kept(again if is_as_stored else len(left), at_once)


@dataclass(frozen=True, slots=True)
class Read:
    """What one copy of a block, or one use of it in place, reads from a file."""

    num_bytes: int  # of the file; 0 where the block is in host memory
    is_kept: bool  # whether it then stays there, so that it can be read long before it is copied


@lru_cache(maxsize=64)
def reads_of_moves(
    runs: Runs,
    num_blocks: int,
    num_slots: int,
    *,
    block_bytes: int,
    file_bytes: int,
    is_as_stored: bool,
    is_pinned: bool,
    room: int | None,
) -> tuple[Read, ...]:
    """Play the moves of a run with the residency's own store, and count what each reads from files.

    Args:
        runs: as `passes_of` gives them.
        num_blocks: of each expert.
        num_slots: on the device.
        block_bytes: of a block in host memory.
        file_bytes: of a block in its file.
        is_as_stored: whether blocks are copied as they lie in their files.
        is_pinned: whether what is copied again is worth pinned memory, as beside a GPU.
        room: bytes of host memory for blocks; None is as much as is useful.
    """
    moves = _moves(runs, num_blocks, num_slots)
    store = _PlayedStore(block_bytes, file_bytes, is_as_stored=is_as_stored, is_pinned=is_pinned, room=room)
    store.expect(moves)
    reads = []
    for key, is_copied_again in zip(moves, copied_again(moves), strict=True):
        before = store.file.read_bytes
        block = store.block(key, is_copied_again=is_copied_again)
        if not block.is_pinned:
            block.read(0, _played_memory(block_bytes))  # into a slot, by way of the bounce buffers
        store.copied(key, _nothing)
        reads.append(Read(store.file.read_bytes - before, store.is_kept(key) and block.own_bytes > 0))
    return tuple(reads)


def reads_in_place(
    runs: Runs, num_blocks: int, *, block_bytes: int, file_bytes: int, room: int | None
) -> tuple[Read, ...]:
    """Count what each use of a block reads on a CPU that computes with blocks where they were loaded.

    As many as there is room for stay until the next expert, the first ones; the others are read for each use, where the
    system may still have them in memory.
    """
    staying = num_blocks if room is None else min(num_blocks, room // block_bytes)
    return tuple(
        Read(file_bytes if number == 0 or index >= staying else 0, is_kept=index < staying)
        for _, count in runs
        for number in range(count)
        for index in range(num_blocks)
    )


class _PlayedFile(OpenFile):
    """A file of which only what is read is counted."""

    def __init__(self) -> None:
        self.read_bytes = 0

    def read(self, offset: int, target: Tensor, name: str) -> None:
        self.read_bytes += target.nbytes

    def will_read(self, offset: int, num_bytes: int) -> None:
        pass


class _PlayedStore(HostStore):
    """The store itself, on a machine whose only bound is the room it is given, with blocks that are mere sizes."""

    def __init__(
        self, block_bytes: int, file_bytes: int, *, is_as_stored: bool, is_pinned: bool, room: int | None
    ) -> None:
        super().__init__(_no_block, _played_memory if is_pinned else None, sys.maxsize if room is None else room)
        self._block_bytes, self._file_bytes, self._is_as_stored = block_bytes, file_bytes, is_as_stored
        self.file = _PlayedFile()

    def _free(self) -> int:
        return sys.maxsize

    def _describe(self, key: Key) -> HostBlock:
        if not self._is_as_stored:  # loading it is reading and rounding it
            self.file.read_bytes += self._file_bytes
        piece = Piece("", 0, self._block_bytes, None, self.file if self._is_as_stored else None)
        return HostBlock(Layout(None, self._block_bytes), (piece,))


def _no_block(expert: str, index: int) -> None:
    raise AssertionError("sizes are all that is played with")


def _played_memory(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="meta")


def _nothing() -> None:
    pass


def _moves(runs: Runs, num_blocks: int, num_slots: int) -> list[Key]:
    accesses = [(expert, index) for expert, count in runs for _ in range(count) for index in range(num_blocks)]
    return [move.key for move in plan_moves(accesses, num_slots).moves]


def clip_bytes(plan: Plan) -> int:
    """Bytes of one clip that waits between its phases, or to be resumed."""
    channels, frames, rows, columns = plan.latent_shape
    return _WAITING_TENSORS * channels * frames * rows * columns * _FP32


def pixel_bytes(plan: Plan) -> int:
    """Bytes of all frames, which wait on the host until their last strip is decoded."""
    return plan.num_frames * plan.height * plan.width * 3


def around_kept(plan: Plan, *, slot: int, loading: int, in_strips: bool) -> dict[str, int]:
    """List what is in host memory beside the blocks that are kept there.

    Args:
        plan: for a GPU.
        slot: bytes of the largest block.
        loading: bytes of blocks that are being loaded.
        in_strips: whether pictures are decoded in strips.
    """
    return {
        "left to the system": HOST_RESERVE_BYTES,
        "two bounce buffers for copies": 2 * min(BOUNCE_BYTES, slot),
        "blocks being loaded": loading,
        "latents that wait, to be resumed from": clip_bytes(plan),
        "frames that wait for the encoder": _WAITING_CHUNKS * 4 * plan.height * plan.width * 3,
        "pixels of strips": pixel_bytes(plan) if in_strips else 0,
    }
