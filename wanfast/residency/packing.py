"""A block as one run of bytes: where each of its tensors stands in a slot, and the tensors seen in such a run again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from wanfast.residency.memory import map_leaves, named_tensors

Block = TypeVar("Block")

ALIGNMENT = 256  # bytes; of CUDA's own allocations, more than any load instruction wants
_KEPT_ALIGNMENT = 16  # of tensors that lie together already: the widest load


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor stands in a block's run of bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a block, with its place."""

    name: str  # such as "self_attn.q.weight"
    place: Place
    data: Tensor  # contiguous, uint8 [bytes]


@dataclass(frozen=True, slots=True)
class Layout:
    """A block without its numbers."""

    template: Any  # the block's dataclass, with a `Place` for every tensor
    num_bytes: int


def lay_out(block: object) -> tuple[Layout, list[Part]]:
    """Place the tensors of a block in one run of bytes.

    Tensors that lie together in memory, as those of a packed file do, keep their order and distances: what is next to
    each other stays so. Others follow each other as the block names them, wider dtypes first: matrices of one dtype
    that share an input are then next to each other too.

    Args:
        block: (nested) dataclass of tensors on the CPU.

    Returns:
        The layout, and the tensors by offset.
    """
    # Views of bytes, so that a tensor of any dtype, or of strange strides, is copied like any other.
    widest_first = sorted(named_tensors(block), key=lambda item: -item[1].dtype.itemsize)
    data = {name: tensor.detach().contiguous().reshape(-1).view(torch.uint8) for name, tensor in widest_first}
    offsets = _kept_offsets(data) or _following_offsets(data)

    parts: list[Part] = []

    def place(name: str, tensor: Tensor) -> Place:
        at = Place(offsets[name], tuple(tensor.shape), tensor.dtype)
        parts.append(Part(name, at, data[name]))
        return at

    template = map_leaves(block, Tensor, place)
    end = max((offsets[name] + data[name].nbytes for name in data), default=0)
    return Layout(template, end), sorted(parts, key=lambda part: part.place.offset)


def unpack(layout: Layout, run: Tensor) -> Any:
    """See a block in a run of bytes, uint8 [at least layout.num_bytes]; its tensors are views of the run."""

    def view(_: str, place: Place) -> Tensor:
        num_bytes = place.dtype.itemsize * torch.Size(place.shape).numel()
        return run[place.offset : place.offset + num_bytes].view(place.dtype).view(place.shape)

    return map_leaves(layout.template, Place, view)


def aligned(num_bytes: int) -> int:
    """Bytes up to where the next tensor may stand."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def packed_bytes(sizes: Sequence[int]) -> int:
    """Bytes that tensors of these sizes in bytes need at most, in a block of their own."""
    return sum(aligned(size) for size in sizes)


def _following_offsets(data: dict[str, Tensor]) -> dict[str, int]:
    offsets, end = {}, 0
    for name, tensor in data.items():
        offsets[name] = end
        end += aligned(tensor.nbytes)
    return offsets


def _kept_offsets(data: dict[str, Tensor]) -> dict[str, int] | None:
    """Offsets in the one region of memory that the tensors fill, or None."""
    if not data:
        return None
    first = min(tensor.data_ptr() for tensor in data.values())
    offsets, end = {}, 0
    for name, tensor in sorted(data.items(), key=lambda item: item[1].data_ptr()):
        offset = tensor.data_ptr() - first
        if offset < end or offset % _KEPT_ALIGNMENT or tensor.nbytes == 0:
            return None
        offsets[name], end = offset, offset + tensor.nbytes
    return offsets if end <= packed_bytes([tensor.nbytes for tensor in data.values()]) else None
