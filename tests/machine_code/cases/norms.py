"""Fused norms and the element-wise step: Wan's widths on Ada, the larger on Hopper and consumer Blackwell too."""

from typing import Any

from machine_code.case import Case, Design
from wanfast.kernels._row_norm import GATED, NOTHING, UNGATED
from wanfast.kernels._tiles import row_tile
from wanfast.kernels.guided_update import BLOCK, NUM_WARPS, _guided_update_kernel
from wanfast.kernels.layer_norm_quantize import _layer_norm_quantize_kernel
from wanfast.kernels.layer_norm_rotate import _layer_norm_rotate_kernel, rotated_tile
from wanfast.kernels.residual_norm import _residual_norm_kernel
from wanfast.kernels.rms_norm_rope import _rms_norm_rope_kernel
from wanfast.kernels.rms_norm_rope_quantize import _rms_norm_rope_quantize_kernel
from wanfast.kernels.rms_norm_rope_quantize_keys import (
    GROUP_TOKENS,
    _rms_norm_rope_quantize_keys_kernel,
    heads_at_once,
    num_warps,
)
from wanfast.kernels.rms_norm_silu import _rms_norm_silu_kernel, pixel_tile

TOKENS = 32_760  # 480 x 832, 81 frames
WIDTHS = {89: (3072, 5120), 90: (5120,), 120: (5120,)}
HEAD_DIM = 128
WIDE = frozenset({"128 bit"})
HALF_WIDE = frozenset({"128 bit", "64 bit"})  # a thread has 8 channels of the tail: 8 bytes once they are 8-bit


def _parts(channels: int) -> tuple[dict[str, int], int]:
    tile = row_tile(channels)
    return {"C": channels, "HEAD": tile.head, "TAIL": tile.tail}, tile.num_warps


