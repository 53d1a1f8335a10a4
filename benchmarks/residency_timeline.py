"""Prints what streaming and the swap of experts cost on known machines, and draws one swap: docs/residency.svg.

Nothing here is measured: the schedules are those that run, their speeds are computed ones (tests/residency_rates.py).

    python benchmarks/residency_timeline.py
"""

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from residency_rates import NUM_BLOCKS, Case, cases, run  # noqa: E402

COLOURS = {"high_noise": ("#2b6cb0", "#63a4e0"), "low_noise": ("#c05621", "#f0a060")}  # odd and even blocks
WIDTH, LEFT, LANE, SLOTS = 1100, 90, 22, 160  # pixels


def table() -> Iterator[str]:
    """One line per case."""
    yield "Computed, not measured. One forward per step; guidance doubles what a copy can hide under."
    yield f"{'':<45}{'slots':>6}{'GB copied':>11}{'copy':>9}{'compute':>10}{'step over':>11}{'switch over':>13}"
    yield f"{'':<45}{'':>6}{'per step':>11}{'':>9}{'':>10}{'resident':>11}{'neighbours':>13}"
    for size in ("480p", "720p", "5B", "480p, 17 frames"):
        for case in cases(size, forwards=1):
            outcome = run(case)
            copied, copy, compute = outcome.copied_per_step / 1e9, case.copy_seconds * 1e3, case.block_seconds * 1e3
            name = f"{case.gpu}, {size}, {case.format}, {case.link}"
            yield (
                f"{name:<45}{case.num_slots:>6}{copied:>11.1f}{copy:>6.1f} ms"
                f"{compute:>7.1f} ms{outcome.step_ratio:>11.3f}{outcome.switch_ratio:>13.3f}"
            )


def drawing() -> str:
    """The steps around the swap, for a whole expert in slots and for half of one, as SVG."""
    cards = [
        ("24 GB: 40 slots, one expert resident", Case("RTX 4090", "480p", "8-bit", "PCIe 4.0 x16", 40, 1)),
        ("12 GB: 20 slots", Case("RTX 4090", "480p", "8-bit", "PCIe 4.0 x16", 20, 1)),
    ]
    height = 40 + len(cards) * (2 * LANE + SLOTS + 70)
    shapes = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif"'
        ' font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="10" y="20">A14B in 8 bits, 480p x 81 frames, RTX 4090, PCIe 4.0 x16: the last two high-noise passes'
        " (blue) and the first two low-noise passes (orange). Computed.</text>",
    ]
    for index, (title, case) in enumerate(cards):
        shapes += panel(title, case, 40 + index * (2 * LANE + SLOTS + 70))
    return "\n".join([*shapes, "</svg>\n"])


def panel(title: str, case: Case, top: int) -> list[str]:
    """Three lanes: what computes, what copies, and what each slot holds."""
    outcome, blocks = run(case), NUM_BLOCKS[case.model]
    schedule, timeline = outcome.schedule, outcome.timeline
    begin, end = timeline.accesses[blocks].start, timeline.accesses[5 * blocks - 1].end
    scale = (WIDTH - LEFT - 10) / (end - begin)

    def box(start: float, stop: float, y: float, high: float, colour: str) -> list[str]:
        low, up = max(start, begin), min(stop, end)
        if low >= up:
            return []
        x, width = LEFT + (low - begin) * scale, (up - low) * scale
        return [f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{high:.1f}" fill="{colour}"/>']

    shapes = [f'<text x="10" y="{top + 14}" font-weight="bold">{title}</text>']
    compute, copies, slots = top + 22, top + 22 + LANE + 4, top + 22 + 2 * (LANE + 4)
    for name, y in (("computes", compute + 15), ("copies", copies + 15), ("slots hold", slots + SLOTS / 2)):
        shapes.append(f'<text x="10" y="{y}">{name}</text>')
    for span, (expert, block) in zip(timeline.accesses, schedule.accesses, strict=True):
        shapes += box(span.start, span.end, compute, LANE, COLOURS[expert][block % 2])
    for span, move in zip(timeline.copies, schedule.moves, strict=True):
        shapes += box(span.start, span.end, copies, LANE, COLOURS[move.key[0]][move.key[1] % 2])
    row = SLOTS / case.num_slots
    for slot in range(case.num_slots):
        writes = [(span, move) for span, move in zip(timeline.copies, schedule.moves, strict=True) if move.slot == slot]
        ends = [later.start for _, (later, _) in pairwise(writes)] + [timeline.seconds]
        for (span, move), until in zip(writes, ends, strict=True):
            shapes += box(span.end, until, slots + slot * row, row - 0.5, COLOURS[move.key[0]][move.key[1] % 2])
    return shapes


if __name__ == "__main__":
    print("\n".join(table()))
    (ROOT / "docs/residency.svg").write_text(drawing())
