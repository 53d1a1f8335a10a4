"""Names and shapes of a DiT's tensors, from its sizes; those of the official checkpoints.

Source: Wan-Video/Wan2.2, wan/modules/model.py, WanModel.
"""

import math

from wanfast.config import DiTConfig


def expected_tensors(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """List every tensor a DiT checkpoint of these sizes holds.

    Args:
        config: sizes of the DiT.

    Returns:
        Official name -> shape: 27 tensors per block and 15 around them.
    """
    dim, patch = config.dim, math.prod(config.patch_size)
    tensors: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (dim, config.in_channels, *config.patch_size),
        "patch_embedding.bias": (dim,),
        **_linear_tensors("text_embedding.0", dim, config.text_dim),
        **_linear_tensors("text_embedding.2", dim, dim),
        **_linear_tensors("time_embedding.0", dim, config.freq_dim),
        **_linear_tensors("time_embedding.2", dim, dim),
        **_linear_tensors("time_projection.1", 6 * dim, dim),
        "head.modulation": (1, 2, dim),
        **_linear_tensors("head.head", patch * config.out_channels, dim),
    }
    for index in range(config.num_layers):
        tensors |= {f"blocks.{index}.{name}": shape for name, shape in _block_tensors(config).items()}
    return tensors


def _block_tensors(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    dim = config.dim
    tensors: dict[str, tuple[int, ...]] = {"modulation": (1, 6, dim), "norm3.weight": (dim,), "norm3.bias": (dim,)}
    for attention in ("self_attn", "cross_attn"):
        for projection in ("q", "k", "v", "o"):
            tensors |= _linear_tensors(f"{attention}.{projection}", dim, dim)
        tensors |= {f"{attention}.norm_q.weight": (dim,), f"{attention}.norm_k.weight": (dim,)}
    return tensors | _linear_tensors("ffn.0", config.ffn_dim, dim) | _linear_tensors("ffn.2", dim, config.ffn_dim)


def _linear_tensors(prefix: str, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.weight": (out_features, in_features), f"{prefix}.bias": (out_features,)}


def is_fp32(name: str) -> bool:
    """Whether a tensor, by its official name, is fp32 in every precision: norms, modulation, timestep and head."""
    return "norm" in name or name.endswith("modulation") or name.startswith(("time_", "head."))
