"""Weights of the Wan VAEs as data: one frozen dataclass per kind of block, laid out at load for the function it is for.

Wan 2.1 and 2.2 differ in channel counts, in tensor names and in parameter-free shortcuts; the blocks are the same.
Source: Wan-Video/Wan2.2, wan/modules/vae2_1.py and vae2_2.py.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor

from wanfast.checkpoint.bind import check_names, read_tensor
from wanfast.checkpoint.reader import Reader
from wanfast.config import VAE_2_1, VAE_2_2, VAEConfig, VAEVersion
from wanfast.errors import CheckpointError
from wanfast.vae.conv import ConvWeight, prepare

PIXEL_CHANNELS = 3


@dataclass(frozen=True, slots=True)
class CausalConv:
    """A stride-1 convolution over frames that sees none later than its own."""

    weight: ConvWeight  # [O, C, kt, kh, kw]
    bias: Tensor  # [O]


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution over pictures, or over frames with a stride."""

    weight: Tensor  # [O, C, kh, kw] or [O, C, kt, kh, kw], channels last
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

    phases: tuple[Tensor, Tensor, Tensor, Tensor]  # [O, C, 2, 2] per output parity (row, column), column fastest
    bias: Tensor  # [O]
    time: CausalConv | None  # 3 x 1 x 1, C to 2 C: even frames, then odd ones


@dataclass(frozen=True, slots=True)
class DownsampleWeights:
    """Halves rows and columns, and frames where `time` is given."""

    space: Conv  # 3 x 3, stride 2
    time: Conv | None  # 3 x 1 x 1, stride 2


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


