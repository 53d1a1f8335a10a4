"""Runs a main loop's machine code on a model of one Ada multiprocessor (SM), cycle by cycle.

An SM has four partitions; each issues one instruction of one of its warps per cycle, in each warp's order. The model
keeps the compiler's schedule (scheduled.py), the pipes' rates, shared memory's one port, barriers, and copies that are
waited for. It leaves out bank conflicts, instruction caches, DRAM, clocks that fall under load, and power. Nothing is
fitted; every number below is a rate from NVIDIA's programming guide or data sheets, or a latency from public
microbenchmarks, rounded.
"""

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from machine_code import sass
from scheduled import Step

PARTITIONS = 4
PIPES = ("issue", "tensor", "mufu", "alu", "imad")  # of a partition; the first takes no time of its own
RESOURCES = ("tensor", "issue", "alu", "mufu", "shared", "L2")
PHASES = 6  # of the CTAs of an SM, relative to each other
SKIPPED, COUNTED = 3, 5  # iterations
GROUPS_KEPT = 8  # of copies, per warp: more than any kernel has stages

# Cycles that one warp's instruction keeps its partition's pipe busy, by the start of its name.
TENSOR = {
    "HMMA.16816.F32": 32,  # with fp32 sums: 165 TFLOPS of 128 SMs at 2.52 GHz
    "HMMA.16816.F16": 16,
    "HMMA.1688.F32": 16,
    "QMMA.16832.F32": 32,
    "QMMA.16832.F16": 16,  # with fp16 sums: 661 TFLOPS
    "IMMA.16832": 16,
    "IMMA.16816": 8,
}
MUFU = 8  # 16 lanes per SM
HALF_RATE = 2  # 64 lanes per SM: integers, comparisons, conversions, selections
HALF_RATE_FAMILIES = frozenset(
    (
        *("FMNMX", "FSEL", "FSET", "FSETP", "I2FP", "F2FP", "I2F", "F2I", "MOV", "SEL", "LOP3", "PLOP3", "PRMT", "SHF"),
        *("IADD3", "IMNMX", "ISETP", "IABS", "LEA", "VIADD", "VIMNMX"),
    )
)
INTEGER_MULTIPLY = frozenset(("IMAD",))

# Cycles that shared memory's port (128 bytes a cycle, one for the SM) is busy with one warp's instruction
_LDSM = re.compile(r"^LDSM\..*\.(4|2)$")
_WIDE = re.compile(r"\.(64|128)\b")
_LOADED = re.compile(r"\.[US]?(8|16|64|128)\b")  # bits of each lane, where they are not 32
LANES = 32

# Cycles from issue to the result's scoreboard, behind the pipe's own
LATENCY = {"MUFU": 18, "LDSM": 29, "LDS": 25, "STS": 20, "SHFL": 24, "LDL": 33, "STL": 20, "LDG": 400, "LDC": 30}
OTHER_LATENCY = 14  # R2UR, S2R, IMAD.WIDE and the like
OPERANDS_READ = 12
COPY = 400  # of global memory to shared memory, from L2
L2_PORT = 64  # bytes a cycle that one SM takes from L2 at most
L2 = 1700 / 128  # the same where all 128 load without a pause: public microbenchmarks (arXiv 2402.13499)
BARRIER = 15
BRANCH = 8

_GROUPS_LEFT = re.compile(r"^DEPBAR\.LE SB0, (0x[0-9a-f]+)")


@dataclass(frozen=True, slots=True)
class _Op:
    """What the model needs of one step of the loop."""

    pipe: int  # of PIPES
    busy: int  # cycles on it
    port: int  # cycles of shared memory's port
    l2: float  # cycles of the SM's port to L2
    latency: int
    stall: int
    writes: int | None
    reads: int | None
    waits: tuple[int, ...]
    groups_left: int | None  # of copies, for the instruction that waits for them
    kind: str  # "copy", "group", "barrier" or ""


@dataclass(slots=True)
class _Warp:
    cta: int
    ready: float
    at: int = 0  # step of the loop
    issued: float = -1.0  # last
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 6)
    copied: float = 0.0  # when the copies that are not yet in a group are there
    groups: list[float] = field(default_factory=list)  # when each group of copies is there
    ends: list[float] = field(default_factory=list)  # of each iteration


