"""8-bit linears and the rounding of their inputs: every form on Ada, the tiles in use on Hopper and Blackwell too."""

from typing import Any

import torch

from machine_code.case import Case, Design
from wanfast.kernels._tiles_8bit import GENERATIONS
from wanfast.kernels.linear_8bit import _linear_8bit_kernel
from wanfast.kernels.linear_8bit_gelu import _linear_8bit_gelu_kernel
from wanfast.kernels.linear_8bit_residual import _linear_8bit_residual_kernel
from wanfast.kernels.quantize_rows import _quantize_rows_kernel, tile_of

TOKENS = 32_760  # 480 x 832, 81 frames
DTYPES = {"int8": ("i8", torch.int8), "e4m3": ("fp8e4nv", torch.float8_e4m3fn)}
LOW_RANK = {"t_ptr": "bf16", "up_ptr": "bf16", "R": 32}
NO_LOW_RANK = {"t_ptr": None, "up_ptr": None, "R": 0}

# What Wan's 14B blocks launch: q, k and v; the first and the second linear of a feed-forward block.
FORMS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "linear_8bit": (
        _linear_8bit_kernel,
        "bias",
        {"y_ptr": "bf16", "M": TOKENS, "N": 15360, "K": 5120, "y_stride_m": 15360},
    ),
    "linear_8bit_gelu": (
        _linear_8bit_gelu_kernel,
        "gelu",
        {"scale_ptr": "fp32", "M": TOKENS, "N": 13824, "K": 5120, "ROTATED": True},
    ),
    "linear_8bit_residual": (
        _linear_8bit_residual_kernel,
        "residual",
        {
            "residual_ptr": "fp32",
            "gate_ptr": "fp32",
            "T": TOKENS,
            "N": 5120,
            "K": 13824,
            "first_tokens": 0,
            "gate_stride_b": 6 * 5120,
            "gate_stride_r": 0,
        },
    ),
}

TENSOR = {
    (89, "int8"): "IMMA.16832.S8.S8.SAT",
    (89, "e4m3"): "QMMA.16832.F16.E4M3.E4M3",
    (120, "int8"): "IMMA.16832.S8.S8.SAT",
    (120, "e4m3"): "QMMA.16832.F32.E4M3.E4M3",
    (90, "int8"): "IGMMA.64x128x32.S8.S8",
    (90, "e4m3"): "QGMMA.64x128x32.F32.E4M3.E4M3",
}
SPILLED = {"bias": 64, "gelu": 128, "residual": 320}  # bytes of a thread; Triton 3.9 needs most
WIDE = "QGMMA.64x256x32.F32.E4M3.E4M3"  # Hopper's e4m3 products take all columns of its widest tile at once


def _linear(kernel: str, dtype: str, arch: int, *, grouped: bool = False, low_rank: bool = False) -> Case:
    function, epilogue, launched = FORMS[kernel]
    triton_dtype, torch_dtype = DTYPES[dtype]
    generation = GENERATIONS[arch]
    tile = generation.tile(torch_dtype, epilogue, grouped=grouped, low_rank=low_rank)
    tensor = WIDE if (arch, dtype, tile.columns) == (90, "e4m3", 256) else TENSOR[arch, dtype]
    values = {"values_ptr": triton_dtype} if epilogue == "gelu" else {}
    return Case(
        kernel=kernel,
        variant=f"{dtype}-{'group' if grouped else 'token'}{'-low_rank' if low_rank else ''}",
        arch=arch,
        function=function,
        arguments={
            "x_ptr": triton_dtype,
            "w_ptr": triton_dtype,
            "x_scale_ptr": "fp32",
            "w_scale_ptr": "fp32",
            "bias_ptr": "bf16",
            "GROUPED": grouped,
            "FP16_SUMS": generation.fp16_sums and dtype == "e4m3",
            **(LOW_RANK if low_rank else NO_LOW_RANK),
            **launched,
            **values,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.columns,
            "BLOCK_K": tile.depth,
            "SPLIT": tile.split,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        # Two accumulators and an epilogue are more than 255 registers: what is spilled around the loop costs nothing,
        # and of the loop's six hundred instructions eight may fetch an address.
        design=Design(
            ctas_per_sm=2 if tile.num_warps == 4 else 1,
            tensor=frozenset({tensor}),
            shuffles=0,
            overhead=6.0,
            spilled_bytes=SPILLED[epilogue] if arch != 90 else 0,
            local=8 if grouped else 0,
        ),
        any_triton=arch == 89 and not low_rank,
    )


def _rows(dtype: str, arch: int, *, grouped: bool, rotated: bool) -> Case:
    tile = tile_of(5120)
    return Case(
        kernel="quantize_rows",
        variant=f"{dtype}-{'group' if grouped else 'token'}{'-rotated' if rotated else ''}",
        arch=arch,
        function=_quantize_rows_kernel,
        arguments={
            "x_ptr": "bf16",
            "values_ptr": DTYPES[dtype][0],
            "scale_ptr": "fp32",
            "C": 5120,
            "GROUPED": grouped,
            "ROTATED": rotated,
            "RUNS": tile["RUNS"],
        },
        num_warps=tile["num_warps"],
        design=Design(
            ctas_per_sm=3,
            loads=frozenset({"128 bit"}),
            stores=frozenset({"128 bit", "32 bit"}),
        ),
    )


CASES = [
    *(_linear(kernel, dtype, 89, grouped=False) for kernel in FORMS for dtype in DTYPES),
    *(_linear("linear_8bit_residual", dtype, 89, grouped=True) for dtype in DTYPES),
    *(_linear(kernel, "int8", 89, low_rank=True) for kernel in ("linear_8bit", "linear_8bit_gelu")),
    _linear("linear_8bit_residual", "int8", 89, grouped=True, low_rank=True),
    *(_linear("linear_8bit", dtype, arch) for arch in (90, 120) for dtype in DTYPES),
    *(_linear("linear_8bit_gelu", dtype, arch) for arch in (90, 120) for dtype in DTYPES),
    *(_linear("linear_8bit_residual", dtype, arch, grouped=True) for arch in (90, 120) for dtype in DTYPES),
    *(_rows(dtype, 89, grouped=False, rotated=rotated) for dtype in DTYPES for rotated in (False, True)),
    _rows("int8", 89, grouped=True, rotated=True),
    *(_rows("int8", arch, grouped=False, rotated=True) for arch in (90, 120)),
]
