"""Holds the parts of a checkpoint against each other and against what their folder says they are, by shapes alone."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from wanfast.checkpoint.files import TensorRef
from wanfast.checkpoint.reader import Reader
from wanfast.config import VAE_2_2, Task
from wanfast.errors import CheckpointError

_PATCH = "patch_embedding.weight"  # [dim, in_channels, frames, rows, columns]
_HEAD = "head.head.weight"  # [patch * out_channels, dim]
# Small tensors that training changes first of all.
_TELLING = ("head.modulation", "patch_embedding.bias", "head.head.bias", "blocks.0.modulation", "blocks.0.ffn.0.bias")
_SMALL_BYTES = 1 << 16  # of a tensor that is compared whole
_MASK_CHANNELS = 4  # of the I2V condition, beside an image latent


def check_task(reader: Reader, task: Task, source: Path) -> None:
    """Refuse a DiT whose channels are not those of its task.

    Args:
        reader: the DiT.
        task: what `source` says.
        source: file the task was read from, for the message.

    Raises:
        CheckpointError: t2v and ti2v take as many channels as they give; i2v also takes an image latent and its mask.
    """
    taken, given = dit_channels(reader)
    kinds = {given: "t2v or ti2v", 2 * given + _MASK_CHANNELS: "i2v"}
    kind = kinds.get(taken)
    if kind is None or task not in kind.split(" or "):
        as_in = f"as {kind} does" if kind else "as no Wan 2.2 model does"
        raise CheckpointError(
            f"{reader.where(_PATCH)} takes {taken} channels and the head gives {given}, {as_in}, but {source} says "
            f"{task}; these are another variant's weights; download the ones that belong here"
        )


def task_by_channels(reader: Reader) -> Task:
    """Tell the task of a DiT that comes without a config.

    Raises:
        CheckpointError: it takes and gives channels as no Wan 2.2 model does.
    """
    taken, given = dit_channels(reader)
    if taken == given:
        return "ti2v" if given == VAE_2_2.z_dim else "t2v"
    if taken == 2 * given + _MASK_CHANNELS:
        return "i2v"
    raise CheckpointError(
        f"{reader.where(_PATCH)} takes {taken} channels and the head gives {given}, as no Wan 2.2 model does"
    )


def check_sizes(reader: Reader, config: Mapping[str, Any], source: Path) -> None:
    """Refuse a DiT whose official config names other sizes than its tensors have.

    Raises:
        CheckpointError: naming the config's key and the tensor.
    """
    in_channels, out_channels = dit_channels(reader)
    sizes = {
        "dim": (_PATCH, reader.shape(_PATCH)[0]),
        "in_dim": (_PATCH, in_channels),
        "out_dim": (_HEAD, out_channels),
        "ffn_dim": ("blocks.0.ffn.0.weight", _size(reader, "blocks.0.ffn.0.weight", 2, 0)),
        "freq_dim": ("time_embedding.0.weight", _size(reader, "time_embedding.0.weight", 2, 1)),
    }
    for key, (tensor, size) in sizes.items():
        if config.get(key, size) != size:
            raise CheckpointError(
                f"{source}: {key} is {config[key]!r}, but {reader.where(tensor)} says {size}; "
                "use the config that belongs to the weights"
            )
    num_layers = num_blocks(reader)
    if config.get("num_layers", num_layers) != num_layers:
        raise CheckpointError(
            f"{source}: num_layers is {config['num_layers']!r}, but {reader.path} has tensors of blocks up to "
            f"blocks.{num_layers - 1}; use the config that belongs to the weights"
        )


def check_experts_agree(readers: Sequence[Reader]) -> None:
    """Refuse experts that differ in a tensor's name or shape.

    Raises:
        CheckpointError: naming the first tensor that differs, in both files.
    """
    first = readers[0]
    for other in readers[1:]:
        for name in sorted(first.names() ^ other.names()):
            here, there = (first, other) if name in first.names() else (other, first)
            raise CheckpointError(f"{here.where(name)} is missing in {there.path}; the experts are of different models")
        for name in sorted(first.names()):
            if first.shape(name) != other.shape(name):
                raise CheckpointError(
                    f"{first.where(name)} has shape {list(first.shape(name))}, but {list(other.shape(name))} "
                    f"in {other.file_of(name)}; the experts are of different models"
                )


def check_experts_differ(readers: Sequence[Reader]) -> None:
    """Refuse one expert in two files, by their numbers: small tensors whole, of large ones the first row.

    Experts that differ do so in the first tensor that is looked at, so this touches a page or two of each file.

    Raises:
        CheckpointError: naming both files.
    """
    for first, other in pairwise(readers):
        names = first.names()
        telling = [_sample(first.ref(name)) for name in _TELLING if name in names]
        # Zeros are what stands in a file that was never written; they tell nothing.
        if not any(map(any, telling)):
            continue
        in_order = [*(name for name in _TELLING if name in names), *sorted(names.difference(_TELLING))]
        if all(_sample(first.ref(name)) == _sample(other.ref(name)) for name in in_order):
            raise CheckpointError(
                f"{first.path}: holds the same numbers as {other.path}, one expert twice; download the other one"
            )


def _sample(ref: TensorRef) -> bytes:
    """Bytes of a stored tensor that another expert's would hardly share."""
    is_whole = len(ref.shape) < 2 or ref.num_bytes <= _SMALL_BYTES
    return ref.first_bytes(ref.num_bytes if is_whole else ref.num_bytes // ref.shape[0])


def check_parts_fit(dit: Reader, vae: Reader, text: Reader) -> None:
    """Refuse a VAE or text encoder whose width is not the DiT's.

    Raises:
        CheckpointError: naming the tensors that do not fit.
    """
    z_dim, out_channels = _size(vae, "conv2.weight", 5, 0), dit_channels(dit)[1]
    if z_dim != out_channels:
        raise CheckpointError(
            f"{vae.where('conv2.weight')} is of a VAE with {z_dim} latent channels, but the DiT in {dit.path} has "
            f"{out_channels}; Wan 2.2 A14B goes with Wan2.1_VAE (16), TI2V-5B with Wan2.2_VAE (48)"
        )
    width, wanted = _size(text, "token_embedding.weight", 2, 1), _size(dit, "text_embedding.0.weight", 2, 1)
    if width != wanted:
        raise CheckpointError(
            f"{text.where('token_embedding.weight')} is {width} wide, but the DiT in {dit.path} takes text {wanted} "
            "wide; use the text encoder that belongs to it"
        )


def dit_channels(reader: Reader) -> tuple[int, int]:
    """Channels a DiT takes, and channels it gives, from the shapes of its first and last layer.

    Raises:
        CheckpointError: a tensor is missing or impossible.
    """
    taken = _size(reader, _PATCH, 5, 1)
    patch = math.prod(reader.shape(_PATCH)[2:])
    rows = _size(reader, _HEAD, 2, 0)
    if rows % patch:
        raise CheckpointError(f"{reader.where(_HEAD)} has {rows} rows, which {patch} values per patch do not divide")
    return taken, rows // patch


def num_blocks(reader: Reader) -> int:
    """Blocks a DiT or text encoder has tensors of, by the highest number."""
    parts = (name.split(".") for name in reader.names())
    return 1 + max((int(part[1]) for part in parts if part[0] == "blocks" and part[1].isdecimal()), default=-1)


def _size(reader: Reader, name: str, axes: int, axis: int) -> int:
    """One size of a tensor that must have so many axes, none empty."""
    shape = reader.shape(name)
    if len(shape) != axes or 0 in shape:
        raise CheckpointError(f"{reader.where(name)} must have {axes} axes, none empty, got shape {list(shape)}")
    return shape[axis]
