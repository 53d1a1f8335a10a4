"""Compiles cases and reads what they became: the rows of tests/data/machine_code/."""

import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import triton
from triton import knobs

from . import sass
from .case import Case, cases
from .compile import compile_case
from .gates import faults
from .occupancy import ctas_per_sm

PROCESSES = 2


@dataclass(frozen=True, slots=True)
class Compiled:
    """One case's machine code."""

    binary: Any  # what Triton returned
    code: list[sass.Instruction]
    usage: str  # cuobjdump's line of resources


def build(case: Case) -> Compiled:
    """Compile a case and disassemble it."""
    binary = compile_case(case)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name)
        code = _run(knobs.nvidia.nvdisasm.path, "-c", cubin.name)
    return Compiled(binary, sass.parse(code), usage)


def row(case: Case, compiled: Compiled) -> dict[str, Any]:
    """A case's row: resources, the widths of global accesses, and a summary of the main loop."""
    registers = _number(r"REG:(\d+)", compiled.usage)
    warps, shared = compiled.binary.metadata.num_warps, compiled.binary.metadata.shared
    return {
        "function": compiled.binary.metadata.name,
        "warps": warps,
        "registers": registers,
        "spilled_bytes": _number(r"STACK:(\d+)", compiled.usage),  # of local memory, where registers did not suffice
        "shared_bytes": shared,
        "ctas_per_sm": ctas_per_sm(arch=case.arch, registers=registers, warps=warps, shared=shared),
        **sass.access_widths(compiled.code),
        "loop": loop_row(sass.main_loop(compiled.code)),
    }


def loop_row(loop: list[sass.Instruction]) -> dict[str, Any]:
    """A loop as a table has it: its tensor instructions by name, and those beside them by family."""
    if not loop:
        return {}
    counts = sass.families(loop)
    return {
        "instructions": len(loop),
        "tensor": dict(sorted(sass.tensor_opcodes(loop).items())),
        "tensor_work": sass.tensor_work(loop),
        **{family: counts[family] for family in sass.SUMMED if counts[family]},
        **({"warpgroup_starts": starts} if (starts := sass.warpgroup_starts(loop)) else {}),
    }


def measure(families: list[str], wanted: list[str]) -> dict[str, Any]:
    """Rows of these cases, two at a time, each with its faults: {"triton": version, "cases": {name: row}}."""
    with ProcessPoolExecutor(PROCESSES) as pool:
        rows = dict(zip(wanted, pool.map(partial(_row_of, families), wanted), strict=True))
    return {"triton": triton.__version__, "cases": rows}


def _row_of(families: list[str], name: str) -> dict[str, Any]:
    case = cases(families)[name]
    found = row(case, build(case))
    return found | {"faults": faults(case, found)}


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in {text!r}"
    return int(found.group(1))
