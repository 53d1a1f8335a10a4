"""8-bit attention: every tile with each output, lists, and the kernels that prepare its operands.

Four warps of 64 queries and 255 registers a lane let two programs share a multiprocessor on Ada: that is what hides
one's exponentials behind the other's products. Weights go from scores into the next product without a shuffle: the SHFL
that remain are two for a row's largest score and two for its sum.
"""

from dataclasses import replace

import torch

from machine_code.case import Case, Design
from wanfast.kernels._attention_int8_tiles import TILES, Tile
from wanfast.kernels.attention_int8 import _attention_int8_kernel, constants
from wanfast.kernels.channel_range import CHUNK, _channel_range_kernel
from wanfast.kernels.channel_range import ROWS as RANGE_ROWS
from wanfast.kernels.quantize_keys import KEY_BLOCK, _quantize_keys_kernel
from wanfast.kernels.quantize_queries import ROWS as QUERY_ROWS
from wanfast.kernels.quantize_queries import _quantize_queries_kernel
from wanfast.kernels.quantize_values import BLOCK, _quantize_values_kernel

E4M3, FP16 = torch.float8_e4m3fn, torch.float16
NAMES = {E4M3: "fp8e4nv", FP16: "fp16"}
TOKENS, HEADS = 32_760, 40  # 480p

SCORES = {89: "IMMA.16832.S8.S8.SAT", 120: "IMMA.16832.S8.S8.SAT", 90: "IGMMA.64x64x32.S8.S8"}
VALUES = {
    (89, E4M3): "QMMA.16832.F16.E4M3.E4M3",
    (120, E4M3): "QMMA.16832.F16.E4M3.E4M3",
    (89, FP16): "HMMA.16816.F16",
    (120, FP16): "HMMA.16816.F16",
}


# Instructions beside each tensor instruction. One of m16n8k32 or m16n8k16 takes 16 cycles of a quarter of Ada's
# multiprocessor, which issues an instruction a cycle for two warps: 6 beside it leave most of the time to it.
OVERHEAD = {(E4M3, 128): 6.0, (E4M3, 64): 10.0, (FP16, 128): 5.0, (FP16, 64): 7.55}


def _values(arch: int, dtype: torch.dtype, dim: int) -> str:
    if arch != 90:
        return VALUES[arch, dtype]
    return f"QGMMA.64x{dim}x32.F32.E4M3.E4M3" if dtype == E4M3 else f"HGMMA.64x{dim}x16.F16"


def _design(tile: Tile, arch: int, dtype: torch.dtype, dim: int, out: str) -> Design:
    rows_of_a_lane = tile.rows // tile.num_warps // 8
    return Design(
        ctas_per_sm=1 if arch == 90 and dim == 128 else 2,
        tensor=frozenset({SCORES[arch], _values(arch, dtype, dim)}),
        shuffles=rows_of_a_lane * 4 * (tile.flush // 64),
        overhead=OVERHEAD[dtype, dim],
        stores=frozenset({"128 bit"} if out == "bf16" else {"32 bit", "128 bit"}),
    )


def _attention(arch: int, dtype: torch.dtype, dim: int, *, out: str = "bf16", listed: bool = False) -> Case:
    tile = TILES[arch, dtype, dim]
    eight_bit = out != "bf16"
    return Case(
        kernel="attention_int8",
        variant=f"D{dim}-{NAMES[dtype]}-{out}{'-rotated' if out == 'i8' else ''}{'-listed' if listed else ''}",
        arch=arch,
        function=_attention_int8_kernel,
        arguments={
            "q_ptr": "i8",
            "q_scale_ptr": "fp32",
            "k_ptr": "i8",
            "k_scale_ptr": "fp32",
            "v_ptr": NAMES[dtype],
            "v_scale_ptr": "fp32",
            "v_mean_ptr": "fp32",
            "columns_ptr": "i32" if listed else None,
            "counts_ptr": "i32" if listed else None,
            "out_ptr": out,
            "out_scale_ptr": "fp32" if eight_bit else None,
            "T": TOKENS,
            "S": TOKENS,
            "N": HEADS,
            "M": 200 if listed else 1,
            **constants(tile, dtype, dim, listed=listed, rotated=out == "i8"),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        design=_design(tile, arch, dtype, dim, out),
        any_triton=arch == 89 and not listed and not eight_bit,
    )


def _strided(name: str) -> dict[str, int]:
    """Strides of [B, T, N, D] of 14B as a projection writes it."""
    return {f"{name}_stride_b": TOKENS * 5120, f"{name}_stride_t": 5120, f"{name}_stride_n": 128}


# Tokens in 16 bytes, and 4 for a mean, a scale or an extreme of a channel, of which a program has few.
TOKENS_WIDE = Design(ctas_per_sm=4, loads=frozenset({"128 bit", "32 bit"}), stores=frozenset({"128 bit", "32 bit"}))
VALUES_WIDE = replace(TOKENS_WIDE, stores=frozenset({"128 bit"}))
ONLY_TOKENS = replace(TOKENS_WIDE, loads=frozenset({"128 bit"}))
EXTREMES = replace(ONLY_TOKENS, stores=frozenset({"32 bit"}))


def _prepare(arch: int) -> list[Case]:
    queries = {"q_ptr": "bf16", "values_ptr": "i8", "scale_ptr": "fp32", "rows": TOKENS * HEADS, "N": HEADS}
    keys = {"k_ptr": "bf16", "mean_ptr": "fp32", "values_ptr": "i8", "scale_ptr": "fp32", "T": TOKENS, "N": HEADS}
    values = {"v_ptr": "bf16", "mean_ptr": "fp32", "inverse_ptr": "fp32", "T": TOKENS, "N": HEADS}
    extremes = {"x_ptr": "bf16", "partial_ptr": "fp32", "T": TOKENS, "N": HEADS, "CHUNK": CHUNK, "ROWS": RANGE_ROWS}
    size = {"D": 128}
    return [
        Case(
            "quantize_queries",
            "D128",
            arch,
            _quantize_queries_kernel,
            queries | _strided("q") | size | {"factor": 0.1275, "ROWS": QUERY_ROWS},
            4,
            design=ONLY_TOKENS,
        ),
        Case(
            "quantize_keys",
            "D128",
            arch,
            _quantize_keys_kernel,
            keys | _strided("k") | size | {"KEY_BLOCK": KEY_BLOCK},
            4,
            design=TOKENS_WIDE,
        ),
        *(
            Case(
                "quantize_values",
                f"D128-{NAMES[dtype]}",
                arch,
                _quantize_values_kernel,
                values | _strided("v") | size | {"values_ptr": NAMES[dtype], "BLOCK": BLOCK},
                4,
                design=VALUES_WIDE,
            )
            for dtype in NAMES
        ),
        Case("channel_range", "D128", arch, _channel_range_kernel, extremes | _strided("x") | size, 4, design=EXTREMES),
    ]


CASES = [
    *(_attention(89, dtype, dim) for dtype in NAMES for dim in (128, 64)),
    _attention(89, E4M3, 128, listed=True),
    _attention(89, E4M3, 128, out="i8"),
    _attention(89, E4M3, 128, out="fp8e4nv"),
    *(_attention(90, dtype, dim) for dtype in NAMES for dim in (128, 64)),
    _attention(90, E4M3, 128, out="fp8e4nv"),
    *(_attention(120, dtype, 128) for dtype in NAMES),
    *_prepare(89),
    *_prepare(90),
]
