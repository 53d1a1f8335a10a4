"""Weights stored as GGUF blocks: rounded to 8 bits for one linear, and multiplied as they are unpacked."""

from machine_code.case import Case, Design
from wanfast.kernels.linear_stored import TILE, UNPACKED_TOKENS, _linear_stored_kernel
from wanfast.kernels.quantize_rows import tile_of
from wanfast.kernels.requantize_gguf import KERNELS

ROW_BYTES = {"Q8_0": 5120 // 32 * 34, "Q4_K": 5120 // 256 * 144}


def _requantize(kind: str, arch: int) -> Case:
    tile = tile_of(5120)
    return Case(
        kernel="requantize_gguf",
        variant=kind,
        arch=arch,
        function=KERNELS[kind],
        arguments={
            "blocks_ptr": "u8",
            "halves_ptr": "fp16",
            "values_ptr": "i8",
            "scale_ptr": "fp32",
            "K": 5120,
            "ROTATED": True,
            "RUNS": tile["RUNS"],
        },
        num_warps=tile["num_warps"],
        design=Design(ctas_per_sm=2, stores=frozenset({"128 bit", "32 bit"})),
    )


def _linear(kind: str, arch: int) -> Case:
    return Case(
        kernel="linear_stored",
        variant=kind,
        arch=arch,
        function=_linear_stored_kernel,
        arguments={
            "x_ptr": "i8",
            "x_scale_ptr": "fp32",
            "blocks_ptr": "u8",
            "halves_ptr": "fp16",
            "bias_ptr": "bf16",
            "t_ptr": None,
            "up_ptr": None,
            "y_ptr": "bf16",
            "M": 512,
            "N": 5120,
            "K": 5120,
            "R": 0,
            "y_stride_m": 5120,
            "row_bytes": ROW_BYTES[kind],
            "GROUPED": False,
            "IS_Q4_K": kind == "Q4_K",
            "BLOCK_M": TILE["BLOCK_M"],
            "BLOCK_N": TILE["BLOCK_N"],
        },
        num_warps=TILE["num_warps"],
        num_stages=TILE["num_stages"],
        # Numbers of 4 bits and their scales are taken apart byte by byte: what few tokens can bear.
        design=Design(ctas_per_sm=3, tensor=frozenset({"IMMA.16832.S8.S8.SAT"}), byte_overhead=27.0),
        any_triton=arch == 89,
    )


CASES = [
    *(_requantize(kind, 89) for kind in KERNELS),
    *(_linear(kind, 89) for kind in UNPACKED_TOKENS),
    *(_requantize("Q4_K", arch) for arch in (90, 120)),
    _linear("Q4_K", 120),
]
