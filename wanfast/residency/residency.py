"""Where a model's blocks are: the one class that knows, and that the model asks for its blocks in order."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch

from wanfast.residency.cuda import Cuda, CudaPin, CudaSlots
from wanfast.residency.mappings import MappedFiles
from wanfast.residency.memory import free_memory, named_tensors
from wanfast.residency.mover import Held, Mover, Traffic
from wanfast.residency.moves import Key, plan_moves
from wanfast.residency.slots import HostSlots, Slots
from wanfast.residency.store import HostStore, Pin

Block = TypeVar("Block")

MIN_SLOTS = 2  # one that computes, one that is copied to


class Residency(Generic[Block]):
    """The blocks of a model's experts on one device, in as many equal slots as a budget allows.

    What is announced with `begin` is moved as `plan_moves` says, by a thread, ahead of its use. On a CPU with room for
    an expert nothing moves: its blocks are used where they were loaded.
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
            ram: bytes of host memory that blocks may take; None is what is free, less a reserve.
        """
        self._load = load
        self._num_blocks = num_blocks
        self._device = device
        self._budget = budget
        self._slot_bytes = slot_bytes
        self._measured: dict[str, int] = {}  # largest block by expert, where slot_bytes is not given
        pin: Pin | None = CudaPin(device) if device.type == "cuda" else None
        self._pin = pin
        self._store = HostStore(load, pin, ram)
        self._slots: Slots | None = None
        self._held: list[Held | None] = []
        self._mover: Mover | None = None
        self._moved = Traffic()  # by movers that were stopped, into slots that are gone
        self._pass = 0  # counts passes, so that one that was left behind is known
        self._in_place: dict[Key, Block] = {}
        self._room = 0
        self._movers: list[Mover] = []
        weakref.finalize(self, _stop, self._movers)  # when the process ends, at the latest

    def begin(self, passes: Sequence[str]) -> None:
        """Announce the experts of all passes to come, in order, and begin to move; forget what was announced before."""
        self.end()
        if passes and not self._is_in_place(passes):
            self._start([(expert, index) for expert in passes for index in range(self._num_blocks)])

    def end(self) -> None:
        """Expect no more passes: nothing moves from here on. What is on the device stays."""
        self._pass += 1
        if self._mover is not None:
            self._mover.stop()
            self._moved += Traffic(self._mover.copied_bytes, self._mover.waited_seconds)
            self._movers.clear()
            self._mover = None

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
            moved += Traffic(0, self._slots.stalled())
        if self._mover is not None:
            moved += Traffic(self._mover.copied_bytes, self._mover.waited_seconds)
        return moved

    def clear_device(self) -> None:
        """Let the device's memory go, for whatever comes next; what is in host memory stays."""
        self.end()
        if self._slots is not None:
            self._slots.close()
            self._moved += Traffic(0, self._slots.stalled())
        self._slots, self._held = None, []
        self._in_place.clear()

    def allow(self, budget: int) -> None:
        """Bound the bytes of the device for slots from here on; what is held beyond them goes."""
        self._budget = budget
        if self._slots is not None and sum(slot.nbytes for slot in self._slots.memory) > budget:
            self.clear_device()

    def shrink(self) -> bool:
        """Do with half of the device's slots from here on; say whether there were any to spare."""
        if self._slots is None or len(self._held) <= MIN_SLOTS:
            return False
        self._budget = max(MIN_SLOTS, len(self._held) // 2) * len(self._slots.memory[0])
        self.clear_device()
        return True

    def release(self) -> None:
        """Let every block go; the next use loads it anew."""
        self.clear_device()
        self._store.close()
        self._measured.clear()

    def _start(self, accesses: list[Key]) -> None:
        experts = [expert for expert, _ in accesses]
        size, wanted = self._size_slots(experts), len(set(accesses))
        if self._slots is not None:
            is_small = len(self._slots.memory[0]) < size
            if is_small or len(self._held) < min(wanted, self._most_slots(size)):
                self.clear_device()
        if self._slots is None:
            count = max(MIN_SLOTS, min(wanted, self._most_slots(size)))
            self._slots = self._make_slots(count, size)
            self._held = [None] * count
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

    def _make_slots(self, count: int, num_bytes: int) -> Slots:
        if self._pin is None:
            return HostSlots(count, num_bytes)
        return CudaSlots(count, num_bytes, Cuda(self._device), self._pin)

    def _most_slots(self, num_bytes: int) -> int:
        """How many slots of this size the device may have, those it has included."""
        if self._budget is not None:
            return self._budget // num_bytes
        held = sum(slot.nbytes for slot in self._slots.memory) if self._slots is not None else 0
        # More than one expert would gain nothing: the other one arrives under the last pass of the first.
        return min(self._num_blocks, (free_memory(self._device) + held) * 4 // 5 // num_bytes)

    def _is_in_place(self, experts: Iterable[str]) -> bool:
        """Whether blocks are used where they were loaded: on a CPU, unless it is told to keep fewer than an expert."""
        if self._device.type != "cpu":
            return False
        return self._budget is None or self._budget >= self._num_blocks * self._size_slots(experts)

    def _blocks_in_place(self, expert: str) -> Iterator[Block]:
        """One expert at a time; what would not fit, and is not a mapped file, is loaded for each use."""
        if any(name != expert for name, _ in self._in_place):
            self._in_place.clear()
        if not self._in_place:
            self._room = free_memory(self._device) * 4 // 5
        for index in range(self._num_blocks):
            block = self._in_place.get((expert, index))
            if block is None:
                block = self._load(expert, index)
                own = 0 if self._budget is not None else _own_bytes(block)
                if own <= self._room:
                    self._in_place[expert, index] = block
                    self._room -= own
            yield block


def _own_bytes(block: object) -> int:
    """Bytes of a block that are not a mapping of a file."""
    mapped = MappedFiles()
    return sum(tensor.nbytes for _, tensor in named_tensors(block) if mapped.find(tensor) is None)


def _stop(movers: list[Mover]) -> None:
    for mover in movers:
        mover.stop()
