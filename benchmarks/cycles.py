"""Computes, from the machine code of a kernel, how fast its main loop runs on an RTX 4090; nothing here is measured.

    python benchmarks/cycles.py                                the calibration, and every case for sm_89
    python benchmarks/cycles.py attention/D128-bf16/sm_89      one case, or all with this in their name
    python benchmarks/cycles.py --write                        docs/kernels-computed.md and the numbers it is made from

See multiprocessor.py for the model and docs/kernels-computed.md for what it leaves out.
"""

import argparse
import json
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import triton
from computed_page import make_page
from machine_code import sass
from machine_code.case import Case, cases
from machine_code.measure import build, row
from multiprocessor import PARTITIONS, RESOURCES, busy, cycles_per_iteration
from published import PUBLISHED
from scheduled import schedule
from wan_shapes import LAUNCHES, Launch

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "kernels-computed.md"
NUMBERS = ROOT / "benchmarks" / "computed.json"

# RTX 4090: NVIDIA's data sheet.
MULTIPROCESSORS = 128
CLOCK = 2.52e9  # Hz, boost
DRAM = 1008e9  # bytes a second

_SHAPE = re.compile(r"\.(16816|16832|1688)\b")
_MACS = {"1688": 16 * 8 * 8, "16816": 16 * 8 * 16, "16832": 16 * 8 * 32}  # of one tensor instruction of a warp


OUTSIDE = 2  # cycles that an instruction outside the main loop takes of its partition
START = 1500  # cycles from a CTA's launch to its first product: two trips to DRAM


@dataclass(frozen=True, slots=True)
class Loop:
    """A main loop on one SM: what one iteration of all its CTAs needs, and what it takes."""

    ctas: int  # on the SM at a time
    cycles: float  # of one iteration of each of them
    busy: dict[str, float]  # cycles that each resource works in that time
    macs: int  # multiply-adds of one iteration of one CTA
    peak: float  # TOPS of an RTX 4090, were its tensor pipes never idle in this mix of instructions
    outside: int  # cycles of one CTA outside the loop
    row: dict[str, Any]  # of tests/data/machine_code: what all this was computed from

    @property
    def share(self) -> float:
        """Of the time that the tensor pipe works: the share of `peak`."""
        return self.busy["tensor"] / self.cycles

    @property
    def tops(self) -> float:
        """Tera-operations a second of the loop alone; a multiply-add is two operations."""
        return self.share * self.peak


def compute(case: Case) -> Loop | None:
    """Model a case's main loop; None where it has no tensor instructions."""
    compiled = build(case)
    instructions = sass.main_loop(compiled.code)
    if not sass.tensor_work(instructions):
        return None
    found = row(case, compiled)
    ctas, warps = found["ctas_per_sm"], found["warps"]
    steps = schedule(compiled.binary.asm["cubin"], instructions)
    needs = {name: ctas * cycles for name, cycles in busy(steps, warps=warps).items()}
    cycles = cycles_per_iteration(steps, ctas=ctas, warps=warps)
    macs = warps * sum(_macs(one) for one in instructions if one.is_tensor)
    per_cycle = ctas * macs / needs["tensor"]
    return Loop(
        ctas=ctas,
        cycles=round(cycles),
        busy={name: round(value) for name, value in needs.items()},
        macs=macs,
        peak=2 * per_cycle * CLOCK * MULTIPROCESSORS / 1e12,
        outside=OUTSIDE * (len(compiled.code) - len(instructions)) * ctas * warps // PARTITIONS + START,
        row=found,
    )


def _macs(one: sass.Instruction) -> int:
    found = _SHAPE.search(one.opcode)
    assert found, f"no shape in {one.opcode}"
    return _MACS[found.group(1)]


def seconds(loop: Loop, launch: Launch) -> float:
    """Of a whole launch: waves of CTAs on all SMs, the last as long as the others."""
    waves = -(-launch.ctas // (MULTIPROCESSORS * loop.ctas))
    return waves * (launch.macs_per_cta / loop.macs * loop.cycles + loop.outside) / CLOCK


def case_row(name: str) -> dict[str, Any] | None:
    """A case as the page has it; None where it has no tensor instructions."""
    case = cases()[name]
    loop = compute(case)
    if loop is None:
        return None
    launches = LAUNCHES.get(case.kernel, lambda _: {})(case.arguments)
    return {
        "name": case.name.removesuffix("/sm_89"),
        "tops": round(loop.tops, 1),
        "peak": round(loop.peak, 1),
        "ctas": loop.ctas,
        "cycles": loop.cycles,
        "busy": loop.busy,
        "shapes": {
            name: {
                "tops": round(launch.operations / seconds(loop, launch) / 1e12, 1),
                "ms": round(1e3 * seconds(loop, launch), 2),
                "dram_ms": round(1e3 * launch.bytes / DRAM, 2),
            }
            for name, launch in launches.items()
        },
        "registers": loop.row["registers"],
        "loop": loop.row["loop"],
    }


def published_row(index: int) -> dict[str, Any]:
    """One of PUBLISHED as the page has it: the model's figure beside the published one."""
    figure = PUBLISHED[index]
    loop = compute(figure.case)
    assert loop is not None
    scale = figure.multiprocessors * figure.clock / (MULTIPROCESSORS * CLOCK)
    return {
        "name": figure.case.kernel,
        "gpu": figure.gpu,
        "published": round(figure.tops, 1),
        "computed": round(loop.tops * scale, 1),
        "peak": round(loop.peak * scale, 1),
        "ctas": loop.ctas,
        "source": figure.source,
    }


def line(found: dict[str, Any]) -> str:
    """A case in a few lines."""
    needs = ", ".join(f"{name} {found['busy'][name]}" for name in RESOURCES)
    first = (
        f"{found['name']}: computed {found['tops']:.0f} TOPS in the loop, {found['tops'] / found['peak']:.0%} of "
        f"{found['peak']:.0f}; {found['ctas']} CTAs/SM, {found['cycles']} cycles, of which busy: {needs}"
    )
    shapes = [
        f"    {name}: {shape['tops']:.0f} TOPS, {shape['ms']:.2f} ms (DRAM alone {shape['dram_ms']:.2f} ms)"
        for name, shape in found["shapes"].items()
    ]
    return "\n".join([first, *shapes])


def main() -> None:
    """Print or write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", default="", help="the name of a case or of a public kernel, or a part of it")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--write", action="store_true", help=f"replace {NUMBERS.name} and the page")
    arguments = parser.parse_args()
    numbers = computed(arguments.case)
    if arguments.json:
        print(json.dumps(numbers, indent=1))
    else:
        for found in numbers["published"]:
            print(f"{found['name']}, {found['gpu']}: computed {found['computed']}, published {found['published']}")
        for found in numbers["cases"]:
            print(line(found))
    if arguments.write:
        assert not arguments.case, "--write: the page holds all cases"
        from decode_cycles import decode_rows  # which computes with what is defined here

        numbers["decodes"] = decode_rows()
        NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")
        PAGE.write_text(make_page(numbers))


def computed(part: str) -> dict[str, Any]:
    """All public kernels and cases for sm_89 with this in their names, two at a time."""
    public = [index for index, figure in enumerate(PUBLISHED) if part in figure.case.kernel]
    wanted = [name for name, case in cases().items() if case.arch == 89 and part in name]
    with ProcessPoolExecutor(2) as pool:
        rows = [found for found in pool.map(case_row, wanted) if found is not None]
        return {"triton": triton.__version__, "published": list(pool.map(published_row, public)), "cases": rows}


if __name__ == "__main__":
    main()
