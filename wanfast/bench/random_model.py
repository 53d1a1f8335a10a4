"""A model with random weights and the sizes of a real one, for speed where there is no checkpoint.

A14B has 28.6 billion parameters and umT5 5.7: drawn one by one they are 68 GB in 16 bits. Here a tensor is drawn when
it is first asked for, and all blocks of both experts share the memory of one block, the rows of the token table that of
one row. Every product is computed as with weights of its own, on normal values, and a block of 700 MB is larger than
any cache, so that its bytes come from memory as they would. What is not as with real weights, and is not reported: the
video, and how much host memory the weights take. Copies to a device are copies as ever: device memory and traffic are
as they would be.
"""

import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from wanfast.checkpoint.files import TensorRef, dtype_name
from wanfast.checkpoint.reader import Reader, memory_reader
from wanfast.config import ModelConfig
from wanfast.dit.weights import expected_tensors as dit_tensors
from wanfast.dit.weights import is_fp32
from wanfast.model import Model
from wanfast.open_file import Where
from wanfast.random_weights import byte_tokenizer, random_tensors
from wanfast.text.tokenizer import Tokenizer
from wanfast.text.weights import expected_tensors as text_tensors
from wanfast.vae.sizes import expected_tensors as vae_tensors

Shapes = Mapping[str, tuple[int, ...]]

_PLACE = Path("random weights")
_TABLE = "token_embedding.weight"
_TINY_VAE_DIM = 16


def random_model(config: ModelConfig, dtype: torch.dtype, *, is_shared: bool) -> Model:
    """Make a model of random weights.

    Args:
        config: with the sizes it shall have.
        dtype: of the weights that are not fp32 in every precision.
        is_shared: all blocks share their tensors, drawn when first used; else each has its own, drawn at once.

    Returns:
        The model; its readers hold no file.
    """
    draw = _Shared().reader if is_shared else _own
    dit = dit_tensors(config.dit)
    return Model(
        path=_PLACE,
        config=config,
        experts={
            expert.name: draw(dit, expert.name, lambda name: _dit_dtype(name, dtype)) for expert in config.experts
        },
        vae=draw(vae_tensors(config.vae), "vae", lambda name: torch.float32),
        text=draw(text_tensors(config.text), "text", lambda name: dtype),
        tokenizer=Tokenizer(vocabulary=byte_tokenizer(config.text.vocab_size), end_id=1, path=_PLACE),
        found_at=None,
        files={},
    )


def tiny_of(row: ModelConfig, tiny: ModelConfig) -> ModelConfig:
    """Shrink a model of the table to the sizes of wan-tiny, all parts and channels of its own kept."""
    return replace(
        row,
        name=f"tiny-{row.task}",
        dit=replace(tiny.dit, in_channels=row.dit.in_channels, out_channels=row.dit.out_channels),
        vae=replace(row.vae, encoder_dim=_TINY_VAE_DIM, decoder_dim=_TINY_VAE_DIM),
        text=tiny.text,
        width=tiny.width,
        height=tiny.height,
        num_frames=tiny.num_frames,
        num_inference_steps=tiny.num_inference_steps,
    )


def _dit_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if is_fp32(name) else dtype


def _own(shapes: Shapes, seed: str, dtype_of: Callable[[str], torch.dtype]) -> Reader:
    return memory_reader({name: t.to(dtype_of(name)) for name, t in random_tensors(shapes, seed).items()}, _PLACE)


class _Shared:
    """One tensor for each place in a block, whichever block it is of."""

    def __init__(self) -> None:
        """Draw nothing yet."""
        self._drawn: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}

    def reader(self, shapes: Shapes, seed: str, dtype_of: Callable[[str], torch.dtype]) -> Reader:
        """Give a reader of tensors that are drawn when they are loaded; the seed is the same for all."""
        refs = {}
        for name, shape in shapes.items():
            dtype = dtype_of(name)
            load = partial(self._tensor, name, shape, dtype)
            first = partial(_first_bytes, load)
            refs[name] = TensorRef(_PLACE, name, shape, dtype_name(dtype), load, first)
        return Reader(refs, _PLACE)

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, where: Where) -> Tensor:
        if where == "meta":
            return torch.empty(shape, dtype=dtype, device=where)
        key = (re.sub(r"^blocks\.\d+\.", "", name), shape, dtype)
        if key not in self._drawn:
            drawn = (1, *shape[1:]) if name == _TABLE else shape
            self._drawn[key] = _draw(key[0], drawn, dtype).expand(shape)
        return self._drawn[key]


def _draw(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draw one tensor of healthy size, in its own dtype, so that nothing larger is ever held."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, dtype=dtype, generator=generator)
    if name.endswith("gamma") or ("norm" in name and name.endswith(".weight")):
        return values.mul_(0.1).add_(1)
    if name.endswith((".bias", "modulation")):
        return values.mul_(0.1)
    return values if name == _TABLE else values.div_(math.sqrt(math.prod(shape) / shape[0]))


def _first_bytes(load: Callable[[Where], Tensor], num_bytes: int) -> bytes:
    return load("cpu").flatten()[:num_bytes].view(torch.uint8)[:num_bytes].numpy().tobytes()