def vae_config(
    reader: Reader, latents_mean: Sequence[float] | None = None, latents_std: Sequence[float] | None = None
) -> VAEConfig:
    """Read a VAE's sizes from the names and shapes of its tensors; no data is loaded.

    Args:
        reader: the VAE's tensors by official name.
        latents_mean: one value per latent channel, where a config file gives them; None means the table's, for the Wan
            VAE with as many latent channels.
        latents_std: likewise.

    Raises:
        CheckpointError: not a Wan VAE, or latent statistics that are unknown or of the wrong length.
    """
    names = reader.names()
    z_dim = _axis(reader, "conv2.weight", 0)
    encoder_dim = _axis(reader, "encoder.conv1.weight", 0)
    version, levels = _encoder_levels(reader)
    known = {config.z_dim: config for config in (VAE_2_1, VAE_2_2)}.get(z_dim)
    if latents_mean is None or latents_std is None:
        if known is None:
            raise CheckpointError(
                f"{reader.path}: the latents' mean and standard deviation are unknown for {z_dim} latent channels; "
                "give latents_mean and latents_std in the VAE's config.json"
            )
        latents_mean, latents_std = known.latents_mean, known.latents_std
    if len(latents_mean) != z_dim or len(latents_std) != z_dim:
        raise CheckpointError(
            f"{reader.path}: latents_mean and latents_std need {z_dim} values each, one per latent channel, "
            f"got {len(latents_mean)} and {len(latents_std)}"
        )
    return VAEConfig(
        version=version,
        z_dim=z_dim,
        encoder_dim=encoder_dim,
        decoder_dim=_axis(reader, "decoder.head.0.gamma", 0),
        multipliers=tuple(_axis(reader, f"{level[0]}.residual.6.weight", 0) // encoder_dim for level in levels),
        num_res_blocks=sum(f"{prefix}.residual.6.weight" in names for prefix in levels[0]),
        temporal_downsample=tuple(f"{level[-1]}.time_conv.weight" in names for level in levels[:-1]),
        patch_size=math.isqrt(_axis(reader, "encoder.conv1.weight", 1) // PIXEL_CHANNELS),
        latents_mean=tuple(latents_mean),
        latents_std=tuple(latents_std),
    )


def expected_tensors(config: VAEConfig) -> dict[str, tuple[int, ...]]:
    """List the official name and shape of every tensor of a VAE."""
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, shape: tuple[int, ...]) -> Tensor:
        shapes[name] = shape
        return torch.empty(shape, device="meta")

    source = _Source(record, torch.float32, torch.device("meta"))
    _encoder(config, source)
    _decoder(config, source)
    return shapes


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
        CheckpointError: a tensor is missing, unexpected, mis-shaped or not finite.
    """
    check_names(reader, expected_tensors(config), part="VAE")
    source = _Source(partial(read_tensor, reader), dtype, torch.device(device))
    return VAEWeights(
        config=config,
        encoder=_encoder(config, source) if encoder else None,
        decoder=_decoder(config, source) if decoder else None,
    )


@dataclass(frozen=True, slots=True)
class _Source:
    """Where tensors come from, and what they become."""

    read: Callable[[str, tuple[int, ...]], Tensor]
    dtype: torch.dtype
    device: torch.device

    def tensor(self, name: str, *shape: int) -> Tensor:
        return self.place(self.read(name, shape))

    def owned(self, name: str, *shape: int) -> Tensor:
        """As `tensor`, in memory of its own: a single view of a file keeps all of it mapped."""
        return self.read(name, shape).to(self.device, self.dtype, copy=True)

    def place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)


def _axis(reader: Reader, name: str, axis: int) -> int:
    shape = reader.shape(name)
    if axis >= len(shape):
        raise CheckpointError(f"{reader.where(name)} has shape {list(shape)}, expected at least {axis + 1} axes")
    return shape[axis]


def _encoder_levels(reader: Reader) -> tuple[VAEVersion, list[list[str]]]:
    """The version, and the prefixes of the encoder's blocks by level: residual blocks, then the downsampling if any."""
    names = reader.names()
    root = "encoder.downsamples"

    def present(prefix: str) -> bool:
        return f"{prefix}.residual.6.weight" in names or f"{prefix}.resample.1.weight" in names

    def count(pattern: str) -> list[str]:
        return list(takewhile(present, (pattern.format(index) for index in itertools.count())))

    if present(f"{root}.0.downsamples.0"):
        nested = (count(f"{root}.{level}.downsamples.{{}}") for level in itertools.count())
        return "2.2", list(takewhile(bool, nested))
    levels: list[list[str]] = [[]]
    for prefix in count(f"{root}.{{}}"):
        levels[-1].append(prefix)
        if f"{prefix}.resample.1.weight" in names:
            levels.append([])
    if not all(levels):
        raise CheckpointError(f"{reader.path}: tensor {root}.0.residual.6.weight is missing")
    return "2.1", levels


def _encoder(config: VAEConfig, source: _Source) -> EncoderWeights:
    pixels = PIXEL_CHANNELS * config.patch_size**2
    dims = [config.encoder_dim * multiplier for multiplier in (1, *config.multipliers)]
    last = len(config.multipliers) - 1
    levels = []
    for level, (dim, out_dim) in enumerate(itertools.pairwise(dims)):
        prefix = _level_prefix(config, "encoder.downsamples", level, config.num_res_blocks + 1)
        blocks = _level_blocks(source, prefix, dim, out_dim, config.num_res_blocks)
        down = None
        if level < last:
            temporal = config.temporal_downsample[level]
            down = _downsample(source, prefix(config.num_res_blocks), out_dim, temporal=temporal)
        levels.append((blocks, down))
    return EncoderWeights(
        conv_in=_causal_conv(source, "encoder.conv1", dims[0], pixels, 3, 3, 3),
        levels=tuple(levels),
        middle=_middle(source, "encoder.middle", dims[-1]),
        norm_out=_norm(source, "encoder.head.0.gamma", dims[-1], 1, 1, 1),
        conv_out=_causal_conv(source, "encoder.head.2", 2 * config.z_dim, dims[-1], 3, 3, 3),
        to_mean=_mean_half(source, "conv1", config.z_dim),
    )


def _decoder(config: VAEConfig, source: _Source) -> DecoderWeights:
    pixels = PIXEL_CHANNELS * config.patch_size**2
    multipliers = config.multipliers[::-1]
    dims = [config.decoder_dim * multiplier for multiplier in (multipliers[0], *multipliers)]
    num_blocks = config.num_res_blocks + 1
    last = len(multipliers) - 1
    levels = []
    for level, (dim, out_dim) in enumerate(itertools.pairwise(dims)):
        halved = config.version == "2.1"  # 2.1's upsampling halves the channels
        prefix = _level_prefix(config, "decoder.upsamples", level, num_blocks + 1)
        blocks = _level_blocks(source, prefix, dim // 2 if halved and level > 0 else dim, out_dim, num_blocks)
        up = None
        if level < last:
            temporal = config.temporal_downsample[::-1][level]
            up = _upsample(source, prefix(num_blocks), out_dim, out_dim // 2 if halved else out_dim, temporal=temporal)
        levels.append((blocks, up))
    return DecoderWeights(
        from_latents=_causal_conv(source, "conv2", config.z_dim, config.z_dim, 1, 1, 1),
        conv_in=_causal_conv(source, "decoder.conv1", dims[0], config.z_dim, 3, 3, 3),
        middle=_middle(source, "decoder.middle", dims[0]),
        levels=tuple(levels),
        norm_out=_norm(source, "decoder.head.0.gamma", dims[-1], 1, 1, 1),
        conv_out=_causal_conv(source, "decoder.head.2", pixels, dims[-1], 3, 3, 3),
    )


def _level_prefix(config: VAEConfig, root: str, level: int, entries: int) -> Callable[[int], str]:
    """Names of a level's entries: 2.1 numbers them through all levels, 2.2 within each."""
    if config.version == "2.1":
        return lambda index: f"{root}.{level * entries + index}"
    return lambda index: f"{root}.{level}.{root.rpartition('.')[2]}.{index}"


def _level_blocks(
    source: _Source, prefix: Callable[[int], str], dim: int, out_dim: int, num_blocks: int
) -> tuple[ResidualWeights, ...]:
    return tuple(
        _residual(source, prefix(index), dim if index == 0 else out_dim, out_dim) for index in range(num_blocks)
    )


def _middle(source: _Source, prefix: str, dim: int) -> MiddleWeights:
    return MiddleWeights(
        block_1=_residual(source, f"{prefix}.0", dim, dim),
        attention=AttentionWeights(
            norm=_norm(source, f"{prefix}.1.norm.gamma", dim, 1, 1),
            to_qkv=_conv2d(source, f"{prefix}.1.to_qkv", 3 * dim, dim, 1),
            proj=_conv2d(source, f"{prefix}.1.proj", dim, dim, 1),
        ),
        block_2=_residual(source, f"{prefix}.2", dim, dim),
    )


def _residual(source: _Source, prefix: str, dim: int, out_dim: int) -> ResidualWeights:
    return ResidualWeights(
        norm_1=_norm(source, f"{prefix}.residual.0.gamma", dim, 1, 1, 1),
        conv_1=_causal_conv(source, f"{prefix}.residual.2", out_dim, dim, 3, 3, 3),
        norm_2=_norm(source, f"{prefix}.residual.3.gamma", out_dim, 1, 1, 1),
        conv_2=_causal_conv(source, f"{prefix}.residual.6", out_dim, out_dim, 3, 3, 3),
        shortcut=None if dim == out_dim else _causal_conv(source, f"{prefix}.shortcut", out_dim, dim, 1, 1, 1),
    )


def _downsample(source: _Source, prefix: str, dim: int, *, temporal: bool) -> DownsampleWeights:
    time = None
    if temporal:
        weight = source.tensor(f"{prefix}.time_conv.weight", dim, dim, 3, 1, 1)
        bias = source.owned(f"{prefix}.time_conv.bias", dim)
        time = Conv(weight.clone(memory_format=torch.channels_last_3d), bias)
    return DownsampleWeights(space=_conv2d(source, f"{prefix}.resample.1", dim, dim, 3), time=time)


def _upsample(source: _Source, prefix: str, dim: int, out_dim: int, *, temporal: bool) -> UpsampleWeights:
    # Folded in fp32, so that a narrower dtype rounds each sum once.
    weight = source.read(f"{prefix}.resample.1.weight", (out_dim, dim, 3, 3)).float()
    phases = (
        source.place(_fold_taps(_fold_taps(weight, 2, row), 3, column)).contiguous(memory_format=torch.channels_last)
        for row in (0, 1)
        for column in (0, 1)
    )
    top_left, top_right, bottom_left, bottom_right = phases
    return UpsampleWeights(
        phases=(top_left, top_right, bottom_left, bottom_right),
        bias=source.owned(f"{prefix}.resample.1.bias", out_dim),
        time=_causal_conv(source, f"{prefix}.time_conv", 2 * dim, dim, 3, 1, 1) if temporal else None,
    )


def _fold_taps(weight: Tensor, axis: int, parity: int) -> Tensor:
    """Sum the two of three taps that fall on one source pixel, for the even or odd outputs of a doubling."""
    before, here, after = weight.unbind(axis)
    return torch.stack((before, here + after) if parity == 0 else (before + here, after), axis)


def _norm(source: _Source, name: str, *shape: int) -> Tensor:
    return source.place(source.read(name, shape).float() * math.sqrt(shape[0]))


def _conv2d(source: _Source, prefix: str, out_dim: int, dim: int, size: int) -> Conv:
    weight = source.tensor(f"{prefix}.weight", out_dim, dim, size, size)
    return Conv(weight.clone(memory_format=torch.channels_last), source.owned(f"{prefix}.bias", out_dim))


def _causal_conv(source: _Source, prefix: str, out_dim: int, dim: int, *kernel: int) -> CausalConv:
    # Where `prepare` has nothing to rearrange it returns the tensor it was given.
    place = source.owned if math.prod(kernel) == 1 else source.tensor
    return CausalConv(
        prepare(place(f"{prefix}.weight", out_dim, dim, *kernel)), source.owned(f"{prefix}.bias", out_dim)
    )


def _mean_half(source: _Source, prefix: str, z_dim: int) -> CausalConv:
    """The first half of the moments; the other is the log variance, which inference has no use for."""
    weight = source.owned(f"{prefix}.weight", 2 * z_dim, 2 * z_dim, 1, 1, 1)[:z_dim]
    return CausalConv(prepare(weight), source.owned(f"{prefix}.bias", 2 * z_dim)[:z_dim])
