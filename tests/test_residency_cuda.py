"""Slots on a GPU, on streams that run late and out of step: only events keep the order, and these tests find the gaps.

The streams are played here: work is noted when it is given, and done later, in any order that the events allow.
"""

import mmap
import random
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import torch
from blocks import SLOT_BYTES, Block, Loads, is_block, make_block, make_residency, movers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import wanfast
from wanfast.errors import CheckpointError
from wanfast.host_memory import reads_of_moves
from wanfast.residency import Residency, cuda, weight_bytes
from wanfast.residency.memory import named_tensors
from wanfast.residency.moves import plan_moves

PASSES = ["high_noise", "high_noise", "high_noise", "low_noise", "low_noise", "high_noise"]
RUNS = st.lists(st.tuples(st.sampled_from(["high_noise", "low_noise"]), st.integers(1, 4)), min_size=1, max_size=3)


@dataclass
class Work:
    """One thing a stream does, after what it waits for."""

    run: Callable[[], object]
    waits_for: "tuple[PlayedStream, int] | None" = None


@dataclass
class PlayedStream:
    work: list[Work] = field(default_factory=list)
    done: int = 0

    def wait_event(self, event: "PlayedEvent") -> None:
        if event.mark is not None:
            self.work.append(Work(lambda: None, event.mark))

    def wait_stream(self, stream: "PlayedStream") -> None:
        self.work.append(Work(lambda: None, (stream, len(stream.work))))

    def can_go_on(self) -> bool:
        if self.done == len(self.work):
            return False
        mark = self.work[self.done].waits_for
        return mark is None or mark[0].done >= mark[1]

    def go_on(self) -> None:
        self.work[self.done].run()
        self.done += 1

    def synchronize(self) -> None:
        self.run_to(len(self.work))

    def run_to(self, position: int) -> None:
        while self.done < position:
            mark = self.work[self.done].waits_for
            if mark is not None:
                mark[0].run_to(mark[1])
            self.go_on()


@dataclass
class PlayedEvent:
    mark: tuple[PlayedStream, int] | None = None

    def record(self, stream: PlayedStream) -> None:
        self.mark = (stream, len(stream.work))

    def synchronize(self) -> None:
        if self.mark is not None:
            self.mark[0].run_to(self.mark[1])


class TimedEvent(PlayedEvent):
    """Each wait takes a second; it is over when its stream has come past it."""

    def query(self) -> bool:
        assert self.mark is not None
        return self.mark[0].done >= self.mark[1]

    def elapsed_time(self, end: "TimedEvent") -> float:
        return 1e3


class PlayedGpu:
    """Two streams; each time something is given to it, some of what waits may be done."""

    def __init__(self, seed: int, eagerness: float) -> None:
        self.copies, self.computes = PlayedStream(), PlayedStream()
        self.rng = random.Random(seed)
        self.eagerness = eagerness
        self.lock = threading.RLock()
        self.pinned_limit: int | None = None
        self.pinned: list[int] = []
        self.copied: list[int] = []

    def compute(self) -> PlayedStream:
        return self.computes

    def event(self) -> "LockedEvent":
        return LockedEvent(self)

    def wait(self, event: PlayedEvent) -> cuda.Wait:
        begin, end = TimedEvent(), TimedEvent()
        begin.record(self.computes)
        self.computes.wait_event(event)
        end.record(self.computes)
        return cuda.Wait(begin, end)  # type: ignore[arg-type]

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), 0xDD, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.shape == source.shape
        self.copied.append(target.nbytes)
        self.give(self.copies, lambda: target.copy_(source))

    def pin(self, num_bytes: int) -> Tensor | None:
        if self.pinned_limit is not None and sum(self.pinned) + num_bytes > self.pinned_limit:
            return None
        self.pinned.append(num_bytes)
        return torch.full((num_bytes,), 0xCC, dtype=torch.uint8)

    def give(self, stream: PlayedStream, run: Callable[[], object]) -> None:
        with self.lock:
            stream.work.append(Work(run))
            while self.rng.random() < self.eagerness:
                ready = [stream for stream in (self.copies, self.computes) if stream.can_go_on()]
                if not ready:
                    break
                self.rng.choice(ready).go_on()

    def finish(self) -> None:
        with self.lock:
            while ready := [stream for stream in (self.copies, self.computes) if stream.can_go_on()]:
                self.rng.choice(ready).go_on()
            assert self.copies.done == len(self.copies.work) and self.computes.done == len(self.computes.work)


