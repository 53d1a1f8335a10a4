"""Computes how long the VAE's decoder takes on an RTX 4090: each launch of a whole decode on the model of cycles.py.

The decoder itself runs, on tensors without data, and says what it would launch. Convolutions take what their machine
code takes on the model; norms, and frames copied to be remembered, what their bytes take of DRAM; products of the
attention what torch's would at two thirds of the peak. Nothing here is measured.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from cycles import DRAM, Loop, compute, seconds
from machine_code.cases.causal_conv3d import conv_case
from torch import Tensor
from wan_shapes import conv_launch

from wanfast import kernels
from wanfast.checkpoint.reader import memory_reader
from wanfast.config import VAE_2_1, VAE_2_2, VAEConfig
from wanfast.kernels import PackedConv
from wanfast.kernels._conv_forms import FORMS, FormName
from wanfast.kernels.causal_conv3d import fuses_norm
from wanfast.vae import blocks, decode
from wanfast.vae.weights import expected_tensors, load_vae

FP16_PEAK = 165.2e12  # with fp32 sums
ATTENTION_SHARE = 2 / 3  # of the peak that torch's products are taken to reach
SIZES: dict[str, tuple[VAEConfig, int, int, int]] = {  # latent frames, rows and columns
    "VAE 2.1, 81 frames, 480x832": (VAE_2_1, 21, 60, 104),
    "VAE 2.1, 81 frames, 720x1280": (VAE_2_1, 21, 90, 160),
    "VAE 2.2, 121 frames, 704x1280": (VAE_2_2, 31, 44, 80),
}


@dataclass(frozen=True, slots=True)
class Conv:
    """One launch of the convolution."""

    form: FormName
    channels: int
    out_channels: int
    kernel: tuple[int, int]  # frames and side of the window
    epilogue: str
    size: tuple[int, int, int]  # frames of a group of the result's; rows and columns of the input


@dataclass(slots=True)
class Record:
    """What a decode launches; its methods stand in for the operations and make results without data."""

    convs: Counter[Conv] = field(default_factory=Counter)
    bytes: float = 0.0  # of norms and copies
    products: float = 0.0  # multiply-adds of the attention

    def conv(self, x: Tensor, history: Any, weight: PackedConv, bias: Any, **ends: Any) -> Tensor:
        """Stand in for `kernels.causal_conv3d`."""
        y = x.new_empty(weight.out_shape(x)).contiguous(memory_format=torch.channels_last_3d)
        fused = ends["norm"] is not None and fuses_norm(weight)
        if ends["norm"] is not None and not fused:
            self.bytes += 4 * y.numel()
        self.bytes += 4 * x[:, :, : weight.lead_frames].numel()
        epilogue = "norm" if fused else "bias" if ends["residual"] is None else "residual"
        frames = y.shape[2] // FORMS[weight.form].groups
        kernel = (weight.kt, weight.side)
        self.convs[
            Conv(weight.form, weight.channels, weight.out_channels, kernel, epilogue, (frames, *x.shape[3:]))
        ] += 1
        return y

    def norm(self, x: Tensor, weight: Tensor, *, overwrite: bool = False) -> Tensor:
        """Stand in for `norm_silu`."""
        self.bytes += 4 * x.numel()
        return x if overwrite else torch.empty_like(x)

    def attention(self, x: Tensor, weights: Any) -> Tensor:
        """Stand in for `attention_block`."""
        batch, channels, frames, height, width = x.shape
        area = height * width
        self.products += batch * frames * area * channels * (4 * channels + 2 * area)
        return torch.empty_like(x)


def recorded(config: VAEConfig, frames: int, rows: int, columns: int) -> Record:
    """What decoding latents of this size launches."""
    record = Record()
    state = {name: torch.zeros(1).expand(shape) for name, shape in expected_tensors(config).items()}
    with (
        patch.object(kernels, "runs_causal_conv3d", lambda x: True),
        patch.object(kernels, "causal_conv3d", record.conv),
    ):
        vae = load_vae(memory_reader(state), config, torch.float16, device="meta", encoder=False)
        with (
            patch.object(blocks, "norm_silu", record.norm),
            patch.object(decode, "norm_silu", record.norm),
            patch.object(blocks, "attention_block", record.attention),
            torch.no_grad(),
        ):
            latents = torch.empty(1, config.z_dim, frames, rows, columns, device="meta")
            for _ in decode.decode(vae, latents):
                pass
    return record


def decode_row(name: str) -> dict[str, Any]:
    """A decode as the page has it, in seconds."""
    record = recorded(*SIZES[name])
    loops: dict[str, Loop | None] = {}
    convolving, operations = 0.0, 2 * record.products
    for one, count in record.convs.items():
        options = {"form": one.form, "epilogue": one.epilogue, "kernel": one.kernel}
        case = conv_case(one.channels, one.out_channels, **options)
        key = f"{case.name} {one.kernel}"
        if key not in loops:
            loops[key] = compute(case)
        launch, loop = conv_launch(case.arguments, *one.size), loops[key]
        in_products = 0.0 if loop is None else seconds(loop, launch)  # None: one step, which is no loop
        convolving += count * max(in_products, launch.bytes / DRAM)
        operations += count * launch.operations
    passing, attending = record.bytes / DRAM, 2 * record.products / (FP16_PEAK * ATTENTION_SHARE)
    return {
        "name": name,
        "tflop": round(operations / 1e12, 1),
        "convolutions": round(convolving, 2),
        "passes": round(passing, 2),
        "attention": round(attending, 2),
        "seconds": round(convolving + passing + attending, 2),
        "launches": record.convs.total(),
    }


def decode_rows() -> list[dict[str, Any]]:
    """All of SIZES."""
    return [decode_row(name) for name in SIZES]


if __name__ == "__main__":
    for row in decode_rows():
        print(row)
