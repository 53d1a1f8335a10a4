"""Reads machine code: its instructions, its loops, and what is counted in them. Knows nothing of Triton."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_LINE = re.compile(
    r"^\s*(?:(?P<label>\.L\w+):|/\*(?P<at>[0-9a-f]+)\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<rest>\S.*?)\s*;)"
)
_BRANCH = re.compile(r"`\((\.L\w+)\)")
_TENSOR = re.compile(r"^[A-Z]*MMA\.")  # IMMA, HMMA, QMMA; IGMMA, HGMMA, QGMMA; not UTCMMA, which no target here has
_WARPGROUP = re.compile(r"^[A-Z]GMMA\.64x(\d+)x")
_BITS = re.compile(r"\.(U8|S8|U16|S16|64|128)\b")
_ACCESS = {"LDG": "loads", "LDGSTS": "loads", "STG": "stores"}

# The families of instructions that a loop is summed up by, next to its tensor instructions.
SUMMED = ("PRMT", "LOP3", "SHFL", "LDSM", "LDS", "STS", "LDGSTS", "LDG", "MUFU", "BAR", "LDL", "STL")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a kernel."""

    at: int  # bytes from the start of the function
    opcode: str  # with its modifiers: "LDSM.16.M88.4"
    text: str  # opcode and operands
    labels: tuple[str, ...]  # that stand before it

    @property
    def family(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def is_tensor(self) -> bool:
        return bool(_TENSOR.match(self.opcode))

    @property
    def warp_instructions(self) -> int:
        """How many 16 x 8 tensor instructions of a warp it does the work of: 1, or N / 8 for 64 x N of a warpgroup."""
        wide = _WARPGROUP.match(self.opcode)
        return int(wide.group(1)) // 8 if wide else 1


def parse(disassembly: str) -> list[Instruction]:
    """The instructions of the one function that `nvdisasm -c` printed."""
    found: list[Instruction] = []
    labels: list[str] = []
    for line in disassembly.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        if match["label"]:
            labels.append(match["label"])
        else:
            opcode = match["rest"].split()[0]
            found.append(Instruction(int(match["at"], 16), opcode, match["rest"], tuple(labels)))
            labels = []
    return found


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Every loop: from a label to the last branch back to it."""
    starts = {label: index for index, one in enumerate(code) for label in one.labels}
    ends: dict[int, int] = {}
    for index, one in enumerate(code):
        target = _BRANCH.search(one.text) if one.family == "BRA" else None
        start = starts.get(target.group(1)) if target else None
        if start is not None and start < index:
            ends[start] = max(index, ends.get(start, index))
    return [code[start : end + 1] for start, end in sorted(ends.items())]


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop with most tensor work, or where there is none with most instructions; [] without loops."""
    found = loops(code)
    busy = [loop for loop in found if tensor_work(loop)]
    inner = [loop for loop in busy if not any(_holds(loop, other) for other in busy)]
    return max(inner, key=tensor_work, default=[]) or max(found, key=len, default=[])


def _holds(loop: list[Instruction], other: list[Instruction]) -> bool:
    return loop is not other and loop[0].at <= other[0].at and other[-1].at <= loop[-1].at


def tensor_work(code: Iterable[Instruction]) -> int:
    """Tensor instructions, those of a warpgroup counted as what each of its warps does."""
    return sum(one.warp_instructions for one in code if one.is_tensor)


def families(code: Iterable[Instruction]) -> Counter[str]:
    """How many instructions of each family: {"FFMA": 64, "LDSM": 8}."""
    return Counter(one.family for one in code)


def tensor_opcodes(code: Iterable[Instruction]) -> Counter[str]:
    """The tensor instructions by their exact names."""
    return Counter(one.opcode for one in code if one.is_tensor)


def warpgroup_starts(code: Iterable[Instruction]) -> int:
    """How often a warpgroup starts tensor instructions: once per product, or once for each where ptxas serialises."""
    return sum(one.opcode == "WARPGROUP.ARRIVE" for one in code)


def access_widths(code: Iterable[Instruction]) -> dict[str, dict[str, int]]:
    """How wide global loads and stores are: {"loads": {"128 bit": 4}, "stores": {"32 bit": 1}}."""
    widths: dict[str, Counter[str]] = {"loads": Counter(), "stores": Counter()}
    for one in code:
        if kind := _ACCESS.get(one.family):
            bits = _BITS.search(one.opcode)
            widths[kind][f"{bits.group(1).lstrip('US') if bits else 32} bit"] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in widths.items()}
