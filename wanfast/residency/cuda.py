"""Slots on a GPU, and host memory that a GPU copies from by itself.

Copies run on a stream of their own. Two events per slot order the streams: `used`, before a copy writes over what was
computed with, and `ready`, before anything computes with what was copied. The thread that computes waits for neither.
Source: NVIDIA, CUDA C++ Programming Guide, "Asynchronous Concurrent Execution" and "Page-Locked Host Memory".
"""

import mmap
import sys
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from wanfast.residency.store import HostBlock, Pin

BOUNCE_BYTES = 128 * 2**20  # of each of two buffers; systems that limit pinned memory allow half a GiB at least
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU


@dataclass(frozen=True, slots=True)
class Wait:
    """A wait of a stream, between two events that note the time."""

    begin: torch.cuda.Event
    end: torch.cuda.Event

    def seconds(self) -> float | None:
        """How long it was; None while the stream has not come past it."""
        return self.begin.elapsed_time(self.end) / 1e3 if self.end.query() else None  # type: ignore[no-untyped-call]


class Cuda:
    """The few things that slots ask of a GPU."""

    def __init__(self, device: torch.device) -> None:
        """Make the stream that copies."""
        self._device = device
        self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def compute(self) -> torch.cuda.Stream:
        """Give the stream that the calling thread computes on."""
        return torch.cuda.current_stream(self._device)

    def event(self) -> torch.cuda.Event:
        """Make an event; a thread that waits for it sleeps."""
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def wait(self, event: torch.cuda.Event) -> Wait:
        """Let what is computed from here on wait for an event."""
        stream = self.compute()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record(stream)
        stream.wait_event(event)
        end.record(stream)
        return Wait(begin, end)

    def allocate(self, num_bytes: int) -> Tensor:
        """Take uint8 [num_bytes] of the device's memory."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy from pinned memory, on the copying stream, without waiting for it."""
        with torch.cuda.stream(self.copies):
            target.copy_(source, non_blocking=True)


class CudaSlots:
    """Slots on a GPU; `fill` belongs to one thread, `ready` and `used` to the one that computes."""

    def __init__(self, count: int, num_bytes: int, cuda: Cuda, pin: Pin) -> None:
        """Take memory for `count` slots of `num_bytes` each; bounce buffers are taken when they are first needed."""
        self._cuda = cuda
        self._pin = pin
        with torch.inference_mode(False):  # another thread writes to it
            self.memory = [cuda.allocate(num_bytes) for _ in range(count)]
        cuda.copies.wait_stream(cuda.compute())  # the memory may have been something else's until just now
        self._ready = [cuda.event() for _ in range(count)]
        self._used = [cuda.event() for _ in range(count)]
        self._bounce: list[Tensor] = []
        self._emptied = [cuda.event(), cuda.event()]  # of the bounce buffers
        self._turn = 0
        self._waits: deque[Wait] = deque()  # that are not over, as far as is known
        self._stalled = 0.0

    def fill(self, slot: int, block: HostBlock) -> None:
        """Give the copying stream one copy, or one per bounce buffer's worth; only the latter can block this thread."""
        copies, size = self._cuda.copies, block.layout.num_bytes
        copies.wait_event(self._used[slot])
        if block.is_pinned and block.pieces[0].data is not None:
            self._cuda.copy(self.memory[slot][:size], block.pieces[0].data)
        else:
            for begin in range(0, size, BOUNCE_BYTES):
                self._bounced(self.memory[slot][begin : min(begin + BOUNCE_BYTES, size)], block, begin)
        self._ready[slot].record(copies)

    def copy_end(self, slot: int) -> Callable[[], None]:
        """Give what waits for the slot's copy, or for a later one of the same slot."""
        return self._ready[slot].synchronize

    def _bounced(self, target: Tensor, block: HostBlock, begin: int) -> None:
        if not self._bounce:
            self._bounce = [self._buffer(len(self.memory[0])) for _ in range(2)]
        emptied, buffer = self._emptied[self._turn], self._bounce[self._turn][: target.nbytes]
        self._turn = 1 - self._turn
        emptied.synchronize()
        block.read(begin, buffer)
        self._cuda.copy(target, buffer)
        emptied.record(self._cuda.copies)

    def _buffer(self, slot_bytes: int) -> Tensor:
        size = min(BOUNCE_BYTES, slot_bytes)
        buffer = self._pin(size)
        # A copy from other memory is slower and blocks its thread, which is not the one that computes.
        return torch.empty(size, dtype=torch.uint8) if buffer is None else buffer

    def ready(self, slot: int) -> None:
        """Let the computing stream wait for the slot's copy."""
        self._waits.append(self._cuda.wait(self._ready[slot]))
        self.stalled()  # so that no more are kept than are under way

    def used(self, slot: int) -> None:
        """Note where the computing stream is."""
        self._used[slot].record(self._cuda.compute())

    def stalled(self) -> float:
        """Seconds that the computing stream has spent in waits that are over."""
        while self._waits and (seconds := self._waits[0].seconds()) is not None:
            self._stalled += seconds
            self._waits.popleft()
        return self._stalled

    def close(self) -> None:
        """Wait for copies under way and let the memory go; what its own stream still computes may go on using it."""
        self._cuda.copies.synchronize()
        self.memory = []


class CudaPin:
    """Takes page-aligned host memory and registers it with CUDA, so that nothing is rounded to a power of two."""

    def __init__(self, device: torch.device) -> None:
        """Register nothing yet."""
        self._device = device

    def __call__(self, num_bytes: int) -> Tensor | None:
        """Give uint8 [num_bytes], or None where the system refuses.

        It is unregistered when the tensor goes, at the latest when the process ends; no copy from it may be under way.
        """
        try:
            pages = _take_pages(num_bytes)
        except OSError:
            return None
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        with torch.cuda.device(self._device):
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            if int(cudart.cudaHostRegister(memory.data_ptr(), num_bytes, _PORTABLE)) != 0:
                _forget_error()
                return None
        weakref.finalize(memory, _unregister, memory.data_ptr(), pages)
        return memory


def _take_pages(num_bytes: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, num_bytes)
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones get no huge pages


def _unregister(address: int, pages: mmap.mmap) -> None:
    """Unregister memory while its pages, which are an argument for this reason, are still there."""
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def _forget_error() -> None:
    """Let CUDA report the error of a refused call, or the next kernel would be blamed for it."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")
