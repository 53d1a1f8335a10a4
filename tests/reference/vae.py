"""Small random VAEs in diffusers, their weights under official names, and the tensors of the golden recipe."""

import math
import zlib
from collections.abc import Mapping

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from wanfast.checkpoint.names import vae_from_diffusers
from wanfast.config import VAEConfig, VAEVersion


def small_config(
    version: VAEVersion,
    *,
    encoder_dim: int = 8,
    decoder_dim: int | None = None,
    z_dim: int = 4,
    multipliers: tuple[int, ...] = (1, 2, 4, 4),
    num_res_blocks: int = 2,
    temporal_downsample: tuple[bool, ...] = (False, True, True),
) -> VAEConfig:
    """Sizes of a VAE that runs in milliseconds; 2.2's decoder is wider than its encoder, as in the real one."""
    return VAEConfig(
        version=version,
        z_dim=z_dim,
        encoder_dim=encoder_dim,
        decoder_dim=decoder_dim or (encoder_dim if version == "2.1" else 2 * encoder_dim),
        multipliers=multipliers,
        num_res_blocks=num_res_blocks,
        temporal_downsample=temporal_downsample,
        patch_size=1 if version == "2.1" else 2,
        latents_mean=tuple(0.1 * (index % 4 + 1) * (-1) ** index for index in range(z_dim)),
        latents_std=tuple((1.5, 2.0, 0.5, 1.25)[index % 4] for index in range(z_dim)),
    )


def diffusers_vae(config: VAEConfig, seed: int = 0) -> AutoencoderKLWan:
    """Build diffusers' VAE with every weight drawn at random: norms near 1, the rest so that activations stay near 1.

    The last convolution is scaled down, so that most decoded values lie inside [-1, 1], where diffusers clamps them.
    """
    is_residual = config.version == "2.2"
    pixels = 3 * config.patch_size**2
    model = AutoencoderKLWan(
        base_dim=config.encoder_dim,
        decoder_base_dim=config.decoder_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.multipliers),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
        latents_mean=list(config.latents_mean),
        latents_std=list(config.latents_std),
        is_residual=is_residual,
        in_channels=pixels,
        out_channels=pixels,
        patch_size=config.patch_size if is_residual else None,
        scale_factor_temporal=config.temporal_stride,
        scale_factor_spatial=config.spatial_stride,
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, noise))
        model.decoder.conv_out.weight.mul_(0.3)
    return model


def official_state(model: AutoencoderKLWan, version: VAEVersion) -> dict[str, Tensor]:
    """Give the weights of a diffusers VAE their official names."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return {official: state[name] for name, official in vae_from_diffusers(state, version).items()}


def diffusers_encode(model: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Encode with diffusers to normalised latents, as its pipelines do."""
    mean, std = _statistics(model)
    with torch.no_grad():
        return (model.encode(video).latent_dist.mode() - mean) / std


def diffusers_decode(model: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode normalised latents with diffusers, as its pipelines do; clamped to [-1, 1]."""
    mean, std = _statistics(model)
    with torch.no_grad():
        return model.decode(latents * std + mean, return_dict=False)[0]


def golden_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Draw every weight by the recipe the official code's golden values were made with."""
    return {name: _scaled(name, golden_input(name, shape)) for name, shape in shapes.items()}


def golden_input(name: str, shape: tuple[int, ...]) -> Tensor:
    """Draw normal values from a generator seeded with the name's CRC-32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def _scaled(name: str, noise: Tensor) -> Tensor:
    if name.endswith("gamma"):
        return 1.0 + 0.1 * noise
    if name.endswith(".bias"):
        return 0.1 * noise
    return noise / math.sqrt(noise.numel() / noise.shape[0])


def _statistics(model: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(model.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(model.config.latents_std).view(1, -1, 1, 1, 1)
    return mean, std


def psnr(got: Tensor, want: Tensor, *, peak: float) -> float:
    """Peak signal-to-noise ratio in dB, over values that span `peak`."""
    return 10 * math.log10(peak**2 / float((got.double() - want.double()).square().mean()))
