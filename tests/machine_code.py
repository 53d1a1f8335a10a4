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

from wanfast.kernels import _gguf_triton, layernorm, modulate, residual, rmsnorm
from wanfast.kernels._tiles import row_tile
from wanfast.kernels.dequantize_scaled import BLOCK_TILE, NUM_WARPS, WIDE_TILE, _dequantize_scaled_kernel

TABLE = Path(__file__).parent / "data" / "machine_code.json"

# Kernels over rows of channels: (the function, and the dtype behind each pointer as Wan's blocks call it)
ROW_KERNELS = {
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

GGUF = "dequantize_gguf"
GGUF_POINTERS = {"blocks_ptr": "u8", "halves_ptr": "fp16", "out_ptr": "bf16"}
GGUF_KINDS = {89: tuple(_gguf_triton.KERNELS), 90: ("Q8_0", "Q4_K", "Q6_K"), 120: ("Q8_0", "Q4_K", "Q6_K")}

SCALED = "dequantize_scaled"
SCALED_VALUES = {"int8": "i8", "fp8": "fp8e4nv"}
SCALED_TILES = {"row": WIDE_TILE, "block": BLOCK_TILE}
SCALED_VARIANTS = {89: ("int8-row", "fp8-row", "int8-block"), 90: ("fp8-row",), 120: ("fp8-row",)}

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", re.M)
_BITS = re.compile(r"\.(U8|U16|64|128)\b")
_ACCESS = {"LDG": "loads", "STG": "stores"}


@dataclass(frozen=True)
class Case:
    """One kernel, compiled for one width or kind of weight and one GPU generation."""

    kernel: str
    variant: str  # "C5120", "Q4_K"
    arch: int  # compute capability x 10

    @property
    def name(self) -> str:
        return f"{self.kernel}/{self.variant}/sm_{self.arch}"


CASES = [
    *(Case(kernel, f"C{channels}", arch) for kernel in ROW_KERNELS for arch in WIDTHS for channels in WIDTHS[arch]),
    *(Case(GGUF, kind, arch) for arch in GGUF_KINDS for kind in GGUF_KINDS[arch]),
    *(Case(SCALED, variant, arch) for arch in SCALED_VARIANTS for variant in SCALED_VARIANTS[arch]),
]


def _launch(case: Case) -> tuple[Any, dict[str, str], dict[str, int], int]:
    """A case's function, the dtypes behind its pointers, its constants and its warps."""
    if case.kernel == GGUF:
        function, constants = _gguf_triton.KERNELS[case.variant]
        return function, GGUF_POINTERS, constants, _gguf_triton.NUM_WARPS
    if case.kernel == SCALED:
        values, side = case.variant.split("-")
        pointers = {"values_ptr": SCALED_VALUES[values], "scale_ptr": "fp32", "y_ptr": "bf16"}
        strides = {"scale_stride_row": 1} if side == "row" else {"scale_stride_column": 1}  # Triton makes 1 a constant
        return _dequantize_scaled_kernel, pointers, SCALED_TILES[side] | strides, NUM_WARPS
    function, pointers = ROW_KERNELS[case.kernel]
    channels = int(case.variant[1:])
    tile = row_tile(channels)
    return function, pointers, {"C": channels, "HEAD": tile.head, "TAIL": tile.tail}, tile.num_warps


def compile_case(case: Case) -> Any:
    """Compile as a launch would: pointers and strides are multiples of 16, counts are not known to be."""
    function, pointers, constants, num_warps = _launch(case)
    signature: dict[str, str] = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{pointers[name]}"
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
    aligned = [
        index
        for index, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and (name.endswith("_ptr") or "_stride_" in name or name == "IN")
    ]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
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