class LockedEvent(PlayedEvent):
    def __init__(self, gpu: PlayedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def synchronize(self) -> None:
        with self.gpu.lock:
            super().synchronize()


def play(monkeypatch: pytest.MonkeyPatch, seed: int, eagerness: float) -> PlayedGpu:
    gpu = PlayedGpu(seed, eagerness)
    monkeypatch.setattr("wanfast.residency.residency.Cuda", lambda device: gpu)
    monkeypatch.setattr("wanfast.residency.residency.CudaPin", lambda device: gpu.pin)
    return gpu


def run(gpu: PlayedGpu, num_slots: int, ram: int | None, passes: list[str] = PASSES) -> None:
    residency = make_residency(num_slots=num_slots, device="cuda", ram=ram)
    computed: list[tuple[Block, str, int]] = []

    def kernel(block: Block, expert: str, index: int) -> None:
        assert is_block(block, expert, index), f"{expert} block {index} computed with another's bytes"
        computed.append((block, expert, index))

    for _ in range(2):
        residency.begin(passes)
        for expert in passes:
            for index, block in enumerate(residency.blocks(expert)):
                gpu.give(gpu.computes, lambda b=block, e=expert, i=index: kernel(b, e, i))
    residency.end()
    gpu.finish()
    assert len(computed) == 2 * 5 * len(passes)
    residency.release()


@pytest.mark.parametrize("eagerness", [0.0, 0.7])
@pytest.mark.parametrize("num_slots", [1, 2, 3, 5, 8, 10])
@pytest.mark.parametrize("memory", ["pinned", "some pinned", "refused", "none free"])
def test_every_kernel_sees_its_block(
    memory: str, num_slots: int, eagerness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "BOUNCE_BYTES", 256)  # several copies for a block
    for seed in range(3):
        gpu = play(monkeypatch, seed, eagerness)
        gpu.pinned_limit = {"pinned": None, "some pinned": 5000, "refused": 0, "none free": None}[memory]
        run(gpu, num_slots, 0 if memory == "none free" else None)
        if memory == "refused":
            assert gpu.pinned == []
        if memory == "none free":
            assert set(gpu.pinned) <= {256}  # the bounce buffers


def test_each_move_of_a_pinned_block_is_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "BOUNCE_BYTES", 256)
    gpu = play(monkeypatch, 0, 0.5)
    passes = ["high_noise"] * 4
    run(gpu, 2, None, passes)
    accesses = [(expert, index) for expert in passes for index in range(5)]
    moves = len(plan_moves(accesses, 2).moves) + len(plan_moves(accesses, 2, accesses[-2:][::-1]).moves)
    assert gpu.copied == [SLOT_BYTES - 256 + 15] * moves  # the last tensor, of the narrowest dtype, is not padded
    assert gpu.pinned == [SLOT_BYTES - 256 + 15] * 5


def test_waits_of_the_device_are_counted_once_they_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here each takes a second, and is over when its stream has come past it."""
    gpu = play(monkeypatch, 0, 0.0)
    residency = make_residency(num_slots=2, device="cuda", ram=None)
    residency.begin(["high_noise"])
    for _ in residency.blocks("high_noise"):
        gpu.give(gpu.computes, lambda: None)
    residency.end()
    before = residency.traffic.stall_seconds
    gpu.finish()
    after = residency.traffic.stall_seconds
    assert before <= 3 and after - before == pytest.approx(5 - int(before)) and int(after) == 5
    residency.release()
    assert residency.traffic.stall_seconds == after


def test_the_thread_that_computes_waits_for_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the GPU has not begun with anything, the kernels of four passes are queued."""
    gpu = play(monkeypatch, 0, 0.0)
    residency = make_residency(num_slots=2, device="cuda", ram=None)
    residency.begin(["high_noise"] * 4)
    for _ in range(4):
        for block in residency.blocks("high_noise"):
            gpu.give(gpu.computes, lambda b=block: b)
    assert gpu.computes.done == gpu.copies.done == 0
    residency.release()


