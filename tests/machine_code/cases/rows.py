"""Kernels over rows of channels: every tile once on Ada, Wan's largest width on Hopper and consumer Blackwell too."""

from machine_code.case import Case, Design
from wanfast.kernels import layernorm, modulate, residual, rmsnorm
from wanfast.kernels._tiles import row_tile

WIDTHS = {89: (512, 1536, 3072, 5120, 8192), 90: (5120,), 120: (5120,)}
TOKENS = 32_760  # 480 x 832, 81 frames

# (the function, and what Wan's blocks launch it with besides its tile)
KERNELS = {
    "rms_norm": (rmsnorm._rms_norm_kernel, {"x_ptr": "bf16", "weight_ptr": "bf16", "y_ptr": "bf16", "eps": 1e-6}),
    "layer_norm": (
        layernorm._layer_norm_kernel,
        {"x_ptr": "fp32", "weight_ptr": "fp32", "bias_ptr": "fp32", "y_ptr": "bf16", "eps": 1e-6},
    ),
    "layer_norm_modulate": (
        modulate._layer_norm_modulate_kernel,
        {"x_ptr": "fp32", "scale_ptr": "fp32", "shift_ptr": "fp32", "y_ptr": "bf16", "eps": 1e-6},
    ),
    "gated_residual": (
        residual._gated_residual_kernel,
        {"x_ptr": "fp32", "y_ptr": "bf16", "gate_ptr": "fp32", "out_ptr": "fp32"},
    ),
}


def _case(kernel: str, channels: int, arch: int) -> Case:
    function, launched = KERNELS[kernel]
    tile = row_tile(channels)
    strides = {name: 6 * channels for name in function.arg_names if name.endswith("_stride_b")}  # of 6 modulation rows
    strides |= {name: 0 for name in function.arg_names if name.endswith("_stride_r")}
    counts = {name: value for name, value in (("T", TOKENS), ("first_tokens", 0)) if name in function.arg_names}
    return Case(
        kernel=kernel,
        variant=f"C{channels}",
        arch=arch,
        function=function,
        arguments=launched | strides | counts | {"C": channels, "HEAD": tile.head, "TAIL": tile.tail},
        num_warps=tile.num_warps,
        design=Design(loads=frozenset({"128 bit"}), stores=frozenset({"128 bit"})),
    )


CASES = [_case(kernel, channels, arch) for kernel in KERNELS for arch in WIDTHS for channels in WIDTHS[arch]]
