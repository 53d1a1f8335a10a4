"""Weights of the Wan VAEs as data: one frozen dataclass per kind of block, laid out at load for the function it is for.

Wan 2.1 and 2.2 differ in channel counts, in tensor names and in parameter-free shortcuts; the blocks are the same.
Source: Wan-Video/Wan2.2, wan/modules/vae2_1.py and vae2_2.py.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wanfast.checkpoint.bind import check_names, read_tensor
from wanfast.checkpoint.reader import Reader
from wanfast.config import VAEConfig
from wanfast.vae.conv import ConvWeight, FormName, prepare
from wanfast.vae.sizes import Shapes, decoder_prefixes, encoder_prefixes, expected_tensors, vae_config

__all__ = ["VAEWeights", "expected_tensors", "load_vae", "vae_config"]


@dataclass(frozen=True, slots=True)
class CausalConv:
    """A convolution over frames that sees none later than its own, in one of the forms of `causal_conv3d`."""

    weight: ConvWeight  # [O, C, kt, kh, kw]
    bias: Tensor  # [O]


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution over pictures."""

    weight: Tensor  # [O, C, kh, kw], channels last
    bias: Tensor  # [O]


@dataclass(frozen=True, slots=True)
class ResidualWeights:
    """Norm, SiLU, convolution, twice, added to the input."""

    norm_1: Tensor  # [C, 1, 1, 1], times sqrt(C)
    conv_1: CausalConv  # 3 x 3 x 3
    norm_2: Tensor  # [O, 1, 1, 1], times sqrt(O)
    conv_2: CausalConv
    shortcut: CausalConv | None  # 1 x 1 x 1 where C and O differ


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Self-attention over the pixels of one frame, with one head."""

    norm: Tensor  # [C, 1, 1], times sqrt(C)
    to_qkv: Conv  # 1 x 1, C to 3 C
    proj: Conv  # 1 x 1


@dataclass(frozen=True, slots=True)
class UpsampleWeights:
    """Doubles rows and columns, and frames where `time` is given."""

    space: CausalConv  # double_picture, C to O
    time: CausalConv | None  # double_frames, 3 x 1 x 1, C to 2 C


@dataclass(frozen=True, slots=True)
class DownsampleWeights:
    """Halves rows and columns, and frames where `time` is given."""

    space: CausalConv  # half_picture
    time: CausalConv | None  # half_frames


@dataclass(frozen=True, slots=True)
class MiddleWeights:
    """The blocks at the coarsest size."""

    block_1: ResidualWeights
    attention: AttentionWeights
    block_2: ResidualWeights


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """Pixels to latents: input convolution, levels from fine to coarse, middle, head, the latents' mean."""

    conv_in: CausalConv
    levels: tuple[tuple[tuple[ResidualWeights, ...], DownsampleWeights | None], ...]
    middle: MiddleWeights
    norm_out: Tensor  # [C, 1, 1, 1], times sqrt(C)
    conv_out: CausalConv
    to_mean: CausalConv  # 1 x 1 x 1, moments to the latents' mean


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """Latents to pixels: two input convolutions, middle, levels from coarse to fine, head."""

    from_latents: CausalConv  # 1 x 1 x 1
    conv_in: CausalConv
    middle: MiddleWeights
    levels: tuple[tuple[tuple[ResidualWeights, ...], UpsampleWeights | None], ...]
    norm_out: Tensor  # [C, 1, 1, 1], times sqrt(C)
    conv_out: CausalConv


@dataclass(frozen=True, slots=True)
class VAEWeights:
    """One VAE, ready to compute; a half that was not asked for is None."""

    config: VAEConfig
    encoder: EncoderWeights | None
    decoder: DecoderWeights | None


def compute_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """Choose what a VAE computes in.

    On a GPU the reference's convolutions round what they multiply to TF32, fp32 with 10 binary digits behind the first,
    and sum in fp32. fp16 has these 10 digits too, at twice the speed and half the memory. Its range ends at 65,504,
    which Wan's activations, some hundreds, stay far below; beyond it frames are not finite, which is never overlooked.

    Args:
        precision: of the plan.
        device: where the VAE computes.

    Returns:
        fp32, or on a GPU in all precisions but "fp32" fp16.
    """
    return torch.float16 if torch.device(device).type == "cuda" and precision != "fp32" else torch.float32


def load_vae(
    reader: Reader,
    config: VAEConfig,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    encoder: bool = True,
    decoder: bool = True,
) -> VAEWeights:
    """Load a VAE or half of it, each tensor laid out for the device and dtype it computes in.

    The layout depends on the device: load for the device that computes, do not move the weights afterwards.

    Args:
        reader: the VAE's tensors by official name, and no others.
        config: as `vae_config` reads it.
        dtype: of the weights and of all activations; fp32 is the reference's.
        device: where it computes.
        encoder: load the encoder.
        decoder: load the decoder.

    Raises:
        CheckpointError: a tensor of either half is missing, unexpected or mis-shaped, or a loaded one is not finite.
    """
    shapes = expected_tensors(config)
    check_names(reader, shapes, part="VAE")
    source = _Source(reader, shapes, dtype, torch.device(device))
    return VAEWeights(
        config=config,
        encoder=_encoder(config, source) if encoder else None,
        decoder=_decoder(config, source) if decoder else None,
    )


