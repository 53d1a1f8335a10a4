"""What the weights of a model take in memory, from its sizes and how its files store them; nothing is read."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from wanfast.checkpoint.reader import Reader
from wanfast.config import ModelConfig
from wanfast.dit import weights as dit_weights
from wanfast.errors import RequestError
from wanfast.kernels.gguf_blocks import FORMATS
from wanfast.plan import EIGHT_BIT, Precision
from wanfast.residency import packed_bytes
from wanfast.text import weights as text_weights
from wanfast.vae.sizes import expected_tensors as vae_tensors

Half = Literal["encoder", "decoder"]

STORED = ("fp32", "bf16", "fp8", "int8", *(kind.lower() for kind in FORMATS if kind.startswith("Q")))
_FLOATS = {"fp32": 4, "bf16": 2}  # bytes of a number
_ROUNDING = 9  # bytes for each number of a matrix while it is rounded to 8 bits: it and another in fp32, and 8 bits
_UPSAMPLING = ".resample.1.weight"  # its nine taps become four times four


def dtype_of(precision: Precision) -> torch.dtype:
    """What a precision computes in where it does not multiply in 8 bits."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSizes:
    """Bytes of weights as they lie on the device."""

    slot: int  # a block of a diffusion transformer
    outer: int  # what stands around the blocks of one expert
    text_slot: int  # a block of the text encoder
    vae_encoder: int
    vae_decoder: int
    stored: str  # how the files hold the projections
    is_expanded: bool  # whether they are expanded where they are used
    is_as_stored: bool = True  # whether blocks are used as they lie in their files: then they can be read there again
    file_block: int = 0  # bytes of a block in its file
    loading: int = 0  # bytes of the host that blocks take while they are loaded, beside those that are kept
    loras: int = 0  # what LoRAs add to the expert that is used


def parse_stored(text: str) -> str:
    """Read a storage format's name, such as fp8 or Q4_K.

    Raises:
        RequestError: there is no such format.
    """
    if text.lower() not in STORED:
        raise RequestError(f"stored: must be one of {', '.join(STORED)}, got {text!r}")
    return text.lower()


def weight_sizes(config: ModelConfig, precision: Precision, stored: str = "bf16") -> WeightSizes:
    """Count the bytes of a model whose projections are all stored in one format.

    Args:
        config: the model.
        precision: it computes in.
        stored: one of STORED; fp32 and bf16 become the precision's dtype when they are loaded, as 8 bits of another
            kind do where it computes in 8; the others stay as they are.
    """
    itemsize = dtype_of(precision).itemsize
    is_as_stored = stored not in _FLOATS or _FLOATS[stored] == itemsize
    if precision in EIGHT_BIT and stored in (*_FLOATS, *EIGHT_BIT):
        is_as_stored = stored == precision
    in_file = stored
    if stored in _FLOATS:
        stored = "bf16" if itemsize == 2 else "fp32"
    if precision in EIGHT_BIT and stored in ("bf16", *EIGHT_BIT):
        stored = precision
    block, file_block, outer, text = [], 0, 0, []
    for name, shape in dit_weights.expected_tensors(config.dit).items():
        if name.startswith("blocks.0."):
            block += _tensor_bytes(shape, stored, itemsize)
            file_block += sum(_tensor_bytes(shape, in_file, _FLOATS.get(in_file, itemsize)))
        elif not name.startswith("blocks."):
            outer += math.prod(shape) * (4 if dit_weights.is_fp32(name) else itemsize)
    for name, shape in text_weights.expected_tensors(config.text).items():
        if name.startswith("blocks.0."):
            text += _tensor_bytes(shape, "bf16", itemsize)
    slot = packed_bytes(block)
    return WeightSizes(
        slot=slot,
        outer=outer,
        text_slot=packed_bytes(text),
        vae_encoder=vae_bytes(config, "encoder"),
        vae_decoder=vae_bytes(config, "decoder"),
        stored=stored,
        is_expanded=stored not in (*_FLOATS, precision),
        is_as_stored=is_as_stored,
        file_block=slot if is_as_stored else file_block,
        loading=loading_bytes(config, precision, slot, is_as_stored=is_as_stored),
    )


def loading_bytes(config: ModelConfig, precision: Precision, slot: int, *, is_as_stored: bool) -> int:
    """Bytes of the host while blocks are loaded.

    Two of them: the next to be copied, and the one that is loaded ahead. Where they are not used as they are stored,
    also the largest matrix as it is stored, in fp32 at most; where they are rounded to 8 bits, also the block they are
    rounded from, in 16, and what is held for its largest matrix.
    """
    if is_as_stored:
        return 2 * slot
    matrix = config.dit.dim * max(config.dit.dim, config.dit.ffn_dim)
    return 4 * slot + _ROUNDING * matrix if precision in EIGHT_BIT else 2 * slot + _FLOATS["fp32"] * matrix


def largest_block(reader: Reader, dtype: torch.dtype, *, in_8_bits: bool = False) -> int:
    """Bytes that the largest block takes in a slot at most, from the headers alone.

    Args:
        reader: of a DiT or a text encoder.
        dtype: of what is not stored in fewer bits.
        in_8_bits: whether projections are rounded to 8 bits when they are loaded.
    """
    sizes: dict[str, list[int]] = {}
    for name in reader.names():
        if name.startswith("blocks."):
            sizes.setdefault(name.split(".")[1], []).extend(_stored_bytes(reader, name, dtype, in_8_bits))
    return max(packed_bytes(block) for block in sizes.values())


def largest_in_file(reader: Reader) -> int:
    """Bytes of the file that the largest block is read from, from the headers alone."""
    sizes: dict[str, int] = {}
    for name in reader.names():
        if name.startswith("blocks."):
            block = name.split(".")[1]
            sizes[block] = sizes.get(block, 0) + reader.ref(name).num_bytes
    return max(sizes.values())


def vae_bytes(config: ModelConfig, half: Half) -> int:
    """Bytes of one half of the VAE in fp32, its upsampling laid out as it is used."""
    outside = "conv1." if half == "encoder" else "conv2."
    total = 0
    for name, shape in vae_tensors(config.vae).items():
        if name.startswith((f"{half}.", outside)):
            spread = 16 / 9 if half == "decoder" and name.endswith(_UPSAMPLING) else 1
            total += round(math.prod(shape) * 4 * spread)
    return total


def _tensor_bytes(shape: tuple[int, ...], stored: str, itemsize: int) -> list[int]:
    if len(shape) != 2:
        return [math.prod(shape) * 4]  # norms, modulation and biases: fp32 at most
    if stored in _FLOATS:
        return [math.prod(shape) * itemsize]
    if stored in ("fp8", "int8"):
        return [math.prod(shape), shape[0] * 4]  # numbers, and a scale for each row
    form = FORMATS[stored.upper()]
    return [math.prod(shape) // form.elements * form.num_bytes]


def _stored_bytes(reader: Reader, name: str, dtype: torch.dtype, in_8_bits: bool) -> list[int]:
    ref = reader.ref(name)
    if len(ref.shape) != 2 or "pos_embedding" in name or not name.endswith(".weight"):
        return [math.prod(ref.shape) * 4]  # fp32 at most
    if ref.stored_as is None and in_8_bits:
        return [math.prod(ref.shape), ref.shape[0] * 4]
    if ref.stored_as is None:
        return [math.prod(ref.shape) * dtype.itemsize]
    scale = max(ref.shape[0], math.prod(-(-size // 128) for size in ref.shape)) * 4
    return [ref.num_bytes, scale]