def tensor_cycles(opcode: str) -> int:
    """Cycles of one tensor instruction on its partition's pipe."""
    found = [cycles for name, cycles in TENSOR.items() if opcode.startswith(name)]
    if not found:
        raise ValueError(f"opcode: no tensor instruction of Ada, got {opcode}")
    return found[0]


def pipe_of(one: sass.Instruction) -> tuple[str, int]:
    """The pipe of its partition that an instruction takes, and for how many cycles."""
    if one.is_tensor:
        return "tensor", tensor_cycles(one.opcode)
    if one.family == "MUFU":
        return "mufu", MUFU
    if one.family in HALF_RATE_FAMILIES:
        return "alu", HALF_RATE
    if one.family in INTEGER_MULTIPLY:
        return "imad", HALF_RATE
    return "issue", 1


def port_cycles(one: sass.Instruction) -> int:
    """Cycles of shared memory's port that an instruction takes; 0 where it needs none."""
    if one.family == "LDSM":
        found = _LDSM.match(one.opcode)
        return int(found.group(1)) if found else 1
    if one.family in ("LDS", "STS", "LDGSTS", "LDG", "STG", "LDL", "STL"):
        found = _WIDE.search(one.opcode)
        return int(found.group(1)) // 32 if found else 1
    return 1 if one.family == "SHFL" else 0


