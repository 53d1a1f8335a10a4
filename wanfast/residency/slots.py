"""Equal pieces of a device's memory that hold a block each, and how a block gets into one.

One thread fills slots, another computes with them; which of the two may touch a slot when is the schedule's business.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from wanfast.residency.store import HostBlock


class Slots(Protocol):
    """What one thread fills while another uses it."""

    memory: list[Tensor]  # uint8 [bytes of a slot] each

    def fill(self, slot: int, block: HostBlock) -> None:
        """Begin to copy a block into a slot that was `used`; of its memory only what is pinned may be needed longer."""

    def copy_end(self, slot: int) -> Callable[[], None]:
        """Give what waits for the end of the slot's copy, in any thread."""

    def ready(self, slot: int) -> None:
        """Let what is computed from here on wait for the slot's copy."""

    def used(self, slot: int) -> None:
        """Note that what was computed up to here is the last to use the slot."""

    def stalled(self) -> float:
        """Seconds for which the device has waited for copies, so far."""

    def close(self) -> None:
        """Wait for copies under way and let the memory go."""


class HostSlots:
    """Slots on the CPU: what is copied is there."""

    def __init__(self, count: int, num_bytes: int) -> None:
        """Take memory for `count` slots of `num_bytes` each."""
        with torch.inference_mode(False):  # another thread writes to it
            self.memory = [torch.empty(num_bytes, dtype=torch.uint8) for _ in range(count)]

    def fill(self, slot: int, block: HostBlock) -> None:
        """Copy a block into a slot."""
        block.read(0, self.memory[slot][: block.layout.num_bytes])

    def copy_end(self, slot: int) -> Callable[[], None]:
        """Give nothing to wait for: `fill` has returned."""
        return _nothing

    def ready(self, slot: int) -> None:
        """Do nothing: `fill` has returned."""

    def used(self, slot: int) -> None:
        """Do nothing: what was computed is done."""

    def stalled(self) -> float:
        """Give 0: who computes on a CPU waits for the thread that copies, which the mover counts."""
        return 0.0

    def close(self) -> None:
        """Let the memory go."""
        self.memory = []


def _nothing() -> None:
    pass
