"""What a generation takes of the host's memory beside a GPU: from the moves that the residency makes; computed."""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from wanfast.dit.chunking import Chunking
from wanfast.plan import Plan
from wanfast.residency.cuda import BOUNCE_BYTES
from wanfast.residency.moves import Key, plan_moves
from wanfast.residency.store import RESERVE_BYTES

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
def kept_blocks(runs: Runs, num_blocks: int, num_slots: int, *, is_mapped: bool) -> Kept:
    """Count the blocks that host memory is taken for.

    Args:
        runs: as `passes_of` gives them.
        num_blocks: of each expert.
        num_slots: on the device.
        is_mapped: whether blocks lie in their files as they are copied: then one that is copied once costs no memory.
    """
    accesses = [(expert, index) for expert, count in runs for _ in range(count) for index in range(num_blocks)]
    moves = [move.key for move in plan_moves(accesses, num_slots).moves]
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
    return Kept(again if is_mapped else len(left), at_once)


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
