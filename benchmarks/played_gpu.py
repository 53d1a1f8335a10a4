"""A GPU that is played on a CPU: what is given to it is done at once, so that code for one runs up to CUDA itself."""

import torch
from torch import Tensor

from wanfast.residency import residency
from wanfast.residency.cuda import Wait


class PlayedEvent:
    """What has happened already."""

    def record(self, stream: object) -> None:
        """Do nothing: the work before it is done."""

    def synchronize(self) -> None:
        """Do nothing, likewise."""

    def query(self) -> bool:
        """Say that it is over."""
        return True

    def elapsed_time(self, end: "PlayedEvent") -> float:
        """Take no time."""
        return 0.0


class PlayedStream:
    """One that is always done."""

    def wait_event(self, event: PlayedEvent) -> None:
        """Do nothing: it has happened."""

    def wait_stream(self, stream: "PlayedStream") -> None:
        """Do nothing, likewise."""

    def synchronize(self) -> None:
        """Do nothing, likewise."""


class PlayedCuda:
    """In the place of `wanfast.residency.cuda.Cuda`."""

    def __init__(self, device: torch.device) -> None:
        """Make the stream that copies."""
        self.copies = PlayedStream()

    def compute(self) -> PlayedStream:
        """Give a stream."""
        return PlayedStream()

    def event(self) -> PlayedEvent:
        """Make an event."""
        return PlayedEvent()

    def wait(self, event: PlayedEvent) -> Wait:
        """Wait for nothing."""
        return Wait(PlayedEvent(), PlayedEvent())  # type: ignore[arg-type]

    def allocate(self, num_bytes: int) -> Tensor:
        """Take memory of the host."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy at once."""
        target.copy_(source)


def pin(num_bytes: int) -> Tensor:
    """Give memory as if it were pinned."""
    return torch.empty(num_bytes, dtype=torch.uint8)


def play() -> None:
    """Let residencies for a GPU run on this one from here on, in this process."""
    residency.Cuda = PlayedCuda  # type: ignore[assignment,misc]
    residency.CudaPin = lambda device: pin  # type: ignore[assignment,misc]
