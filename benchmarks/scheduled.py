"""The compiler's own schedule: what the control bits of each sm_8x and sm_12x instruction say of when it may issue.

NVIDIA's hardware does not look for dependences; ptxas writes into each instruction how many cycles its warp waits after
it and, where a latency is not fixed, which of six scoreboards it sets and which it waits for.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass

from machine_code import sass
from triton import knobs

_ENCODED = re.compile(r"/\*([0-9a-f]{4,})\*/[^\n]*?/\* 0x[0-9a-f]{16} \*/\s*\n\s*/\* 0x([0-9a-f]{16}) \*/")
_NO_SCOREBOARD = 7


@dataclass(frozen=True, slots=True)
class Control:
    """When an instruction may issue, and when the next one of its warp may."""

    stall: int  # cycles until the warp's next instruction
    writes: int | None  # the scoreboard that is held until the result is there
    reads: int | None  # the scoreboard that is held until the operands have been read
    waits: tuple[int, ...]  # scoreboards that must be free


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction of a loop with its schedule."""

    instruction: sass.Instruction
    control: Control


def schedule(cubin: bytes, loop: list[sass.Instruction]) -> list[Step]:
    """Join a loop's instructions with their control bits."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", "-hex", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    controls = {int(at, 16): decode(int(high, 16)) for at, high in _ENCODED.findall(text)}
    return [Step(one, controls[one.at]) for one in loop]


def decode(high: int) -> Control:
    """Read the control bits from the upper 64 of an instruction's 128 bits."""
    bits = high >> 41
    writes, reads, waits = bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63
    return Control(
        stall=bits & 15,
        writes=None if writes == _NO_SCOREBOARD else writes,
        reads=None if reads == _NO_SCOREBOARD else reads,
        waits=tuple(index for index in range(6) if waits >> index & 1),
    )
