"""How a schedule of moves runs in time, for given speeds: what the device computes, copies and waits for.

One engine computes, one copies, each does its work in order; an access waits for the copy of its block, a copy for the
last use of its slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from wanfast.residency.moves import Schedule


@dataclass(frozen=True, slots=True)
class Span:
    """From when to when, in seconds."""

    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each access computes and each move copies."""

    accesses: tuple[Span, ...]
    copies: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """Until the last access is over."""
        return self.accesses[-1].end if self.accesses else 0.0

    @property
    def stalls(self) -> tuple[float, ...]:
        """For each access, how long the device had nothing to compute before it."""
        ends = (0.0, *(span.end for span in self.accesses))
        return tuple(span.start - end for span, end in zip(self.accesses, ends, strict=False))


def simulate(schedule: Schedule, compute: Sequence[float], copy: Sequence[float]) -> Timeline:
    """Run a schedule.

    Args:
        schedule: to run.
        compute: seconds of each access.
        copy: seconds of each move.
    """
    accesses: list[Span] = []
    copies: list[Span] = []
    now = copied = 0.0
    for access, seconds in enumerate(compute):
        ready = now
        while len(copies) < len(schedule.moves) and schedule.moves[len(copies)].first_use == access:
            move = schedule.moves[len(copies)]
            free = accesses[move.free_after].end if move.free_after >= 0 else 0.0
            copies.append(Span(max(copied, free), max(copied, free) + copy[len(copies)]))
            copied = ready = copies[-1].end
        accesses.append(Span(max(now, ready), max(now, ready) + seconds))
        now = accesses[-1].end
    return Timeline(tuple(accesses), tuple(copies))
