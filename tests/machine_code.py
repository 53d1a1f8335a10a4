"""What every kernel compiles to on each GPU generation, read from the machine code; no GPU is needed.

    python tests/machine_code.py           print the table as JSON
    python tests/machine_code.py --write   replace tests/data/machine_code.json by it

Triton compiles either for its interpreter or for a GPU in one process, so tests run this as a process of its own,
without TRITON_INTERPRET.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from wanfast.kernels import layernorm, modulate, residual, rmsnorm
from wanfast.kernels._tiles import row_tile

TABLE = Path(__file__).parent / "data" / "machine_code.json"

# kernel: (its function, and the dtype behind each pointer as Wan's blocks call it)
KERNELS = {
    "rms_norm": (rmsnorm._rms_norm_kernel, {"x_ptr": "bf16", "weight_ptr": "bf16", "y_ptr": "bf16"}),
    "layer_norm": (
        layernorm._layer_norm_kernel,
        {"x_ptr": "fp32", "weight_ptr": "fp32", "bias_ptr": "fp32", "y_ptr": "bf16"},
    ),
    "layer_norm_modulate": (
        modulate._layer_norm_modulate_kernel,
        {"x_ptr": "fp32", "scale_ptr": "fp32", "shift_ptr": "fp32", "y_ptr": "bf16"},
    ),
    "gated_residual": (
        residual._gated_residual_kernel,
        {"x_ptr": "fp32", "y_ptr": "bf16", "gate_ptr": "fp32", "out_ptr": "fp32"},
    ),
}

# Every tile once on Ada (sm_89, RTX 4090), Wan's largest width on Hopper (sm_90) and consumer Blackwell (sm_120) too.
WIDTHS = {89: (512, 1536, 3072, 5120, 8192), 90: (5120,), 120: (5120,)}

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", re.M)
_BITS = re.compile(r"\.(U8|U16|64|128)\b")
_ACCESS = {"LDG": "loads", "STG": "stores"}


@dataclass(frozen=True)
class Case:
    """One kernel, compiled for one width and one GPU generation."""

    kernel: str
    channels: int
    arch: int  # compute capability x 10

    @property
    def name(self) -> str:
        return f"{self.kernel}/C{self.channels}/sm_{self.arch}"


CASES = [Case(kernel, channels, arch) for kernel in KERNELS for arch in WIDTHS for channels in WIDTHS[arch]]


def compile_case(case: Case) -> Any:
    """Compile as a launch would: pointers and strides are multiples of 16, token counts are not known to be."""
    kernel, dtypes = KERNELS[case.kernel]
    tile = row_tile(case.channels)
    constants = {"C": case.channels, "HEAD": tile.head, "TAIL": tile.tail}
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtypes[name]}"
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
    aligned = [i for i, name in enumerate(signature) if name.endswith("_ptr") or "_stride_" in name]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": tile.num_warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)


def inspect(case: Case) -> dict[str, Any]:
    """Registers, spills, shared memory and the widths of global accesses of one case."""
    compiled = compile_case(case)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name)
        code = _run(knobs.nvidia.nvdisasm.path, "-c", cubin.name)
    opcodes = Counter(_INSTRUCTION.findall(code))
    widths: dict[str, Counter[str]] = {"loads": Counter(), "stores": Counter()}
    for opcode, count in opcodes.items():
        if kind := _ACCESS.get(opcode.split(".")[0]):
            widths[kind][_width(opcode)] += count
    return {
        "function": compiled.metadata.name,
        "warps": compiled.metadata.num_warps,
        "registers": _number(r"REG:(\d+)", usage),
        "spilled_bytes": _number(r"STACK:(\d+)", usage),  # of local memory, where registers did not suffice
        "shared_bytes": compiled.metadata.shared,
        **{kind: dict(sorted(counts.items())) for kind, counts in widths.items()},
    }


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in {text!r}"
    return int(found.group(1))


def _width(opcode: str) -> str:
    found = _BITS.search(opcode)
    return f"{found.group(1).removeprefix('U') if found else 32} bit"


def measure() -> dict[str, Any]:
    """The whole table, two cases at a time."""
    with ProcessPoolExecutor(2) as pool:
        rows = dict(zip((case.name for case in CASES), pool.map(inspect, CASES), strict=True))
    return {"triton": triton.__version__, "cases": rows}


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    table = json.dumps(measure(), indent=1)
    if parser.parse_args().write:
        TABLE.write_text(table + "\n")
    else:
        print(table)


if __name__ == "__main__":
    main()
