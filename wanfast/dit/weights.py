"""The DiT's weights as data, and the checkpoint name, shape and dtype of each.

Names are those of the official checkpoints. Projections are held in the dtype the model computes in; norms, modulation,
the timestep's layers and the head always in fp32, as the reference computes them.
Source: Wan-Video/Wan2.2, wan/modules/model.py, WanModel.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wanfast.checkpoint.bind import read_linear, read_tensor
from wanfast.checkpoint.reader import Reader
from wanfast.config import DiTConfig
from wanfast.dit.tensors import expected_tensors, is_fp32
from wanfast.errors import CheckpointError
from wanfast.linear import Linear

__all__ = [
    "HEAD_DIM",
    "AttentionWeights",
    "BlockWeights",
    "OuterWeights",
    "dit_config",
    "expected_tensors",
    "is_fp32",
    "load_block",
    "load_outer",
]

_CPU_VECTOR_BYTES = 64
HEAD_DIM = 128  # of every Wan model; a checkpoint's tensors do not tell it


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """One attention: four projections [dim, dim], and the RMS norms of queries and keys over all heads together."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    norm_q: Tensor  # [dim], fp32
    norm_k: Tensor  # [dim], fp32


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """One DiT block."""

    modulation: Tensor  # [1, 6, dim], fp32: shift, scale, gate of self-attention, then of the FFN
    self_attn: AttentionWeights
    norm3_weight: Tensor  # [dim], fp32; the layer norm before cross-attention
    norm3_bias: Tensor  # [dim], fp32
    cross_attn: AttentionWeights
    ffn_up: Linear  # [ffn_dim, dim]
    ffn_down: Linear  # [dim, ffn_dim]


@dataclass(frozen=True, slots=True)
class OuterWeights:
    """What stands before and after the blocks."""

    patch_embedding: Linear  # [dim, in_channels * patch], the patch ordered channel, frame, row, column
    text_in: Linear  # [dim, text_dim]
    text_out: Linear  # [dim, dim]
    time_in: Linear  # [dim, freq_dim], fp32
    time_out: Linear  # [dim, dim], fp32
    time_projection: Linear  # [6 * dim, dim], fp32
    head_modulation: Tensor  # [1, 2, dim], fp32: shift, scale
    head: Linear  # [patch * out_channels, dim], fp32; rows ordered frame, row, column, channel


def dit_config(reader: Reader, *, num_heads: int | None = None, eps: float = 1e-6, text_len: int = 512) -> DiTConfig:
    """Read the sizes of a DiT from the shapes of its tensors.

    Args:
        reader: an open DiT checkpoint.
        num_heads: attention heads; where None, heads of 128 channels.
        eps: added to the variance in every norm.
        text_len: rows of text attended to, padding included.

    Returns:
        The sizes; `expected_tensors` then says which tensors the checkpoint must hold.

    Raises:
        CheckpointError: a tensor the sizes are read from is missing or has the wrong number of axes, or the heads do
            not divide the width.
    """
    patch_embedding = _shape(reader, "patch_embedding.weight", axes=5)
    dim, in_channels = patch_embedding[:2]
    patch_size = (patch_embedding[2], patch_embedding[3], patch_embedding[4])
    heads = num_heads if num_heads is not None else dim // HEAD_DIM
    if heads < 1 or dim % heads or dim // heads % 2:
        source = f"num_heads = {num_heads}" if num_heads is not None else f"heads of {HEAD_DIM} channels"
        raise CheckpointError(
            f"{reader.path}: patch_embedding.weight has {dim} output channels, which {source} cannot split evenly into "
            "heads of an even size"
        )
    return DiTConfig(
        in_channels=in_channels,
        out_channels=_shape(reader, "head.head.weight", axes=2)[0] // math.prod(patch_size),
        dim=dim,
        ffn_dim=_shape(reader, "blocks.0.ffn.0.weight", axes=2)[0],
        num_heads=heads,
        num_layers=_num_layers(reader),
        text_dim=_shape(reader, "text_embedding.0.weight", axes=2)[1],
        text_len=text_len,
        freq_dim=_shape(reader, "time_embedding.0.weight", axes=2)[1],
        patch_size=patch_size,
        eps=eps,
    )


def _shape(reader: Reader, name: str, *, axes: int) -> tuple[int, ...]:
    if name not in reader.names():
        raise CheckpointError(f"{reader.path}: tensor {name} is missing; is this a Wan 2.2 DiT?")
    shape = tuple(reader.shape(name))
    if len(shape) != axes:
        raise CheckpointError(f"{reader.file_of(name)}: tensor {name} must have {axes} axes, got shape {shape}")
    return shape


