"""A case: one kernel with the arguments of one launch, a GPU generation, and what it is designed to compile to."""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FAMILIES = tuple(sorted(path.stem for path in (Path(__file__).parent / "cases").glob("[a-z]*.py")))


@dataclass(frozen=True, slots=True)
class Design:
    """What a case must compile to; each is checked by gates.py."""

    ctas_per_sm: int = 1  # at least
    tensor: frozenset[str] = frozenset()  # exactly the tensor instructions of the main loop: {"IMMA.16832.S8.S8.SAT"}
    shuffles: int | None = None  # SHFL in the main loop, at most
    byte_overhead: float = 0.10  # PRMT and LOP3 in the main loop, at most, for each tensor instruction
    overhead: float | None = None  # all other instructions of the main loop, at most, for each tensor instruction
    spilled_bytes: int = 0  # of a thread's registers, at most
    local: int = 0  # LDL and STL in the main loop, at most: what of the spilled is needed there
    loads: frozenset[str] | None = None  # widths of all global loads, cp.async's too: {"128 bit", "32 bit"}
    stores: frozenset[str] | None = None  # widths of all global stores


@dataclass(frozen=True, slots=True)
class Case:
    """One launch of a kernel: `arguments` are specialised as Triton would at that launch."""

    kernel: str  # the operation, as wanfast.kernels names it: "rms_norm"
    variant: str  # "C5120", "D128-bf16"
    arch: int  # compute capability x 10
    function: Any  # decorated by @triton.jit
    arguments: Mapping[str, Any]  # a pointer's value is the dtype behind it ("bf16", "i8"); all others as launched
    num_warps: int
    num_stages: int = 3
    maxnreg: int | None = None
    design: Design = field(default_factory=Design)
    any_triton: bool = False  # held to its design under Triton 3.6 and 3.9 too

    @property
    def name(self) -> str:
        return f"{self.kernel}/{self.variant}/sm_{self.arch}"


def cases(families: Iterable[str] = FAMILIES) -> dict[str, Case]:
    """The cases of these families by name, in the order of their files."""
    found: dict[str, Case] = {}
    for family in families:
        for case in importlib.import_module(f"machine_code.cases.{family}").CASES:
            assert case.name not in found, f"{family}: {case.name} is there twice"
            found[case.name] = case
    return found
