"""Carries out a schedule: a thread that moves blocks, beside the one that computes with them, and one that loads ahead.

Moving and computing meet in two counters: accesses that are over, and moves that are done. A move waits for the access
that frees its slot, an access for the move that brings its block.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wanfast.residency.memory import free_host_memory
from wanfast.residency.moves import Key, Schedule
from wanfast.residency.packing import Layout, unpack
from wanfast.residency.slots import Slots
from wanfast.residency.store import HostStore


@dataclass(frozen=True, slots=True)
class Held:
    """What a slot holds."""

    key: Key
    layout: Layout


@dataclass(frozen=True, slots=True)
class Traffic:
    """What moved, and what it was waited for."""

    copied_bytes: int = 0  # of blocks, into slots
    stall_seconds: float = 0.0  # of the thread that computes, and of the device
    idle_seconds: float = 0.0  # of these, those in which the device had nothing to compute

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.copied_bytes + other.copied_bytes,
            self.stall_seconds + other.stall_seconds,
            self.idle_seconds + other.idle_seconds,
        )


class Mover:
    """One run of one schedule."""

    def __init__(
        self, schedule: Schedule, store: HostStore, slots: Slots, held: list[Held | None], *, loads_ahead: bool
    ) -> None:
        """Begin to move.

        Args:
            schedule: what is used and moved when.
            store: gives blocks.
            slots: where they go.
            held: what each slot holds, kept up to date; it and the store belong to this mover until it is stopped.
            loads_ahead: a second thread loads blocks long before they are moved, as far as host memory reaches, so that
                the swap of experts does not wait for a disk.
        """
        self.schedule = schedule
        self._store = store
        self._slots = slots
        self._held = held
        self._views: dict[int, tuple[Held, Any]] = {}  # what slots hold, as blocks
        self._changed = threading.Condition()
        self._over = 0
        self._moved = 0
        self._error: BaseException | None = None
        self._is_stopped = False
        self.copied_bytes = 0
        self.waited_seconds = 0.0  # by the thread that computes
        self._needed = _needed_moves(schedule)
        self._is_copied_again = copied_again([move.key for move in schedule.moves])
        store.expect([move.key for move in schedule.moves])
        work = [self._work, self._load_ahead] if loads_ahead else [self._work]
        # Daemons: should nobody stop them, they do not keep the process from ending.
        self._threads = [threading.Thread(target=verb, name="wanfast-residency", daemon=True) for verb in work]
        for thread in self._threads:
            thread.start()

    @property
    def upcoming(self) -> Key | None:
        """The next block in order; None behind the last."""
        return self.schedule.accesses[self._over] if self._over < len(self.schedule.accesses) else None

    def begin_access(self) -> Any:
        """Wait until the next block is there, or on a GPU is on its way, and return it.

        Raises:
            CheckpointError: a block cannot be read.
            RuntimeError: the mover was stopped meanwhile.
        """
        needed, slot = self._needed[self._over], self.schedule.slots[self._over]
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._moved >= needed or self._error is not None or self._is_stopped)
            self.waited_seconds += time.perf_counter() - began
            if self._error is not None:
                raise self._error
            held = self._held[slot]
        if held is None or held.key != self.upcoming:
            raise RuntimeError("the model's weights were released while they were in use")
        self._slots.ready(slot)
        if slot not in self._views or self._views[slot][0] is not held:
            self._views[slot] = (held, unpack(held.layout, self._slots.memory[slot]))
        return self._views[slot][1]

    def end_access(self) -> None:
        """Note that nothing more will be computed with the block of the present access."""
        self._slots.used(self.schedule.slots[self._over])
        with self._changed:
            self._over += 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Stop after the move under way; what the slots hold then stays as it is."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        self._views.clear()  # whoever still holds this mover does not hold the device's memory
        for thread in self._threads:
            if thread is not threading.current_thread():  # which may be the one that collects garbage
                thread.join()

    def _work(self) -> None:
        moves = self.schedule.moves
        try:
            for index, move in enumerate(moves):
                block = self._store.block(move.key, is_copied_again=self._is_copied_again[index])
                if index + 1 < len(moves):
                    self._store.will_read(moves[index + 1].key)
                with self._changed:
                    self._changed.wait_for(lambda: self._over > move.free_after or self._is_stopped)  # noqa: B023
                    if self._is_stopped:
                        return
                assert block.layout.num_bytes <= len(self._slots.memory[move.slot]), "a block larger than a slot"
                self._held[move.slot] = None  # until it is there whole
                self._slots.fill(move.slot, block)
                self._store.copied(move.key, self._slots.copy_end(move.slot))
                with self._changed:
                    self._held[move.slot] = Held(move.key, block.layout)
                    self._moved += 1
                    self.copied_bytes += block.layout.num_bytes
                    self._changed.notify_all()
                del block  # what is not kept goes before the next one is loaded
        except BaseException as error:  # raised again where the block is needed
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _load_ahead(self) -> None:
        """Load every block once, in the order of the moves, until that is all host memory holds.

        Where what is kept has taken all the room, it goes on as blocks have had their last copy.
        """
        room, size = free_host_memory(), max(map(len, self._slots.memory), default=0)
        for index, (move, is_copied_again) in enumerate(zip(self.schedule.moves, self._is_copied_again, strict=True)):
            if not self._may_load(index, size):
                return
            if self._store.is_kept(move.key) or index < self._moved:
                continue
            if room < 0:
                return
            try:
                room -= self._store.block(move.key, is_copied_again=is_copied_again).layout.num_bytes
            except BaseException:  # told by the other thread, when the block is needed
                return
            self._store.will_read(move.key)

    def _may_load(self, index: int, num_bytes: int) -> bool:
        """Wait until the block of a move can be kept, is kept or was moved; False where the end came first."""
        key, is_copied_again = self.schedule.moves[index].key, self._is_copied_again[index]
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._is_stopped
                    or self._error is not None
                    or index < self._moved
                    or self._store.is_kept(key)
                    or self._store.can_keep(key, num_bytes, is_copied_again=is_copied_again)
                )
            )
            return not self._is_stopped and self._error is None


def _needed_moves(schedule: Schedule) -> list[int]:
    """For each access, how many moves must be done before it."""
    needed, moves = [], 0
    for access in range(len(schedule.accesses)):
        if moves < len(schedule.moves) and schedule.moves[moves].first_use == access:
            moves += 1
        needed.append(moves)
    return needed


def copied_again(keys: Sequence[Key]) -> list[bool]:
    """For each of some moves, by their blocks, whether the same block is moved once more after it."""
    seen: set[Key] = set()
    again = []
    for key in reversed(keys):
        again.append(key in seen)
        seen.add(key)
    return again[::-1]