def _num_layers(reader: Reader) -> int:
    parts = (name.split(".") for name in reader.names())
    return 1 + max(int(part[1]) for part in parts if part[0] == "blocks" and len(part) > 2 and part[1].isdecimal())


def load_block(reader: Reader, config: DiTConfig, index: int, dtype: torch.dtype) -> BlockWeights:
    """Load one block.

    Args:
        reader: an open DiT checkpoint.
        config: its sizes.
        index: of the block, from 0.
        dtype: of the projections, the dtype the model computes in.

    Returns:
        The block's weights on the CPU.

    Raises:
        CheckpointError: a tensor is missing, mis-shaped or not finite.
    """
    prefix, dim = f"blocks.{index}", config.dim
    norm = torch.float32
    return BlockWeights(
        modulation=read_tensor(reader, f"{prefix}.modulation", (1, 6, dim), dtype=norm),
        self_attn=_load_attention(reader, f"{prefix}.self_attn", dim, dtype),
        norm3_weight=read_tensor(reader, f"{prefix}.norm3.weight", (dim,), dtype=norm),
        norm3_bias=read_tensor(reader, f"{prefix}.norm3.bias", (dim,), dtype=norm),
        cross_attn=_load_attention(reader, f"{prefix}.cross_attn", dim, dtype),
        ffn_up=read_linear(reader, f"{prefix}.ffn.0", config.ffn_dim, dim, dtype=dtype),
        ffn_down=read_linear(reader, f"{prefix}.ffn.2", dim, config.ffn_dim, dtype=dtype),
    )


def _load_attention(reader: Reader, prefix: str, dim: int, dtype: torch.dtype) -> AttentionWeights:
    return AttentionWeights(
        q=read_linear(reader, f"{prefix}.q", dim, dim, dtype=dtype),
        k=read_linear(reader, f"{prefix}.k", dim, dim, dtype=dtype),
        v=read_linear(reader, f"{prefix}.v", dim, dim, dtype=dtype),
        o=read_linear(reader, f"{prefix}.o", dim, dim, dtype=dtype),
        norm_q=read_tensor(reader, f"{prefix}.norm_q.weight", (dim,), dtype=torch.float32),
        norm_k=read_tensor(reader, f"{prefix}.norm_k.weight", (dim,), dtype=torch.float32),
    )


def load_outer(reader: Reader, config: DiTConfig, dtype: torch.dtype) -> OuterWeights:
    """Load what stands before and after the blocks.

    Args:
        reader: an open DiT checkpoint.
        config: its sizes.
        dtype: of the patch and text embeddings, the dtype the model computes in; the rest is fp32.

    Returns:
        The weights on the CPU.

    Raises:
        CheckpointError: a tensor is missing, mis-shaped or not finite.
    """
    dim, fp32 = config.dim, torch.float32
    patch_shape = (dim, config.in_channels, *config.patch_size)
    patch_weight = read_tensor(reader, "patch_embedding.weight", patch_shape, dtype=dtype)
    patch_bias = read_tensor(reader, "patch_embedding.bias", (dim,), dtype=dtype)
    head_rows = math.prod(config.patch_size) * config.out_channels
    return OuterWeights(
        patch_embedding=Linear(patch_weight.flatten(1), patch_bias),
        text_in=read_linear(reader, "text_embedding.0", dim, config.text_dim, dtype=dtype),
        text_out=read_linear(reader, "text_embedding.2", dim, dim, dtype=dtype),
        time_in=_aligned(read_linear(reader, "time_embedding.0", dim, config.freq_dim, dtype=fp32)),
        time_out=_aligned(read_linear(reader, "time_embedding.2", dim, dim, dtype=fp32)),
        time_projection=_aligned(read_linear(reader, "time_projection.1", 6 * dim, dim, dtype=fp32)),
        head_modulation=read_tensor(reader, "head.modulation", (1, 2, dim), dtype=fp32),
        head=_aligned(read_linear(reader, "head.head", head_rows, dim, dtype=fp32)),
    )


def _aligned(layer: Linear) -> Linear:
    """Copy an fp32 matrix that lies at an odd address in its file.

    A CPU sums a product in an order that depends on where the matrix begins: aligned, the same numbers give the same
    result whatever file they came from. A difference here would pass through every rounding to bf16 after it.
    """
    weight = layer.weight
    if not isinstance(weight, Tensor) or weight.data_ptr() % _CPU_VECTOR_BYTES == 0:
        return layer
    return replace(layer, weight=weight.clone())
