"""Small random DiTs in diffusers, their weights under official names, and the tensors of the golden recipe."""

import math
import zlib

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from wanfast.checkpoint.names import dit_from_diffusers
from wanfast.config import DiTConfig
from wanfast.dit.weights import expected_tensors

CHANNELS = {"t2v": (16, 16), "i2v": (36, 16), "ti2v": (48, 48)}  # in, out


def small_config(
    task: str = "t2v", *, dim: int = 48, num_heads: int = 2, num_layers: int = 2, ffn_dim: int = 80, text_dim: int = 24
) -> DiTConfig:
    """Sizes of a DiT that runs in milliseconds; 24 channels per head split unevenly over the three axes."""
    in_channels, out_channels = CHANNELS[task]
    return DiTConfig(
        in_channels=in_channels,
        out_channels=out_channels,
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=num_heads,
        num_layers=num_layers,
        text_dim=text_dim,
        text_len=16,
        freq_dim=32,
        patch_size=(1, 2, 2),
        eps=1e-6,
    )


def diffusers_dit(config: DiTConfig, seed: int = 0) -> WanTransformer3DModel:
    """Build diffusers' DiT with every weight drawn at random: norms near 1, the rest so that values stay near 1."""
    model = WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        eps=config.eps,
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name.replace("scale_shift_table", "modulation"), noise))
    return model


def official_state(model: WanTransformer3DModel) -> dict[str, Tensor]:
    """Return the model's weights under the names of the official checkpoints."""
    state = model.state_dict()
    return {official: state[name] for name, official in dit_from_diffusers(state).items()}


def golden_state(config: DiTConfig) -> dict[str, Tensor]:
    """Draw the weights of the golden values: each from a generator seeded with the CRC-32 of its name."""
    return {name: _scaled(name, golden_tensor(name, *shape)) for name, shape in expected_tensors(config).items()}


def golden_tensor(name: str, *shape: int) -> Tensor:
    """Draw a normal tensor from a generator seeded with the CRC-32 of its name."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def _scaled(name: str, noise: Tensor) -> Tensor:
    if "norm" in name and name.endswith(".weight"):
        return 1 + 0.1 * noise
    if name.endswith((".bias", "modulation")):
        return 0.1 * noise
    return noise / math.sqrt(noise.numel() / noise.shape[0])
