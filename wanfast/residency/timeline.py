"""How a schedule of moves runs in time, for given speeds: what the device computes, copies and waits for.

One engine computes, one copies, one reads files, each does its work in order; an access waits for the copy of its
block, a copy for the last use of its slot and for what it reads. What host memory keeps is read as early as can be,
what it has no room for while the move before it is copied.
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


@dataclass(frozen=True, slots=True)
class Reading:
    """What a move reads before it is copied."""

    seconds: float
    is_early: bool  # whether there is room for it long before


def simulate(
    schedule: Schedule, compute: Sequence[float], copy: Sequence[float], read: Sequence[Reading] = ()
) -> Timeline:
    """Run a schedule.

    Args:
        schedule: to run.
        compute: seconds of each access.
        copy: seconds of each move.
        read: what each move reads; nothing where it is left out.
    """
    accesses: list[Span] = []
    copies: list[Span] = []
    now = copied = has_read = 0.0
    for access, seconds in enumerate(compute):
        ready = now
        while len(copies) < len(schedule.moves) and schedule.moves[len(copies)].first_use == access:
            move = schedule.moves[len(copies)]
            free = accesses[move.free_after].end if move.free_after >= 0 else 0.0
            if read:
                one = read[len(copies)]
                earliest = 0.0 if one.is_early or not copies else copies[-1].start
                has_read = max(has_read, earliest) + one.seconds
                free = max(free, has_read)
            copies.append(Span(max(copied, free), max(copied, free) + copy[len(copies)]))
            copied = ready = copies[-1].end
        accesses.append(Span(max(now, ready), max(now, ready) + seconds))
        now = accesses[-1].end
    return Timeline(tuple(accesses), tuple(copies))
