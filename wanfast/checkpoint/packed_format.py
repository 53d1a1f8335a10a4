"""wanfast's own use of a safetensors file: every transformer block is one run of bytes that begins at a page.

    header | tensors outside the blocks, padding | block 0, padding | block 1, padding | ...

So one mapping, or one copy, brings a block. Within it wider dtypes stand first, which aligns all, and weights of one
dtype follow each other in the order of the model, so that the matrices of q, k and v are also one matrix. The padding
is a tensor of its own, as the format leaves no gaps. A weight that is stored small keeps its bytes:

    <layer>.weight, <layer>.weight_scale    scaled 8-bit numbers, as `open_scaled` reads them; weight_scale_rotated and
                                            weight_scale_narrow where they are (stored.py)
    <layer>.weight.Q4_K, ...                rows of GGUF blocks, uint8 [out, bytes of a row]

Source: https://github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

from wanfast.block_sizes import GGUF_BLOCKS
from wanfast.checkpoint.files import TensorRef, dtype_name, torch_dtype
from wanfast.checkpoint.safetensors_format import DTYPES
from wanfast.errors import CheckpointError
from wanfast.stored import GGUFWeight, ScaledWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wanfast.open_file import Where
    from wanfast.stored import Weight

VERSION_KEY, VERSION = "wanfast_packed", "1"  # in the header's free-form entries
PAGE_BYTES = 4096

_PADDING = "padding."
_FORMAT_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_EXPANDS_TO = "bfloat16"  # until whoever binds a weight says otherwise

Form: TypeAlias = "tuple[torch.dtype, tuple[int, ...]]"


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that are written next to each other."""

    forms: Mapping[str, Form]  # dtype and shape by the name in the file
    load: Callable[[], Mapping[str, Tensor]]  # gives them, of these dtypes and shapes


def stored_tensors(name: str, weight: Weight) -> dict[str, Tensor]:
    """Give the plain tensors that hold a weight in a file, by the names they get there; no numbers change."""
    if isinstance(weight, ScaledWeight):
        return {name: weight.values, scale_name(name, weight.is_rotated, weight.is_narrow): weight.scale}
    if isinstance(weight, GGUFWeight):
        return {f"{name}.{weight.kind}": weight.blocks}
    return {name: weight}


def scale_name(weight: str, is_rotated: bool, is_narrow: bool) -> str:
    """Name the scale of an 8-bit weight, so that nobody takes the numbers for others."""
    return f"{weight}_scale{'_rotated' if is_rotated else '_narrow' if is_narrow else ''}"


