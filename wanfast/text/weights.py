"""Weights of the umT5 encoder as data, and their names in a checkpoint (the official ones).

Source: Wan-Video/Wan2.2, wan/modules/t5.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from wanfast.checkpoint.bind import read_linear, read_tensor
from wanfast.checkpoint.reader import Reader
from wanfast.config import TextConfig
from wanfast.errors import CheckpointError
from wanfast.linear import Linear, expand
from wanfast.stored import GGUFWeight, Weight

_TABLE = "token_embedding.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBlockWeights:
    """Weights of one encoder block, in the dtype it computes in. No layer has a bias."""

    attention_norm: Tensor  # [C]
    q: Linear  # [A, C], A = attention_dim
    k: Linear
    v: Linear
    o: Linear  # [C, A]
    position_table: Tensor  # [buckets, N]; added to the logits of each head
    ffn_norm: Tensor  # [C]
    gate: Linear  # [ffn_dim, C]; its output goes through GELU
    up: Linear  # [ffn_dim, C]
    down: Linear  # [C, ffn_dim]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOuterWeights:
    """Weights outside the blocks.

    A prompt uses a few rows of the token table, a fifth of the bytes: these are read when they are looked up.
    """

    token_rows: Callable[[list[int]], Weight]  # gives rows of the table, [T, C], as stored, on the host
    norm: Tensor  # [C]; its dtype and device are those the encoder computes in
    file: Path  # that holds the token table


def text_config(reader: Reader, *, max_distance: int = 128, eps: float = 1e-6) -> TextConfig:
    """Read the sizes of a text encoder from its tensors' shapes.

    Args:
        reader: of the text encoder's files, by official name.
        max_distance: tokens beyond which all positions share a bucket; no tensor tells it.
        eps: of the RMS norms; no tensor tells it.

    Raises:
        CheckpointError: a tensor that tells a size is missing or has an impossible shape.
    """
    vocab_size, dim = _matrix(reader, _TABLE)
    attention_dim, _ = _matrix(reader, "blocks.0.attn.q.weight")
    ffn_dim, _ = _matrix(reader, "blocks.0.ffn.fc1.weight")
    positions = "blocks.0.pos_embedding.embedding.weight"
    num_buckets, num_heads = _matrix(reader, positions)
    if attention_dim % num_heads or num_buckets % 4:
        raise CheckpointError(
            f"{reader.where(positions)} has shape {[num_buckets, num_heads]}, expected a multiple of 4 rows"
            f" and a number of columns that divides {attention_dim}"
        )
    indices = {int(match[1]) for name in reader.names() if (match := re.match(r"blocks\.(\d+)\.", name))}
    return TextConfig(
        vocab_size=vocab_size,
        dim=dim,
        attention_dim=attention_dim,
        ffn_dim=ffn_dim,
        num_heads=num_heads,
        num_layers=len(indices),
        num_buckets=num_buckets,
        max_distance=max_distance,
        eps=eps,
    )


def _matrix(reader: Reader, name: str) -> tuple[int, int]:
    shape = reader.shape(name)
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{reader.where(name)} has shape {list(shape)}, expected two axes, none empty")
    return shape[0], shape[1]


def expected_tensors(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Give the official name and shape of every tensor of a text encoder."""
    dim, attention, ffn = config.dim, config.attention_dim, config.ffn_dim
    block: dict[str, tuple[int, ...]] = {
        "norm1.weight": (dim,),
        "attn.q.weight": (attention, dim),
        "attn.k.weight": (attention, dim),
        "attn.v.weight": (attention, dim),
        "attn.o.weight": (dim, attention),
        "pos_embedding.embedding.weight": (config.num_buckets, config.num_heads),
        "norm2.weight": (dim,),
        "ffn.gate.0.weight": (ffn, dim),
        "ffn.fc1.weight": (ffn, dim),
        "ffn.fc2.weight": (dim, ffn),
    }
    blocks = {f"blocks.{i}.{name}": shape for i in range(config.num_layers) for name, shape in block.items()}
    return {_TABLE: (config.vocab_size, dim), **blocks, "norm.weight": (dim,)}


def load_block(reader: Reader, config: TextConfig, index: int, dtype: torch.dtype) -> TextBlockWeights:
    """Read block `index`, counted from 0, cast to `dtype`.

    Raises:
        CheckpointError: a tensor is missing, mis-shaped or not finite.
    """
    prefix = f"blocks.{index}."
    dim, attention, ffn = config.dim, config.attention_dim, config.ffn_dim

    def matrix(name: str, out_features: int, in_features: int) -> Linear:
        return read_linear(reader, prefix + name, out_features, in_features, bias=False, dtype=dtype)

    positions = (config.num_buckets, config.num_heads)
    return TextBlockWeights(
        attention_norm=read_tensor(reader, prefix + "norm1.weight", (dim,), dtype=dtype),
        q=matrix("attn.q", attention, dim),
        k=matrix("attn.k", attention, dim),
        v=matrix("attn.v", attention, dim),
        o=matrix("attn.o", dim, attention),
        position_table=read_tensor(reader, prefix + "pos_embedding.embedding.weight", positions, dtype=dtype),
        ffn_norm=read_tensor(reader, prefix + "norm2.weight", (dim,), dtype=dtype),
        gate=matrix("ffn.gate.0", ffn, dim),
        up=matrix("ffn.fc1", ffn, dim),
        down=matrix("ffn.fc2", dim, ffn),
    )


def load_outer(reader: Reader, config: TextConfig, dtype: torch.dtype) -> TextOuterWeights:
    """Read what is outside the blocks; only the norm is cast to `dtype`, the token table is neither cast nor read.

    Raises:
        CheckpointError: a tensor is missing, mis-shaped or not of a float dtype, or the norm is not finite.
    """
    shape, dtype_found, want = reader.shape(_TABLE), reader.dtype(_TABLE), (config.vocab_size, config.dim)
    if shape != want or not dtype_found.is_floating_point:
        found = f"{str(dtype_found).removeprefix('torch.')} {list(shape)}"
        raise CheckpointError(f"{reader.where(_TABLE)} is {found}, expected floating-point {list(want)}")
    norm = read_tensor(reader, "norm.weight", (config.dim,), dtype=dtype)
    return TextOuterWeights(token_rows=partial(reader.load_rows, _TABLE), norm=norm, file=reader.file_of(_TABLE))


def embed_tokens(ids: Tensor, outer: TextOuterWeights) -> Tensor:
    """Look up the rows of some tokens.

    Args:
        ids: [T] int64, any device; each in [0, vocab).
        outer: as loaded.

    Returns:
        [T, C] in the norm's dtype, on its device.

    Raises:
        CheckpointError: a row cannot be read, or is not finite.
    """
    stored = outer.token_rows(ids.tolist())
    if isinstance(stored, GGUFWeight):
        stored = replace(stored, dtype=outer.norm.dtype)  # rounded once
    rows = expand(stored).to(device=outer.norm.device, dtype=outer.norm.dtype)
    finite = rows.isfinite().all(-1)
    if not bool(finite.all()):
        bad = ids.tolist()[finite.tolist().index(False)]
        raise CheckpointError(f"{outer.file}: tensor {_TABLE}: row {bad} is not finite; download the file again")
    return rows