@pytest.mark.parametrize(("free", "slots"), [(0, 2), (5 * SLOT_BYTES, 4), (100 * SLOT_BYTES, 5)])
def test_without_a_budget_one_expert_takes_what_is_free_less_a_fifth(
    free: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = play(monkeypatch, 0, 0.5)
    taken = 0

    def allocate(num_bytes: int) -> Tensor:
        nonlocal taken
        taken += num_bytes
        return torch.empty(num_bytes, dtype=torch.uint8)

    monkeypatch.setattr(gpu, "allocate", allocate)
    monkeypatch.setattr("wanfast.residency.residency.free_memory", lambda device: free - taken)
    residency = Residency(make_block, 5, torch.device("cuda"), slot_bytes=SLOT_BYTES)
    for _ in range(2):
        residency.begin(PASSES)
        for expert in PASSES:
            assert len(list(residency.blocks(expert))) == 5
    assert taken == slots * SLOT_BYTES
    residency.release()


class PlayedCudart:
    """Registers memory, up to a limit; an error stays until somebody asks for it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        assert address % mmap.PAGESIZE == 0 and flags == 1
        if sum(self.registered.values()) + num_bytes > self.limit:
            return 2
        self.registered[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


def test_memory_is_pinned_to_the_byte_and_unpinned_when_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart, asked = PlayedCudart(limit=20_000), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(cuda, "_forget_error", lambda: asked.append(True))
    pin = cuda.CudaPin(torch.device("cuda"))
    first, second = pin(5001), pin(12_001)
    assert first is not None and second is not None and asked == []
    assert sorted(cudart.registered.values()) == [5001, 12_001]
    assert first.data_ptr() in cudart.registered and first.shape == (5001,)
    first.fill_(7)
    assert pin(5000) is None and asked == [True]
    del first
    assert list(cudart.registered.values()) == [12_001]
    assert pin(5000) is not None


def test_blocks_are_loaded_long_before_they_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second expert's have no slot yet, but are in host memory before the first expert begins."""
    gpu, loads = play(monkeypatch, 0, 0.5), Loads()
    residency = make_residency(loads, num_slots=5, device="cuda", ram=None)
    residency.begin(PASSES)
    deadline = time.monotonic() + 10
    while len(loads.keys) < 10 and time.monotonic() < deadline:
        time.sleep(0.001)
    keys = [(expert, index) for expert in ("high_noise", "low_noise") for index in range(5)]
    assert sorted(loads.keys) == keys
    for expert in PASSES:
        for index, block in enumerate(residency.blocks(expert)):
            gpu.finish()
            assert is_block(block, expert, index)
    assert sorted(loads.keys) == keys, "loaded once, by whichever thread"
    residency.release()


@settings(max_examples=25, deadline=None)
@given(RUNS, st.integers(2, 8), st.sampled_from([0, 5, 8, 11]), st.integers(0, 2**16))
def test_with_the_thread_that_loads_ahead_as_often_as_is_counted(
    runs: list[tuple[str, int]], num_slots: int, kept: int, seed: int
) -> None:
    """With room for no block, for an expert's or for more; with less than an expert's the faster thread decides."""
    size = SLOT_BYTES - 256 + 15
    with pytest.MonkeyPatch.context() as monkeypatch:
        gpu, loads = play(monkeypatch, seed, 0.7), Loads()
        residency = make_residency(loads, num_slots=num_slots, device="cuda", ram=kept * size)
        passes = [expert for expert, count in runs for _ in range(count)]
        residency.begin(passes)
        for expert in passes:
            for _ in residency.blocks(expert):
                gpu.finish()
        residency.end()
        gpu.finish()
        residency.release()
    reads = reads_of_moves(
        tuple(runs), 5, num_slots, block_bytes=size, file_bytes=7, is_as_stored=False, is_pinned=True, room=kept * size
    )
    assert sum(read.num_bytes > 0 for read in reads) == len(loads.keys)


def test_a_fault_found_ahead_is_told_when_its_block_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(expert: str, index: int) -> None:
        if (expert, index) == ("low_noise", 2):
            raise CheckpointError("file: tensor of low_noise 2")

    gpu, seen = play(monkeypatch, 0, 0.5), []
    residency = make_residency(Loads(fail), num_slots=3, device="cuda", ram=None)
    residency.begin(PASSES)
    with pytest.raises(CheckpointError, match="tensor of low_noise 2"):
        for expert in PASSES:
            for index, _ in enumerate(residency.blocks(expert)):
                seen.append((expert, index))
    assert len(seen) >= 15 and movers() == []
    gpu.finish()
    residency.release()


def test_the_text_encoder_streams_through_two_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = wanfast.load(device="cpu").loaded
    wanted = list(loaded._text_blocks())
    gpu = play(monkeypatch, 0, 0.5)
    loaded.device = torch.device("cuda")
    for got, want in zip(loaded._text_blocks(), wanted, strict=True):
        gpu.finish()
        pairs = zip(named_tensors(got), named_tensors(want), strict=True)
        assert all(one[0] == other[0] and torch.equal(one[1], other[1]) for one, other in pairs)
    assert len(wanted) == loaded.config.text.num_layers
    assert sum(gpu.copied) <= sum(weight_bytes(block) for block in wanted) + len(wanted) * 10 * 256
    assert len(gpu.pinned) == 2  # bounce buffers only: each block is copied once


def test_closing_waits_for_copies_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = play(monkeypatch, 0, 0.0)
    residency = make_residency(num_slots=5, device="cuda", ram=None)
    residency.begin(["high_noise"])
    next(residency.blocks("high_noise"))
    residency.release()
    assert gpu.copies.done == len(gpu.copies.work) > 0


def test_all_blocks_are_as_made() -> None:
    """The truth of these tests is no accident of equal blocks."""
    blocks = [(expert, index) for expert in ("high_noise", "low_noise") for index in range(5)]
    for one in blocks:
        assert [other for other in blocks if is_block(make_block(*one), *other)] == [one]