def packed_refs(refs: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """Turn the entries of a packed file into those of its weights; scales are left for `open_scaled`.

    Raises:
        CheckpointError: a tensor of GGUF blocks does not hold whole blocks.
    """
    found: dict[str, TensorRef] = {}
    for name, ref in refs.items():
        layer, _, kind = name.rpartition(".")
        if name.startswith(_PADDING):
            continue
        if kind not in GGUF_BLOCKS:
            found[name] = ref
            continue
        block = GGUF_BLOCKS[kind]
        if ref.dtype_name != "uint8" or len(ref.shape) != 2 or ref.shape[1] % block.num_bytes:
            raise CheckpointError(f"{ref.file}: tensor {name} does not hold rows of {kind} blocks; convert it again")
        in_features = ref.shape[1] // block.num_bytes * block.elements
        load, rows = partial(_load_blocks, ref, kind, in_features), partial(_load_rows, ref, kind, in_features)
        found[layer] = replace(
            ref,
            shape=(ref.shape[0], in_features),
            dtype_name=_EXPANDS_TO,
            load=load,
            rows=rows,
            stored_as=kind,
            stored_bytes=ref.num_bytes,
        )
    return found


def _load_blocks(ref: TensorRef, kind: str, in_features: int, where: Where) -> Weight:
    return _as_blocks(ref.load(where), kind, in_features)


def _load_rows(ref: TensorRef, kind: str, in_features: int, rows: Sequence[int]) -> Weight:
    assert ref.rows is not None, "a plain tensor of two axes"
    return _as_blocks(ref.rows(rows), kind, in_features)


def _as_blocks(blocks: Weight, kind: str, in_features: int) -> Weight:
    import torch

    assert isinstance(blocks, torch.Tensor)
    return GGUFWeight(blocks, kind, in_features, torch_dtype(_EXPANDS_TO))


def packed_bytes(groups: Sequence[Group]) -> int:
    """Bytes of the tensors and their padding, without the header."""
    return sum(_padded(group) for group in groups)


def write_packed(
    path: Path, groups: Sequence[Group], metadata: Mapping[str, str], on_written: Callable[[int], None]
) -> None:
    """Write a packed file, group by group; each group is loaded once, written once, and let go.

    What is written stands in `<name>.part` until it is whole. If that file is there already, and was to become the same
    file, whole groups in it are kept.

    Args:
        path: of the file; replaced if it is there.
        groups: in the order they are written.
        metadata: free-form entries of the header.
        on_written: is told the bytes of every group that is there, those found in the `.part` file included.

    Raises:
        OSError: the file cannot be written.
        CheckpointError: what `Group.load` raises.
    """
    header, ends = packed_header(groups, metadata)
    part = path.with_name(f"{path.name}.part")
    with part.open("r+b" if part.exists() else "w+b") as file:
        done = _groups_on_disk(file, header, ends)
        if done == 0:
            file.seek(0)
            file.write(header)
        else:
            file.seek(ends[done - 1])
        file.truncate()
        for group in groups[:done]:
            on_written(_padded(group))
        for group in groups[done:]:
            _write_group(file, group)
            # Groups before the last one are then known to be on the disk, even after a loss of power.
            file.flush()
            os.fsync(file.fileno())
            on_written(_padded(group))
    part.replace(path)


def _groups_on_disk(file: BinaryIO, header: bytes, ends: Sequence[int]) -> int:
    """How many whole groups an unfinished file holds; the last one in it may not have reached the disk."""
    if file.read(len(header)) != header:
        return 0
    size = os.fstat(file.fileno()).st_size
    return sum(end < size for end in ends)


def _write_group(file: BinaryIO, group: Group) -> None:
    import torch

    tensors = group.load()
    for name in _order(group.forms):
        tensor, (dtype, shape) = tensors[name], group.forms[name]
        assert tensor.dtype == dtype and tuple(tensor.shape) == shape, name
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    file.write(bytes(_padded(group) - _num_bytes(group)))


def packed_header(groups: Sequence[Group], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """The header up to the first tensor, which begins at a page, and the byte of the file where each group ends."""
    entries: dict[str, object] = {"__metadata__": {VERSION_KEY: VERSION, **metadata}}
    ends: list[int] = []
    place = 0

    def add(name: str, dtype: str, shape: Iterable[int], num_bytes: int) -> None:
        nonlocal place
        offsets = [place, place + num_bytes]
        entries[name] = {"dtype": _FORMAT_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        place += num_bytes

    for index, group in enumerate(groups):
        for name in _order(group.forms):
            dtype, shape = group.forms[name]
            add(name, dtype_name(dtype), shape, math.prod(shape) * dtype.itemsize)
        padding = _padded(group) - _num_bytes(group)
        if padding:
            add(f"{_PADDING}{index}", "uint8", [padding], padding)
        ends.append(place)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + end for end in ends]


def _order(forms: Mapping[str, Form]) -> list[str]:
    """Wider dtypes first; of one dtype, matrices before scales before the rest, each in the order they were given."""

    def rank(name: str) -> tuple[int, int]:
        dtype, shape = forms[name]
        return -dtype.itemsize, 2 if len(shape) < 2 else name.endswith("_scale")

    return sorted(forms, key=rank)


def _num_bytes(group: Group) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in group.forms.values())


def _padded(group: Group) -> int:
    return -(-_num_bytes(group) // PAGE_BYTES) * PAGE_BYTES
