"""When each block is copied, and into which slot: settled before anything moves, from the order of use alone.

The order in which a generation uses its blocks is known, so keeping them is offline caching, whose optimum is known:
let go of what is used furthest in the future. A block is copied while the one before it computes, so what is in use
then stays too. A card that holds everything, a ring of a few slots and the swap of experts are one rule: at the swap
every slot holds a block that is never used again, and the one that retired first is filled first.

Source: Belady 1966, "A study of replacement algorithms for a virtual-storage computer", the rule MIN; that it stays
optimal where several pages are in use at once follows by the same exchange of the next eviction.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Key: TypeAlias = tuple[str, int]  # (expert, index of the block)


@dataclass(frozen=True, slots=True)
class Move:
    """One copy of one block to the device."""

    key: Key
    slot: int
    first_use: int  # the access that needs it: the copy must have ended
    free_after: int  # the last access that uses what the slot held: the copy may start when it is over; -1: at once


@dataclass(frozen=True, slots=True)
class Schedule:
    """Every access of a run and every copy it needs, both in order."""

    accesses: tuple[Key, ...]
    slots: tuple[int, ...]  # where each access finds its block
    moves: tuple[Move, ...]  # by first use, in the order they are made


def plan_moves(accesses: Sequence[Key], num_slots: int, resident: Sequence[Key | None] = ()) -> Schedule:
    """Choose what is in which slot when, with as few copies as there can be.

    From two slots on, no copy writes to the slot of the access before it, so that the two overlap: where a block
    computes for as long as one copies, nothing ever waits but the first access.

    Args:
        accesses: blocks in the order they are used.
        num_slots: equal slots, at least 1.
        resident: what the slots hold at the start; None, or beyond the end, is nothing.

    Returns:
        The schedule. It is right with any speed of copies; how fast it is, `wanfast.residency.timeline` tells.
    """
    held: list[Key | None] = [*resident, *[None] * (num_slots - len(resident))]
    assert len(held) == num_slots >= 1, "more blocks resident than slots"
    in_use = 1 if num_slots > 1 else 0  # accesses before the present one whose slots are not touched
    next_use = _next_uses(accesses)
    first_use = {key: access for access, key in reversed(list(enumerate(accesses)))}
    slot_of = {key: slot for slot, key in enumerate(held) if key is not None}
    last_use = [-1] * num_slots
    # For each slot the next use of what it holds; what is never used again is best let go.
    needed_at: list[float] = [math.inf if key is None else first_use.get(key, math.inf) for key in held]

    slots, moves = [], []
    for access, key in enumerate(accesses):
        slot = slot_of.get(key)
        if slot is None:
            free = [slot for slot in range(num_slots) if last_use[slot] < max(access - in_use, 0)]
            slot = max(free, key=lambda slot: (needed_at[slot], -last_use[slot]))
            old = held[slot]
            if old is not None:
                del slot_of[old]
            moves.append(Move(key, slot, first_use=access, free_after=last_use[slot]))
            held[slot], slot_of[key] = key, slot
        slots.append(slot)
        last_use[slot], needed_at[slot] = access, next_use[access]
    return Schedule(tuple(accesses), tuple(slots), tuple(moves))


def _next_uses(accesses: Sequence[Key]) -> list[float]:
    """For each access, the next one of the same block."""
    following: dict[Key, int] = {}
    uses: list[float] = [math.inf] * len(accesses)
    for access in range(len(accesses) - 1, -1, -1):
        uses[access] = following.get(accesses[access], math.inf)
        following[accesses[access]] = access
    return uses
