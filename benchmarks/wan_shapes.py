"""Wan 2.2's problem sizes, and what a kernel's launch is at each of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True, slots=True)
class Wan:
    """One model at one size of video, 81 frames (14B) or 121 (5B)."""

    tokens: int
    channels: int
    heads: int
    hidden: int  # of the feed-forward layer
    grid: tuple[int, int, int]  # frames, rows and columns of patches
    frame: tuple[int, int]  # rows and columns of pixels


HEAD_DIM = 128
WAN = {
    "14B 480p": Wan(tokens=32_760, channels=5120, heads=40, hidden=13_824, grid=(21, 30, 52), frame=(480, 832)),
    "14B 720p": Wan(tokens=75_600, channels=5120, heads=40, hidden=13_824, grid=(21, 45, 80), frame=(720, 1280)),
    "5B": Wan(tokens=27_280, channels=3072, heads=24, hidden=14_336, grid=(31, 22, 40), frame=(704, 1280)),
}


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel."""

    ctas: int
    macs_per_cta: float  # multiply-adds, those of a tile's dead part too
    operations: float  # that the result needs: two for each multiply-add
    bytes: float  # of operands and results, each read or written once


def _attention(arguments: Mapping[str, Any], *, operand: int, result: int) -> dict[str, Launch]:
    rows = arguments.get("QUERIES") or arguments["ROWS"]
    if arguments["D"] != HEAD_DIM:
        return {}
    return {
        name: Launch(
            ctas=-(-wan.tokens // rows) * wan.heads,
            macs_per_cta=2 * rows * wan.tokens * HEAD_DIM,
            operations=4 * wan.tokens**2 * HEAD_DIM * wan.heads,
            bytes=(3 * operand + result) * wan.tokens * HEAD_DIM * wan.heads,
        )
        for name, wan in WAN.items()
    }


def _linear(arguments: Mapping[str, Any], *, sides: Callable[[Wan], tuple[int, int]], result: int) -> dict[str, Launch]:
    rows, columns = arguments["BLOCK_M"], arguments["BLOCK_N"]
    launches = {}
    for name, wan in WAN.items():
        width, out = sides(wan)
        launches[name] = Launch(
            ctas=-(-wan.tokens // rows) * -(-out // columns),
            macs_per_cta=rows * columns * width,
            operations=2 * wan.tokens * width * out,
            bytes=wan.tokens * width + width * out + result * wan.tokens * out,
        )
    return launches


# Channels of the residual blocks of each model's VAE decoder, and how often smaller their pictures are.
VAE_LEVELS = {
    "14B 480p": {384: 4, 192: 2, 96: 1},
    "14B 720p": {384: 4, 192: 2, 96: 1},
    "5B": {1024: 8, 512: 4, 256: 2},
}
VAE_FRAMES = 2  # that a decoder's large levels take at a time


def conv_launch(arguments: Mapping[str, Any], frames: int, height: int, width: int) -> Launch:
    """The causal convolution of a case on so many frames of this size."""
    channels, outputs, taps = arguments["C"], arguments["N"], arguments["KT"] * arguments["SIDE"] ** 2
    stride, phases = arguments["STRIDE"], arguments["GROWN"] ** 2
    pixels = height // stride * (width // stride)
    columns = arguments["WIDTH"] * arguments["PARTS"]
    tiles = -(-pixels // arguments["BLOCK_M"]) * (arguments["N_PACKED"] // columns)
    read = frames * arguments["STRIDE_T"] + arguments["LEAD_T"]
    return Launch(
        ctas=tiles * frames * phases,
        macs_per_cta=arguments["BLOCK_M"] * columns * taps * arguments["C_PACKED"],
        operations=2 * phases * pixels * frames * taps * channels * outputs,
        bytes=2 * (read * height * width * channels + frames * pixels * phases * outputs + taps * channels * outputs),
    )


def _conv(arguments: Mapping[str, Any]) -> dict[str, Launch]:
    channels = arguments["C"]
    if (arguments["KT"], arguments["SIDE"], arguments["N"]) != (3, 3, channels):
        return {}
    return {
        name: conv_launch(arguments, VAE_FRAMES, *(side // VAE_LEVELS[name][channels] for side in wan.frame))
        for name, wan in WAN.items()
        if channels in VAE_LEVELS[name]
    }


LAUNCHES: dict[str, Callable[[Mapping[str, Any]], dict[str, Launch]]] = {
    "attention": partial(_attention, operand=2, result=2),
    "attention_int8": partial(_attention, operand=1, result=2),
    "causal_conv3d": _conv,
    "linear_8bit": partial(_linear, sides=lambda wan: (wan.channels, 3 * wan.channels), result=2),
    "linear_8bit_gelu": partial(_linear, sides=lambda wan: (wan.channels, wan.hidden), result=1),
    "linear_8bit_residual": partial(_linear, sides=lambda wan: (wan.hidden, wan.channels), result=8),
}