def _rope(channels: int, arch: int) -> list[Case]:
    """Queries or keys cut from a projection to queries, keys and values together."""
    token = 3 * channels
    launched = {"x_ptr": "bf16", "weight_ptr": "fp32", "rotations_ptr": "fp32", "T": TOKENS, "eps": 1e-6, "D": HEAD_DIM}
    launched |= {"x_stride_b": TOKENS * token, "x_stride_t": token}
    constants, warps = _parts(channels)
    out = {"stride_b": TOKENS * channels, "stride_t": channels}
    plain = launched | constants | {"y_ptr": "bf16", **{f"y_{name}": stride for name, stride in out.items()}}
    queries = launched | constants | {"values_ptr": "i8", "scale_ptr": "fp32", "factor": 0.1275}
    queries |= {f"values_{name}": stride for name, stride in out.items()}
    queries |= {f"scale_{name}": stride // HEAD_DIM for name, stride in out.items()}
    turn = heads_at_once(channels // HEAD_DIM)
    keys = launched | {"mean_ptr": "fp32", "values_ptr": "i8", "scale_ptr": "fp32", "x_stride_t": 2 * channels}
    keys |= {"first_block": 32, "blocks": 512, "N": channels // HEAD_DIM, "HEADS": turn, "TOKENS": GROUP_TOKENS}
    return [
        Case(
            kernel="rms_norm_rope_quantize_keys",
            variant=f"C{channels}",
            arch=arch,
            function=_rms_norm_rope_quantize_keys_kernel,
            arguments=keys,
            num_warps=num_warps(turn * HEAD_DIM),
            design=Design(ctas_per_sm=2, loads=HALF_WIDE, stores=WIDE | {"32 bit"}),  # 64: weight and mean; 32: scales
        ),
        Case(
            kernel="rms_norm_rope",
            variant=f"C{channels}",
            arch=arch,
            function=_rms_norm_rope_kernel,
            arguments=plain,
            num_warps=warps,
            design=Design(ctas_per_sm=4, loads=WIDE, stores=WIDE),
        ),
        Case(
            kernel="rms_norm_rope_quantize",
            variant=f"C{channels}",
            arch=arch,
            function=_rms_norm_rope_quantize_kernel,
            arguments=queries,
            num_warps=warps,
            design=Design(ctas_per_sm=4, loads=WIDE, stores=HALF_WIDE | {"32 bit"}),  # 32: a scale for each head
        ),
    ]


def _norm_arguments(channels: int, added: int, *, learned: bool) -> dict[str, Any]:
    """Of a stream in fp32, what a block computed in bf16, and rows of 6 modulations."""
    strides = {f"{name}_stride_b": 0 if learned and name != "gate" else 6 * channels for name in _ROWS}
    strides |= {f"{name}_stride_r": 0 for name in _ROWS}
    counts = {"T": TOKENS, "first_tokens": 0, "eps": 1e-6, "ADDED": added, "OFFSET": 0.0 if learned else 1.0}
    return {"x_ptr": "fp32", "y_ptr": "bf16", **{f"{name}_ptr": "fp32" for name in _ROWS}, **strides, **counts}


_ROWS = ("gate", "scale", "shift")
_FORMS = {  # what is added, whether the weights are learned
    "modulate": (NOTHING, False),
    "residual-modulate": (UNGATED, False),
    "gated-modulate": (GATED, False),
    "gated-affine": (GATED, True),
}


def _norm(form: str, channels: int, arch: int, values: str) -> list[Case]:
    added, learned = _FORMS[form]
    launched = _norm_arguments(channels, added, learned=learned)
    eight_bit = {"values_ptr": values, "values_scale_ptr": "fp32"}
    constants, warps = _parts(channels)
    tile = rotated_tile(channels)
    found = [
        Case(
            kernel="layer_norm_quantize",
            variant=f"C{channels}-{form}-{values}",
            arch=arch,
            function=_layer_norm_quantize_kernel,
            arguments=launched | eight_bit | constants,
            num_warps=warps,
            design=Design(ctas_per_sm=4, loads=WIDE, stores=HALF_WIDE | {"32 bit"}),  # 32: the token's scale
        ),
        Case(
            kernel="layer_norm_rotate",
            variant=f"C{channels}-{form}-{values}",
            arch=arch,
            function=_layer_norm_rotate_kernel,
            arguments=launched | eight_bit | {"C": channels, "RUNS": tile["RUNS"]},
            num_warps=tile["num_warps"],
            design=Design(loads=WIDE, stores=frozenset({"128 bit", "32 bit"})),
        ),
    ]
    if added != NOTHING:
        found.append(
            Case(
                kernel="residual_norm",
                variant=f"C{channels}-{form}",
                arch=arch,
                function=_residual_norm_kernel,
                arguments=launched | {"out_ptr": "bf16"} | constants,
                num_warps=warps,
                design=Design(ctas_per_sm=4, loads=WIDE, stores=WIDE),
            )
        )
    return found


def _silu(channels: int, arch: int, dtype: str, *, channels_last: bool) -> Case:
    pixels = 4 * 480 * 832
    tile = pixel_tile(channels, channels_last=channels_last)
    side = (channels * pixels, 1, channels) if channels_last else (channels * pixels, pixels, 1)
    strides = {f"{name}_stride_{axis}": side[i] for name in "xy" for i, axis in enumerate("bcp")}
    return Case(
        kernel="rms_norm_silu",
        variant=f"C{channels}-{dtype}-{'last' if channels_last else 'first'}",
        arch=arch,
        function=_rms_norm_silu_kernel,
        arguments={"x_ptr": dtype, "weight_ptr": dtype, "y_ptr": dtype, "P": pixels, "C": channels, **strides}
        | {name: value for name, value in tile.items() if name != "num_warps"},
        num_warps=tile["num_warps"],
        design=Design(ctas_per_sm=2, stores=WIDE),  # loads: the weights come in any width
    )


def _update(arch: int, past: int, *, corrected: bool) -> Case:
    function = _guided_update_kernel
    pointers = {name: "fp32" for name in function.arg_names if name.endswith("_ptr")}
    weights = {
        name: 0.5 for name in function.arg_names if name.startswith(("k_", "u_")) or name in ("guidance", "sigma")
    }
    constants = {"GUIDED": True, "PAST": past, "CORRECTED": corrected, "BLOCK": BLOCK}
    return Case(
        kernel="guided_update",
        variant=f"past{past}" + ("-corrected" if corrected else ""),
        arch=arch,
        function=function,
        arguments=pointers | weights | constants | {"E": 16 * 21 * 60 * 104},
        num_warps=NUM_WARPS,
        design=Design(ctas_per_sm=4, loads=WIDE, stores=WIDE),
    )


CASES = [
    *(case for arch in WIDTHS for channels in WIDTHS[arch] for case in _rope(channels, arch)),
    *(case for form in _FORMS for case in _norm(form, 5120, 89, "i8")),
    *(case for form in ("modulate", "gated-modulate") for case in _norm(form, 3072, 89, "i8")),
    *(case for arch in (90, 120) for case in _norm("gated-modulate", 5120, arch, "fp8e4nv")),
    *(_silu(channels, 89, "bf16", channels_last=True) for channels in (96, 192, 384, 640, 1024)),
    *(_silu(96, arch, "fp32", channels_last=True) for arch in (89, 90, 120)),
    *(_silu(channels, 89, "bf16", channels_last=False) for channels in (96, 384, 1024)),
    _update(89, 0, corrected=False),
    *(_update(arch, 3, corrected=True) for arch in (89, 90, 120)),
]
