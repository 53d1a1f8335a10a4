"""The causal convolution: every tile and form on Ada; what decoders spend their time in on Hopper and Blackwell too."""

import torch

from machine_code.case import Case, Design
from wanfast.kernels._conv_forms import FormName, pack_conv
from wanfast.kernels._conv_tiles import conv_tile
from wanfast.kernels.causal_conv3d import _causal_conv3d_kernel, launch_constants

HEIGHT, WIDTH, FRAMES = 480, 832, 2
KERNELS: dict[FormName, tuple[int, int]] = {
    "same": (3, 3),
    "half_picture": (1, 3),
    "half_frames": (3, 1),
    "double_picture": (1, 2),
    "double_frames": (3, 1),
}
EPILOGUES = {"bias": {}, "residual": {"residual_ptr": True}, "norm": {"norm_ptr": True}}
CTAS = {(128, 32, 3): 3, (64, 64, 3): 3, (64, 128, 2): 2, (128, 128, 1): 2}  # on Ada and Blackwell, by tile


def conv_case(
    channels: int,
    out_channels: int,
    arch: int = 89,
    *,
    form: FormName = "same",
    epilogue: str = "bias",
    dtype: str = "fp16",
    fp16_sums: bool = False,
    kernel: tuple[int, int] | None = None,
) -> Case:
    """The launch with so many channels; `kernel` is the frames and the side of its window."""
    kt, side = kernel or KERNELS[form]
    shape = (*((4,) if form == "double_picture" else ()), out_channels, channels, kt, side, side)
    constants = launch_constants(pack_conv(torch.zeros(shape, dtype=torch.float16), form))
    tile = conv_tile(channels, out_channels, arch, fp16_sums=fp16_sums)
    launch = tile.constants()
    num_warps, num_stages = launch.pop("num_warps"), launch.pop("num_stages")
    there = {"residual_ptr": False, "norm_ptr": False} | EPILOGUES[epilogue]
    of_type = ".BF16" if dtype == "bf16" else ""
    wide = f"HGMMA.64x{tile.width}x16.F32{of_type}" if arch == 90 else f"HMMA.16816.F32{of_type}"
    tensor = "HMMA.16816.F16" if fp16_sums else wide
    vectors = channels % 8 == 0  # otherwise a pixel's channels are no whole 16 bytes
    names = (form, f"{channels}-{out_channels}", dtype, epilogue, *(["fp16_sums"] if fp16_sums else []))
    return Case(
        kernel="causal_conv3d",
        variant="-".join(names),
        arch=arch,
        function=_causal_conv3d_kernel,
        arguments={
            **dict.fromkeys(("x_ptr", "history_ptr", "weight_ptr", "bias_ptr", "y_ptr"), dtype),
            **{name: dtype if is_there else None for name, is_there in there.items()},
            "x_stride_b": FRAMES * HEIGHT * WIDTH * channels,
            "history_stride_b": 2 * HEIGHT * WIDTH * channels,
            "seen": 2,
            "height": HEIGHT,
            "width": WIDTH,
            "frames": FRAMES,
            **constants,
            "FP16_SUMS": fp16_sums,
            **launch,
        },
        num_warps=num_warps,
        num_stages=num_stages,
        design=Design(
            ctas_per_sm=1
            if arch == 90 or fp16_sums
            else CTAS.get((tile.rows, tile.width, tile.parts), 3) - (not vectors),
            tensor=frozenset({tensor}),
            shuffles=0,
            byte_overhead=0.25 if vectors and tile.width >= 32 else 2.0,  # masks; alone beside few products
            stores=frozenset({"128 bit"}) if out_channels % 8 == 0 else None,
        ),
        any_triton=arch == 89 and dtype == "fp16" and (channels, epilogue) == (96, "residual"),
    )


CASES = [
    # Residual blocks: the first convolution ends with a norm where a tile has all outputs, the second with a sum.
    *(conv_case(channels, channels, epilogue=epilogue) for channels in (96, 192) for epilogue in ("norm", "residual")),
    *(conv_case(256, 256, epilogue=epilogue, dtype="bf16") for epilogue in ("norm", "residual")),
    conv_case(384, 384, epilogue="residual"),
    conv_case(640, 640, epilogue="residual"),
    # What stands between them, and at the ends.
    conv_case(384, 192, form="double_picture"),
    conv_case(192, 96, form="double_picture"),
    conv_case(384, 768, form="double_frames"),
    conv_case(96, 96, form="half_picture"),
    conv_case(192, 192, form="half_frames"),
    conv_case(16, 384),
    conv_case(96, 3),
    conv_case(3, 96),
    conv_case(384, 32),
    conv_case(48, 48, kernel=(1, 1)),
    conv_case(160, 320, kernel=(1, 1)),
    *(conv_case(channels, channels, fp16_sums=True) for channels in (96, 256)),
    *(conv_case(channels, channels, arch, epilogue="norm") for arch in (90, 120) for channels in (96, 192)),
    *(conv_case(256, 256, arch, epilogue="residual", dtype="bf16") for arch in (90, 120)),
]
