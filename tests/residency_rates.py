"""Speeds of machines and sizes of blocks, to run schedules of moves in time without either. All are computed.

Seconds per block and forward are those that 8-bit kernels at shares of the peak seen in public ones would take; blocks
in bf16 are copied for the same computation, which is harder than what would be run with them.
"""

from dataclasses import dataclass
from itertools import pairwise

from wanfast.residency.moves import Key, Schedule, plan_moves
from wanfast.residency.timeline import Timeline, simulate

BLOCK_PARAMETERS = {"A14B": 351.3e6, "5B": 163.6e6}
NUM_BLOCKS = {"A14B": 40, "5B": 30}
BYTES = {"8-bit": 1, "bf16": 2}
LINKS = {"PCIe 4.0 x8": 12.5e9, "PCIe 4.0 x16": 25e9, "PCIe 5.0 x16": 50e9}  # bytes per second, from pinned memory
# Milliseconds of one block in one forward, 81 frames (5B: 121).
BLOCK_MS = {
    ("RTX 4090", "480p"): 93.0,
    ("RTX 4090", "720p"): 368.0,
    ("RTX 4090", "5B"): 38.6,
    ("RTX 5090", "480p"): 73.0,
    ("RTX 5090", "720p"): 282.0,
    ("RTX 5090", "5B"): 30.5,
    ("H200", "480p"): 49.5,
    ("H200", "720p"): 216.0,
    ("H200", "5B"): 20.2,
    ("RTX 4090", "480p, 17 frames"): 13.0,
}
LINK_OF = {"RTX 4090": ["PCIe 4.0 x16", "PCIe 4.0 x8"], "RTX 5090": ["PCIe 5.0 x16"], "H200": ["PCIe 5.0 x16"]}


@dataclass(frozen=True, slots=True)
class Case:
    """One machine, one format of the weights, one number of slots."""

    gpu: str
    size: str
    format: str
    link: str
    num_slots: int
    forwards: int  # per step: 2 with guidance

    @property
    def model(self) -> str:
        return "5B" if self.size == "5B" else "A14B"

    @property
    def block_seconds(self) -> float:
        return BLOCK_MS[self.gpu, self.size] / 1000 * self.forwards

    @property
    def copy_seconds(self) -> float:
        return BLOCK_PARAMETERS[self.model] * BYTES[self.format] / LINKS[self.link]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run of a case: three steps of each expert."""

    schedule: Schedule
    timeline: Timeline
    step_ratio: float  # slowest step but the first and the switch, over its computation alone
    switch_ratio: float  # the first step of the second expert, over the mean of its neighbours
    copied_per_step: float  # bytes, in a step between


def experts_of(case: Case) -> list[str]:
    """The expert of each step."""
    return ["single"] * 6 if case.model == "5B" else ["high_noise"] * 3 + ["low_noise"] * 3


def run(case: Case) -> Outcome:
    """Plan a case and run it in time."""
    blocks = NUM_BLOCKS[case.model]
    accesses: list[Key] = [(expert, index) for expert in experts_of(case) for index in range(blocks)]
    schedule = plan_moves(accesses, case.num_slots)
    timeline = simulate(schedule, [case.block_seconds] * len(accesses), [case.copy_seconds] * len(schedule.moves))
    ends = [0.0, *(timeline.accesses[blocks * step + blocks - 1].end for step in range(6))]
    steps = [end - start for start, end in pairwise(ends)]
    within = [move for move in schedule.moves if blocks <= move.first_use < 2 * blocks]
    return Outcome(
        schedule,
        timeline,
        max(steps[1], steps[2], steps[4], steps[5]) / (blocks * case.block_seconds),
        steps[3] / ((steps[2] + steps[4]) / 2),
        len(within) * BLOCK_PARAMETERS[case.model] * BYTES[case.format],
    )


def cases(size: str, forwards: int) -> list[Case]:
    """Every machine and format for a size of video, from two slots to one whole expert."""
    gpus = [gpu for gpu, known in BLOCK_MS if known == size]
    slots = (2, 20, NUM_BLOCKS["5B" if size == "5B" else "A14B"])
    return [
        Case(gpu, size, form, link, count, forwards)
        for gpu in gpus
        for form in BYTES
        for link in LINK_OF[gpu]
        for count in slots
    ]
