"""Where a model's blocks are: the one class that knows, and that the model asks for its blocks in order."""

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from wanfast.mappings import MappedFiles
from wanfast.out_of_memory import OutOfMemory, attempt
from wanfast.residency.cuda import Cuda, CudaPin, CudaSlots
from wanfast.residency.memory import free_memory, give_back_freed, named_tensors
from wanfast.residency.mover import Held, Mover, Traffic
from wanfast.residency.moves import Key, plan_moves
from wanfast.residency.read_ahead import ReadAhead
from wanfast.residency.slots import HostSlots, Slots
from wanfast.residency.store import HostStore, Pin

_log = logging.getLogger("wanfast")

Block = TypeVar("Block")

MIN_SLOTS = 2  # one that computes, one that is copied to


class Residency(Generic[Block]):
    """The blocks of a model's experts on one device, in as many equal slots as a budget allows.

    What is announced with `begin` is moved as `plan_moves` says, by a thread, ahead of its use. On a CPU with room for
    an expert nothing moves: its blocks are used where they were read to.
    """

    def __init__(
        self,
        load: Callable[[Any, int], Block],
        num_blocks: int,
        device: torch.device,
        budget: int | None = None,
        *,
        slot_bytes: int | None = None,
        ram: int | None = None,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            load: gives block `index` of expert `name` on the host, in the dtype it computes in; called by any thread.
            num_blocks: of each expert.
            device: where blocks are used.
            budget: bytes of the device for slots, of which there are two at least; None is one expert, or as much of it
                as fits what is free, less a fifth for activations.
            slot_bytes: of a slot: the largest block, each of its tensors rounded up to `packing.ALIGNMENT`; where None,
                every block is loaded to see.
            ram: bytes of host memory that blocks may take; None is what is free, less a reserve, or a fifth where they
                are used in place.
        """
        self._load = load
        self._num_blocks = num_blocks
        self._device = device
        self._budget = budget
        self._found: int | None = None  # bytes that slots have shrunk to, where the budget was more than there is
        self._slot_bytes = slot_bytes
        self._measured: dict[str, int] = {}  # largest block by expert, where slot_bytes is not given
        pin: Pin | None = CudaPin(device) if device.type == "cuda" else None
        self._pin = pin
        self._ram = ram
        self._store = HostStore(load, pin, ram)
        self._uses_store = False  # whether blocks may be in it
        self._slots: Slots | None = None
        self._held: list[Held | None] = []
        self._mover: Mover | None = None
        self._moved = Traffic()  # by movers that were stopped, into slots that are gone
        self._pass = 0  # counts passes, so that one that was left behind is known
        self._in_place: dict[Key, Block] = {}
        self._own_in_place = 0  # bytes of those that are not mappings of somebody else's
        self._room = 0
        self._keeps_own = True  # blocks in place that take memory
        self._movers: list[Mover | ReadAhead] = []
        weakref.finalize(self, _stop, self._movers)  # when the process ends, at the latest

    def begin(self, passes: Sequence[str]) -> None:
        """Announce the experts of all passes to come, in order, and begin to move; forget what was announced before.

        Where not even two slots can be had, nothing moves ahead: the pass that asks for blocks is told.
        """
        self.end()
        begun = attempt(partial(self._begin, passes))
        if isinstance(begun, OutOfMemory):
            _log.warning("out of memory before the first block (%s)", begun.reason)

    def _begin(self, passes: Sequence[str]) -> None:
        if passes and not self._is_in_place(passes):
            self._start([(expert, index) for expert in passes for index in range(self._num_blocks)])

    def end(self) -> None:
        """Expect no more passes: nothing moves from here on. What is on the device stays."""
        self._pass += 1
        _stop(self._movers)
        self._movers.clear()
        if self._mover is not None:
            self._moved += self._traffic_of(self._mover)
            self._mover = None

    def read_ahead(self, passes: Sequence[str]) -> None:
        """Bring blocks of passes to come into host memory, and nothing to the device; until the next call of any kind.

        For the time in which the device's memory is needed for something else.
        """
        self.end()
        if passes and self._device.type != "cpu":  # where what is in host memory is there already
            keys = [(expert, index) for expert in dict.fromkeys(passes) for index in range(self._num_blocks)]
            self._uses_store = True
            self._movers.append(ReadAhead(self._store, keys, self._size_slots(passes)))

    def blocks(self, expert: str) -> Iterator[Block]:
        """Yield the expert's blocks in order, each on the device until the next is asked for.

        A pass that was not announced is made all the same, without knowing the next one.

        Raises:
            CheckpointError: a block cannot be read; the message names file and tensor.
            RuntimeError: another pass was begun, or the blocks were released, before this one was over.
        """
        if self._mover is None or self._mover.upcoming != (expert, 0):
            self.end()
            if self._is_in_place([expert]):
                yield from self._blocks_in_place(expert)
                return
            self._start([(expert, index) for index in range(self._num_blocks)])
        mover, done = self._mover, 0
        assert mover is not None
        self._pass += 1
        this = self._pass
        try:
            while done < self._num_blocks:
                yield mover.begin_access()  # no name for it: a generator that is left must not hold its memory
                if this != self._pass:
                    raise RuntimeError(f"{expert}: this pass over the blocks was cut short by another, or by a release")
                mover.end_access()
                done += 1
        finally:
            if done < self._num_blocks and this == self._pass:
                mover.end_access()  # its kernels are queued, whatever became of them
                self.end()

    @property
    def traffic(self) -> Traffic:
        """What was copied and waited for so far; of waits on a GPU those that are over."""
        moved = self._moved
        if self._slots is not None:
            moved += Traffic(0, stalled := self._slots.stalled(), stalled)
        if self._mover is not None:
            moved += self._traffic_of(self._mover)
        return moved

    def _traffic_of(self, mover: Mover) -> Traffic:
        """What a mover did; on a GPU the thread that waits for it is ahead of the device, which may compute then."""
        waited = mover.waited_seconds
        return Traffic(mover.copied_bytes, waited, waited if self._device.type == "cpu" else 0.0)

    def clear_device(self) -> bool:
        """Let the device's memory go, for whatever comes next; what is in host memory stays.

        Returns:
            Whether there was any.
        """
        self.end()
        had_memory = self._slots is not None or self._own_in_place > 0
        if self._slots is not None:
            self._slots.close()
            self._moved += Traffic(0, stalled := self._slots.stalled(), stalled)
        self._slots, self._held = None, []
        self._leave_place()
        return had_memory

    def allow(self, budget: int) -> None:
        """Bound the bytes of the device for slots from here on; what is held beyond them goes.

        Where slots had to shrink to less, that stays the bound until all blocks are released.
        """
        self._budget = budget
        if self._slots is not None and sum(slot.nbytes for slot in self._slots.memory) > budget:
            self.clear_device()

    def allow_host(self, ram: int) -> None:
        """Bound the bytes of host memory that blocks may take from here on, beside slots."""
        self._ram = ram
        self._store.allow(ram)

    @property
    def host_bytes(self) -> int:
        """Host memory that blocks take: what is kept to be copied, and on a CPU what is computed with."""
        slots = [] if self._slots is None or self._device.type != "cpu" else self._slots.memory
        return self._store.taken + self._own_in_place + sum(slot.nbytes for slot in slots)

    def shrink(self) -> bool:
        """Do with half of the device's slots from here on; in place, read each block for each use.

        Returns:
            Whether there was anything to spare.
        """
        if self._slots is None:
            self._keeps_own = False
            return self.clear_device()
        if len(self._held) <= MIN_SLOTS:
            return False
        self._found = max(MIN_SLOTS, len(self._held) // 2) * len(self._slots.memory[0])
        self.clear_device()
        return True

    def release(self) -> bool:
        """Let every block go; the next use loads it anew.

        Returns:
            Whether there was any.
        """
        had_blocks = self.clear_device() or self._uses_store
        self._store.close()
        self._measured.clear()
        self._found, self._keeps_own, self._uses_store = None, True, False
        return had_blocks

    def _start(self, accesses: list[Key]) -> None:
        self._uses_store = True
        experts = [expert for expert, _ in accesses]
        size, wanted = self._size_slots(experts), len(set(accesses))
        if self._slots is not None:
            is_small = len(self._slots.memory[0]) < size
            if is_small or len(self._held) < min(wanted, self._most_slots(size)):
                self.clear_device()
        if self._slots is None:
            self._slots = self._take_slots(max(MIN_SLOTS, min(wanted, self._most_slots(size))), size)
            self._held = [None] * len(self._slots.memory)
        resident = [None if held is None else held.key for held in self._held]
        schedule = plan_moves(accesses, len(self._held), resident)
        self._mover = Mover(schedule, self._store, self._slots, self._held, loads_ahead=self._pin is not None)
        self._movers.append(self._mover)

    def _size_slots(self, experts: Iterable[str]) -> int:
        if self._slot_bytes is not None:
            return self._slot_bytes
        for expert in set(experts) - self._measured.keys():
            blocks = (self._store.block((expert, i), is_copied_again=False) for i in range(self._num_blocks))
            self._measured[expert] = max((block.layout.num_bytes for block in blocks), default=0)
        return max(1, *self._measured.values())

    def _take_slots(self, count: int, num_bytes: int) -> Slots:
        """Take memory for slots; where there is not so much, for half as many, and again, down to two."""
        while count > MIN_SLOTS:
            slots = attempt(partial(self._make_slots, count, num_bytes))
            if not isinstance(slots, OutOfMemory):
                return slots
            fewer = max(MIN_SLOTS, count // 2)
            _log.warning("out of memory for %d blocks (%s); %d are kept on the device", count, slots.reason, fewer)
            count, self._found = fewer, fewer * num_bytes
        return self._make_slots(count, num_bytes)

    def _make_slots(self, count: int, num_bytes: int) -> Slots:
        if self._pin is None:
            return HostSlots(count, num_bytes)
        return CudaSlots(count, num_bytes, Cuda(self._device), self._pin)

    def _most_slots(self, num_bytes: int) -> int:
        """How many slots of this size the device may have, those it has included."""
        bound = self._bound()
        if bound is not None:
            return bound // num_bytes
        held = sum(slot.nbytes for slot in self._slots.memory) if self._slots is not None else 0
        # More than one expert would gain nothing: the other one arrives under the last pass of the first.
        return min(self._num_blocks, (free_memory(self._device) + held) * 4 // 5 // num_bytes)

    def _bound(self) -> int | None:
        """Bytes for slots: what is allowed, or what was found to be there."""
        return min((bound for bound in (self._budget, self._found) if bound is not None), default=None)

    def _is_in_place(self, experts: Iterable[str]) -> bool:
        """Whether blocks are used where they were loaded: on a CPU, unless it is told to keep fewer than an expert."""
        if self._device.type != "cpu":
            return False
        bound = self._bound()
        return bound is None or bound >= self._num_blocks * self._size_slots(experts)

    def _blocks_in_place(self, expert: str) -> Iterator[Block]:
        """One expert at a time; what would not fit is read for each use."""
        if any(name != expert for name, _ in self._in_place):
            self._leave_place()
        if not self._in_place:
            self._room = free_memory(self._device) * 4 // 5
            if self._ram is not None:
                self._room = min(self._room, self._ram)
        for index in range(self._num_blocks):
            block = self._in_place.get((expert, index))
            if block is None:
                give_back_freed()
                block = self._load(expert, index)
                own = _own_bytes(block)
                if own == 0 or (self._keeps_own and own <= self._room - self._own_in_place):
                    self._in_place[expert, index] = block
                    self._own_in_place += own
            yield block

    def _leave_place(self) -> None:
        self._in_place.clear()
        self._own_in_place = 0


def _own_bytes(block: object) -> int:
    """Bytes of a block that are not a mapping of a file, which somebody else made."""
    mapped = MappedFiles()
    return sum(tensor.nbytes for _, tensor in named_tensors(block) if mapped.find(tensor) is None)


def _stop(movers: list[Mover | ReadAhead]) -> None:
    for mover in movers:
        mover.stop()
