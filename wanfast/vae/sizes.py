"""Names and shapes of a VAE's tensors, from its sizes and back.

Source: the state dicts of Wan-Video/Wan2.2, wan/modules/vae2_1.py and vae2_2.py.
"""

import itertools
import math
from collections.abc import Sequence
from itertools import takewhile

from wanfast.checkpoint.reader import Reader
from wanfast.config import VAE_2_1, VAE_2_2, VAEConfig, VAEVersion
from wanfast.errors import CheckpointError

PIXEL_CHANNELS = 3

Shapes = dict[str, tuple[int, ...]]  # by official name
LevelPrefixes = tuple[list[str], str | None]  # of a level's residual blocks, and of its resampling


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
    version, levels = _stored_levels(reader)
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
    config = VAEConfig(
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
    if version == "2.2":
        _check_shortcuts(reader, config)
    return config


def expected_tensors(config: VAEConfig) -> Shapes:
    """List the official name and shape of every tensor of a VAE."""
    return _encoder_shapes(config) | _decoder_shapes(config)


def encoder_prefixes(config: VAEConfig) -> list[LevelPrefixes]:
    """List what the encoder's blocks are called, level by level."""
    return _level_prefixes(config, "encoder.downsamples", config.num_res_blocks)


def decoder_prefixes(config: VAEConfig) -> list[LevelPrefixes]:
    """List what the decoder's blocks are called, level by level."""
    return _level_prefixes(config, "decoder.upsamples", config.num_res_blocks + 1)


def _axis(reader: Reader, name: str, axis: int) -> int:
    shape = reader.shape(name)
    if axis >= len(shape) or shape[axis] == 0:
        raise CheckpointError(f"{reader.where(name)} has shape {list(shape)}, expected a size on axis {axis}")
    return shape[axis]


def _check_shortcuts(reader: Reader, config: VAEConfig) -> None:
    """2.2's shortcuts have no parameters: channels can only grow as frames shrink, and not in the last level."""
    factors = [*(2 if temporal else 1 for temporal in config.temporal_downsample), 1]
    for level, (before, after) in enumerate(itertools.pairwise((1, *config.multipliers))):
        if after not in (before, before * factors[level]):
            raise CheckpointError(
                f"{reader.path}: level {level} of the VAE's encoder goes from {before} to {after} times "
                f"{config.encoder_dim} channels, expected {before} or {before * factors[level]} times; "
                "its shortcut has no weights to do that"
            )


def _stored_levels(reader: Reader) -> tuple[VAEVersion, list[list[str]]]:
    """The version, and the prefixes of the encoder's blocks by level: residual blocks, then the downsampling if any."""
    names = reader.names()
    root = "encoder.downsamples"

    def present(prefix: str) -> bool:
        return f"{prefix}.residual.6.weight" in names or f"{prefix}.resample.1.weight" in names

    def numbered(prefix: str) -> list[str]:
        return list(takewhile(present, (f"{prefix}.{index}" for index in itertools.count())))

    if present(f"{root}.0.downsamples.0"):
        nested = (numbered(f"{root}.{level}.downsamples") for level in itertools.count())
        return "2.2", list(takewhile(bool, nested))
    levels: list[list[str]] = [[]]
    for prefix in numbered(root):
        levels[-1].append(prefix)
        if f"{prefix}.resample.1.weight" in names:
            levels.append([])
    if not all(levels):
        following = sum(len(level) for level in levels)
        raise CheckpointError(f"{reader.path}: tensor {root}.{following}.residual.6.weight is missing")
    return "2.1", levels


def _level_prefixes(config: VAEConfig, root: str, num_blocks: int) -> list[LevelPrefixes]:
    """2.1 numbers the blocks of all levels through, 2.2 those of each level."""
    last = len(config.multipliers) - 1
    levels = []
    for level in range(last + 1):
        if config.version == "2.1":
            stem, start = root, level * (num_blocks + 1)
        else:
            stem, start = f"{root}.{level}.{root.rpartition('.')[2]}", 0
        blocks = [f"{stem}.{start + index}" for index in range(num_blocks)]
        levels.append((blocks, f"{stem}.{start + num_blocks}" if level < last else None))
    return levels


def _encoder_shapes(config: VAEConfig) -> Shapes:
    dims = [config.encoder_dim * multiplier for multiplier in (1, *config.multipliers)]
    shapes = _conv_shapes("encoder.conv1", dims[0], PIXEL_CHANNELS * config.patch_size**2, 3, 3, 3)
    for level, (blocks, down) in enumerate(encoder_prefixes(config)):
        out_dim = dims[level + 1]
        shapes |= _residual_shapes(blocks, dims[level], out_dim)
        if down is not None:
            shapes |= _conv_shapes(f"{down}.resample.1", out_dim, out_dim, 3, 3)
            if config.temporal_downsample[level]:
                shapes |= _conv_shapes(f"{down}.time_conv", out_dim, out_dim, 3, 1, 1)
    shapes |= _middle_shapes("encoder.middle", dims[-1])
    shapes |= _head_shapes("encoder.head", 2 * config.z_dim, dims[-1])
    return shapes | _conv_shapes("conv1", 2 * config.z_dim, 2 * config.z_dim, 1, 1, 1)


def _decoder_shapes(config: VAEConfig) -> Shapes:
    dims = [config.decoder_dim * multiplier for multiplier in (config.multipliers[-1], *config.multipliers[::-1])]
    shrink = 2 if config.version == "2.1" else 1  # 2.1's upsampling halves the channels
    shapes = _conv_shapes("conv2", config.z_dim, config.z_dim, 1, 1, 1)
    shapes |= _conv_shapes("decoder.conv1", dims[0], config.z_dim, 3, 3, 3)
    shapes |= _middle_shapes("decoder.middle", dims[0])
    for level, (blocks, up) in enumerate(decoder_prefixes(config)):
        out_dim = dims[level + 1]
        shapes |= _residual_shapes(blocks, dims[level] // (shrink if level > 0 else 1), out_dim)
        if up is not None:
            shapes |= _conv_shapes(f"{up}.resample.1", out_dim // shrink, out_dim, 3, 3)
            if config.temporal_downsample[::-1][level]:
                shapes |= _conv_shapes(f"{up}.time_conv", 2 * out_dim, out_dim, 3, 1, 1)
    return shapes | _head_shapes("decoder.head", PIXEL_CHANNELS * config.patch_size**2, dims[-1])


def _conv_shapes(prefix: str, out_dim: int, dim: int, *kernel: int) -> Shapes:
    return {f"{prefix}.weight": (out_dim, dim, *kernel), f"{prefix}.bias": (out_dim,)}


def _head_shapes(prefix: str, out_dim: int, dim: int) -> Shapes:
    return {f"{prefix}.0.gamma": (dim, 1, 1, 1)} | _conv_shapes(f"{prefix}.2", out_dim, dim, 3, 3, 3)


def _residual_shapes(prefixes: list[str], dim: int, out_dim: int) -> Shapes:
    """A run of residual blocks, of which the first may change the channels."""
    shapes: Shapes = {}
    for prefix in prefixes:
        shapes |= {f"{prefix}.residual.0.gamma": (dim, 1, 1, 1), f"{prefix}.residual.3.gamma": (out_dim, 1, 1, 1)}
        shapes |= _conv_shapes(f"{prefix}.residual.2", out_dim, dim, 3, 3, 3)
        shapes |= _conv_shapes(f"{prefix}.residual.6", out_dim, out_dim, 3, 3, 3)
        if dim != out_dim:
            shapes |= _conv_shapes(f"{prefix}.shortcut", out_dim, dim, 1, 1, 1)
        dim = out_dim
    return shapes


def _middle_shapes(prefix: str, dim: int) -> Shapes:
    shapes = _residual_shapes([f"{prefix}.0", f"{prefix}.2"], dim, dim)
    shapes |= {f"{prefix}.1.norm.gamma": (dim, 1, 1)}
    shapes |= _conv_shapes(f"{prefix}.1.to_qkv", 3 * dim, dim, 1, 1)
    return shapes | _conv_shapes(f"{prefix}.1.proj", dim, dim, 1, 1)
