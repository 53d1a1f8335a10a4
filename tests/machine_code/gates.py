"""Holds a row of machine code to its case's design."""

from collections.abc import Mapping
from typing import Any

from .case import Case
from .occupancy import MULTIPROCESSORS


def faults(case: Case, row: Mapping[str, Any]) -> list[str]:
    """What of this row is not as designed, in words; [] where all of it is."""
    design, limit = case.design, MULTIPROCESSORS[case.arch].shared_per_cta
    checks = [
        (
            row["spilled_bytes"] <= design.spilled_bytes,
            f"{row['spilled_bytes']} bytes of registers spilled, of {design.spilled_bytes}",
        ),
        (row["shared_bytes"] <= limit, f"{row['shared_bytes']} bytes of shared memory, of {limit}"),
        (row["ctas_per_sm"] >= design.ctas_per_sm, f"{row['ctas_per_sm']} CTAs per SM, not {design.ctas_per_sm}"),
        *(_widths(kind, row[kind], getattr(design, kind)) for kind in ("loads", "stores")),
        *_loop_checks(case, row["loop"]),
    ]
    return [fault for holds, fault in checks if not holds]


def _widths(kind: str, found: Mapping[str, int], designed: frozenset[str] | None) -> tuple[bool, str]:
    return designed is None or set(found) == designed, f"{kind} of {found}, not {sorted(designed or ())}"


def _loop_checks(case: Case, loop: Mapping[str, Any]) -> list[tuple[bool, str]]:
    design, tensor = case.design, loop.get("tensor", {})
    checks = [(set(tensor) == design.tensor, f"tensor instructions {tensor}, not {sorted(design.tensor)}")]
    if not tensor:
        return checks
    shuffles = loop.get("SHFL", 0)
    work = loop["tensor_work"]
    bytewise = loop.get("PRMT", 0) + loop.get("LOP3", 0)
    others = loop["instructions"] - sum(tensor.values())
    local = loop.get("LDL", 0) + loop.get("STL", 0)
    starts, instructions = loop.get("warpgroup_starts", 0), sum(tensor.values())
    return [
        *checks,
        (2 * starts <= instructions, f"{instructions} tensor instructions of a warpgroup in {starts} runs: serialised"),
        (local <= design.local, f"{local} accesses of local memory in the main loop, not {design.local}"),
        (bytewise <= design.byte_overhead * work, f"{bytewise} PRMT and LOP3 beside {work} tensor instructions"),
        (design.shuffles is None or shuffles <= design.shuffles, f"{shuffles} SHFL, not {design.shuffles}"),
        (
            design.overhead is None or others <= design.overhead * work,
            f"{others} other instructions beside {work} tensor instructions",
        ),
    ]