@dataclass(frozen=True, slots=True)
class _Source:
    """Where tensors come from, and what they become."""

    reader: Reader
    shapes: Shapes
    dtype: torch.dtype
    device: torch.device

    def stored(self, name: str) -> Tensor:
        return read_tensor(self.reader, name, self.shapes[name])

    def placed(self, tensor: Tensor, *, copy: bool = False) -> Tensor:
        return tensor.to(self.device, self.dtype, copy=copy)

    def owned(self, name: str) -> Tensor:
        """In memory of its own, whoever gave the tensor."""
        return self.placed(self.stored(name), copy=True)


def _encoder(config: VAEConfig, source: _Source) -> EncoderWeights:
    return EncoderWeights(
        conv_in=_causal_conv(source, "encoder.conv1"),
        levels=tuple(
            (tuple(_residual(source, prefix) for prefix in blocks), None if down is None else _downsample(source, down))
            for blocks, down in encoder_prefixes(config)
        ),
        middle=_middle(source, "encoder.middle"),
        norm_out=_norm(source, "encoder.head.0.gamma"),
        conv_out=_causal_conv(source, "encoder.head.2"),
        # The other half of the moments is the log variance, which inference has no use for.
        to_mean=CausalConv(
            prepare(source.owned("conv1.weight")[: config.z_dim]), source.owned("conv1.bias")[: config.z_dim]
        ),
    )


def _decoder(config: VAEConfig, source: _Source) -> DecoderWeights:
    return DecoderWeights(
        from_latents=_causal_conv(source, "conv2"),
        conv_in=_causal_conv(source, "decoder.conv1"),
        middle=_middle(source, "decoder.middle"),
        levels=tuple(
            (tuple(_residual(source, prefix) for prefix in blocks), None if up is None else _upsample(source, up))
            for blocks, up in decoder_prefixes(config)
        ),
        norm_out=_norm(source, "decoder.head.0.gamma"),
        conv_out=_causal_conv(source, "decoder.head.2"),
    )


def _middle(source: _Source, prefix: str) -> MiddleWeights:
    return MiddleWeights(
        block_1=_residual(source, f"{prefix}.0"),
        attention=AttentionWeights(
            norm=_norm(source, f"{prefix}.1.norm.gamma"),
            to_qkv=_conv2d(source, f"{prefix}.1.to_qkv"),
            proj=_conv2d(source, f"{prefix}.1.proj"),
        ),
        block_2=_residual(source, f"{prefix}.2"),
    )


def _residual(source: _Source, prefix: str) -> ResidualWeights:
    has_shortcut = f"{prefix}.shortcut.weight" in source.shapes
    return ResidualWeights(
        norm_1=_norm(source, f"{prefix}.residual.0.gamma"),
        conv_1=_causal_conv(source, f"{prefix}.residual.2"),
        norm_2=_norm(source, f"{prefix}.residual.3.gamma"),
        conv_2=_causal_conv(source, f"{prefix}.residual.6"),
        shortcut=_causal_conv(source, f"{prefix}.shortcut") if has_shortcut else None,
    )


def _downsample(source: _Source, prefix: str) -> DownsampleWeights:
    has_time = f"{prefix}.time_conv.weight" in source.shapes
    weight = source.placed(source.stored(f"{prefix}.resample.1.weight"))
    return DownsampleWeights(
        space=CausalConv(prepare(weight.unsqueeze(2), "half_picture"), source.owned(f"{prefix}.resample.1.bias")),
        time=_causal_conv(source, f"{prefix}.time_conv", "half_frames") if has_time else None,
    )


def _upsample(source: _Source, prefix: str) -> UpsampleWeights:
    weight = source.stored(
        f"{prefix}.resample.1.weight"
    ).float()  # summed in fp32: a narrower dtype rounds each sum once
    phases = torch.stack([_fold_taps(_fold_taps(weight, 2, row), 3, column) for row in (0, 1) for column in (0, 1)])
    has_time = f"{prefix}.time_conv.weight" in source.shapes
    return UpsampleWeights(
        space=CausalConv(
            prepare(source.placed(phases).unsqueeze(3), "double_picture"), source.owned(f"{prefix}.resample.1.bias")
        ),
        time=_causal_conv(source, f"{prefix}.time_conv", "double_frames") if has_time else None,
    )


def _fold_taps(weight: Tensor, axis: int, parity: int) -> Tensor:
    """Sum the two of three taps that fall on one source pixel, for the even or odd outputs of a doubling."""
    before, here, after = weight.unbind(axis)
    return torch.stack((before, here + after) if parity == 0 else (before + here, after), axis)


def _norm(source: _Source, name: str) -> Tensor:
    gamma = source.stored(name).float()
    return source.placed(gamma * math.sqrt(len(gamma)))


def _conv2d(source: _Source, prefix: str) -> Conv:
    weight = source.placed(source.stored(f"{prefix}.weight"))
    return Conv(weight.clone(memory_format=torch.channels_last), source.owned(f"{prefix}.bias"))


def _causal_conv(source: _Source, prefix: str, form: FormName = "same") -> CausalConv:
    weight = source.stored(f"{prefix}.weight")
    # Where `prepare` has nothing to rearrange, as in a 1 x 1 x 1 kernel, it returns what it was given.
    weight = source.placed(weight, copy=weight[0, 0].numel() == 1)
    return CausalConv(prepare(weight, form), source.owned(f"{prefix}.bias"))
