"""The kernel that expands 8-bit weights: both tiles on Ada, fp8 on Hopper and consumer Blackwell too."""

from machine_code.case import Case, Design
from wanfast.kernels.dequantize_scaled import BLOCK_TILE, NUM_WARPS, WIDE_TILE, _dequantize_scaled_kernel

VALUES = {"int8": "i8", "fp8": "fp8e4nv"}
SCALES = {  # the tile, and strides as the wrapper gives them for a weight [5120, 13824]
    "row": (WIDE_TILE, {"scale_stride_row": 1, "scale_stride_column": 0}),
    "block": (BLOCK_TILE, {"scale_stride_row": 13824 // 128, "scale_stride_column": 1}),
}
VARIANTS = {89: ("int8-row", "fp8-row", "int8-block"), 90: ("fp8-row",), 120: ("fp8-row",)}


def _case(variant: str, arch: int) -> Case:
    values, scales = variant.split("-")
    tile, strides = SCALES[scales]
    tensors = {"values_ptr": VALUES[values], "scale_ptr": "fp32", "y_ptr": "bf16"}
    return Case(
        kernel="dequantize_scaled",
        variant=variant,
        arch=arch,
        function=_dequantize_scaled_kernel,
        arguments=tensors | {"OUT": 5120, "IN": 13824} | strides | tile,
        num_warps=NUM_WARPS,
        # the weights, and a scale for each row
        design=Design(loads=frozenset({"128 bit", "32 bit"}), stores=frozenset({"128 bit"})),
    )


CASES = [_case(variant, arch) for arch, variants in VARIANTS.items() for variant in variants]
