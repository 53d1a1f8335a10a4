"""What the residency counts: every byte it copies, and the time that is waited for copies."""

import time
from collections.abc import Iterator

import torch
from blocks import BLOCK_BYTES, SLOT_BYTES, Loads, make_block, make_residency, slow

from wanfast.residency import Residency
from wanfast.residency.moves import plan_moves


def consume(blocks: Iterator[object], seconds: float = 0.0) -> None:
    for _ in blocks:
        time.sleep(seconds)


def test_every_copy_is_counted() -> None:
    residency = make_residency(num_slots=2)
    assert (residency.traffic.copied_bytes, residency.traffic.stall_seconds) == (0, 0)
    residency.begin(["high_noise"] * 2)
    for _ in range(2):
        consume(residency.blocks("high_noise"))
    under_way = residency.traffic
    residency.end()
    moves = plan_moves([("high_noise", index) for index in range(5)] * 2, 2).moves
    # How close the tensors of so small a block lie is a matter of where they were allocated.
    assert len(moves) * BLOCK_BYTES <= residency.traffic.copied_bytes <= len(moves) * SLOT_BYTES
    assert residency.traffic.copied_bytes == under_way.copied_bytes
    assert residency.traffic.stall_seconds == under_way.stall_seconds > 0
    residency.release()
    assert residency.traffic == under_way  # what was, was


def test_in_place_nothing_is_copied() -> None:
    residency = Residency(make_block, 5, torch.device("cpu"), slot_bytes=SLOT_BYTES)
    consume(residency.blocks("high_noise"))
    assert (residency.traffic.copied_bytes, residency.traffic.stall_seconds) == (0, 0)


def test_a_wait_for_a_slow_load_is_a_stall_and_one_that_is_hidden_is_none() -> None:
    stalled, hidden = (make_residency(Loads(slow(0.02)), num_slots=2) for _ in range(2))
    consume(stalled.blocks("high_noise"))
    consume(hidden.blocks("high_noise"), seconds=0.2)
    for residency in (stalled, hidden):
        residency.end()
    assert stalled.traffic.stall_seconds > 0.08
    assert hidden.traffic.stall_seconds < 0.08