def loaded_bytes(one: sass.Instruction) -> int:
    """Bytes that an instruction of a warp loads from global memory; 0 where it loads none."""
    if one.family not in ("LDG", "LDGSTS"):
        return 0
    found = _LOADED.search(one.opcode)
    return LANES * (int(found.group(1)) // 8 if found else 4)


def cycles_per_iteration(loop: Sequence[Step], *, ctas: int, warps: int) -> float:
    """Run a loop on all warps of one SM until it is steady.

    How far the CTAs of an SM are apart settles how well they fill each other's gaps. On a GPU that wanders; here it
    is what it was at the start, so the result is the mean over starts spread evenly through an iteration.

    Args:
        loop: as scheduled.schedule gives it.
        ctas: that run at a time.
        warps: of each CTA, a multiple of 4.

    Returns:
        Cycles from one iteration of a CTA to its next, all CTAs running.
    """
    operations = [_operation(step) for step in loop]
    alone = _Model(operations, [0.0], warps).run()
    least = ctas * busy(loop, warps=warps)["L2"]  # what all SMs together are given
    if ctas == 1:
        return max(alone, least)
    starts = [[cta * alone * phase / PHASES for cta in range(ctas)] for phase in range(PHASES)]
    return max(sum(_Model(operations, start, warps).run() for start in starts) / PHASES, least)


def _operation(step: Step) -> _Op:
    one, control = step.instruction, step.control
    pipe, cycles = pipe_of(one)
    left = _GROUPS_LEFT.match(one.text)
    port = port_cycles(one)
    return _Op(
        pipe=PIPES.index(pipe),
        busy=cycles,
        port=port,
        l2=loaded_bytes(one) / L2_PORT,
        latency=(port or cycles) + LATENCY.get(one.family, OTHER_LATENCY),
        stall=max(control.stall, 1),
        writes=control.writes,
        reads=control.reads,
        waits=control.waits,
        groups_left=int(left.group(1), 16) if left else None,
        kind={"LDGSTS": "copy", "LDGDEPBAR": "group", "BAR": "barrier"}.get(one.family, ""),
    )


class _Model:
    """One SM; warp w of a CTA is in partition w % 4."""

    def __init__(self, loop: list[_Op], starts: list[float], warps: int) -> None:
        self.loop, self.warps_per_cta = loop, warps
        self.warps = [_Warp(cta, start) for cta, start in enumerate(starts) for _ in range(warps)]
        self.members = [self.warps[part::PARTITIONS] for part in range(PARTITIONS)]
        self.pipes = [[0.0] * len(PIPES) for _ in range(PARTITIONS)]  # until when each is busy
        self.port = 0.0  # until when shared memory's is busy
        self.l2 = 0.0  # and its port to L2
        self.arrived: list[list[_Warp]] = [[] for _ in starts]
        self.events: list[tuple[float, int]] = [(0.0, part) for part in range(PARTITIONS)]
        self.next_try = [0.0] * PARTITIONS

    def run(self) -> float:
        """Cycles per iteration of a CTA, from when all of them run steadily to when the first stops."""
        while all(len(warp.ends) < SKIPPED + COUNTED for warp in self.warps):
            now, part = heapq.heappop(self.events)
            if now != self.next_try[part]:  # it was moved
                continue
            pipes, first, chosen = self.pipes[part], float("inf"), None
            for warp in self.members[part]:
                when = max(self._earliest(warp, pipes), now)
                if when < first or (when == first and chosen is not None and warp.issued < chosen.issued):
                    first, chosen = when, warp
            if chosen is not None and first == now:
                self._issue(chosen, pipes, now)
                self._try_at(part, now + 1)
            elif chosen is not None:  # otherwise a barrier's last warp will wake the partition
                self._try_at(part, first)
        start = max(warp.ends[SKIPPED - 1] for warp in self.warps if len(warp.ends) >= SKIPPED)
        inside = [[end for end in warp.ends if end >= start] for warp in self.warps]
        rates = [(len(ends) - 1) / (ends[-1] - ends[0]) for ends in inside if len(ends) > 1]
        return len(rates) / sum(rates)

    def _try_at(self, part: int, when: float) -> None:
        self.next_try[part] = when
        heapq.heappush(self.events, (when, part))

    def _earliest(self, warp: _Warp, pipes: list[float]) -> float:
        operation = self.loop[warp.at]
        when = max(warp.ready, pipes[operation.pipe])
        for index in operation.waits:
            when = max(when, warp.scoreboards[index])
        if operation.groups_left is not None:
            finished = len(warp.groups) - operation.groups_left
            when = max(when, *warp.groups[:finished]) if finished > 0 else when
        return when

    def _issue(self, warp: _Warp, pipes: list[float], now: float) -> None:
        operation = self.loop[warp.at]
        if operation.pipe:
            pipes[operation.pipe] = now + operation.busy
        start = now
        if operation.port:
            start = max(now, self.port)
            self.port = start + operation.port
        if operation.l2:
            self.l2 = max(now, self.l2) + operation.l2
            start = max(start, self.l2)
        if operation.writes is not None:
            held = warp.scoreboards[operation.writes]
            warp.scoreboards[operation.writes] = max(held, start + operation.latency)
        if operation.reads is not None:
            held = warp.scoreboards[operation.reads]
            warp.scoreboards[operation.reads] = max(held, start + OPERANDS_READ)
        warp.ready, warp.issued = now + operation.stall, now
        if operation.kind == "copy":
            warp.copied = max(warp.copied, start + COPY)
        elif operation.kind == "group":
            warp.groups = [*warp.groups[-GROUPS_KEPT:], warp.copied]
        elif operation.kind == "barrier":
            self._arrive(warp, now)
        warp.at += 1
        if warp.at == len(self.loop):
            warp.at = 0
            warp.ready += BRANCH
            warp.ends.append(now)

    def _arrive(self, warp: _Warp, now: float) -> None:
        arrived = self.arrived[warp.cta]
        arrived.append(warp)
        warp.ready = float("inf")
        if len(arrived) == self.warps_per_cta:
            for other in arrived:
                other.ready = now + BARRIER
            arrived.clear()
            for part in range(PARTITIONS):
                if not now < self.next_try[part] <= now + 1:
                    self._try_at(part, now + 1)


def busy(loop: Sequence[Step], *, warps: int) -> dict[str, float]:
    """Cycles that one iteration of a CTA keeps each of RESOURCES busy; each partition has all but the last two."""
    share = warps / PARTITIONS
    taken = [pipe_of(step.instruction) for step in loop]
    needs = {name: share * sum(cycles for pipe, cycles in taken if pipe == name) for name in ("tensor", "mufu", "alu")}
    return needs | {
        "issue": share * len(loop),
        "shared": warps * sum(port_cycles(step.instruction) for step in loop),
        "L2": warps * sum(loaded_bytes(step.instruction) for step in loop) / L2,
    }
