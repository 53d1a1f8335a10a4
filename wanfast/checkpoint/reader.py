"""Reads tensors of one model part by name, one at a time, from safetensors, `.pth` or GGUF files, or memory.

Opening reads headers only. A loaded tensor is in memory of its own: a mapped page whose file is cut short in use would
end the process, a read that fails is an error with a name.

Sources: Hugging Face's sharded checkpoints, `<name>.safetensors.index.json` with a `weight_map` from tensor to file;
ModelTC/LightX2V, tools/convert/converter.py, --save_by_block, `block_<n>.safetensors` and `non_block.safetensors`.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wanfast.checkpoint.files import (
    StoredBytes,
    TensorRef,
    dtype_name,
    plain_ref,
    read_json,
    refuse_pointer,
    torch_dtype,
)
from wanfast.checkpoint.gguf_format import gguf_refs
from wanfast.checkpoint.names import gguf_to_official
from wanfast.checkpoint.packed_format import VERSION_KEY, packed_refs
from wanfast.checkpoint.safetensors_format import safetensors_metadata, safetensors_refs
from wanfast.errors import CheckpointError
from wanfast.open_file import OpenFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wanfast.open_file import Where
    from wanfast.stored import Weight

_BLOCK_FILE = re.compile(r"block_(\d+)\.safetensors")
_OUTSIDE_BLOCKS = "non_block.safetensors"


class Reader:
    """The tensors of one model part by official name; nothing is read until `load`."""

    __slots__ = ("_refs", "path")

    def __init__(self, refs: Mapping[str, TensorRef], path: Path) -> None:
        self._refs = dict(refs)
        self.path = path  # the file, index or folder opened, for messages

    def names(self) -> frozenset[str]:
        """All tensor names."""
        return frozenset(self._refs)

    def ref(self, name: str) -> TensorRef:
        """The entry of one tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        try:
            return self._refs[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: tensor {name} is missing") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the header alone."""
        return self.ref(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype, from the header alone; torch is imported for it."""
        return self.ref(name).dtype

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self.ref(name).file

    def load(self, name: str, where: Where = "cpu") -> Weight:
        """Read one tensor as it is stored; it may be the memory of whoever gave it, so do not write to it.

        Args:
            name: of the tensor.
            where: "meta" gives dtypes and shapes alone, and reads nothing.

        Raises:
            CheckpointError: there is no such tensor, or its file has gone or changed.
        """
        return self.ref(name).load(where)

    def load_rows(self, name: str, rows: Sequence[int]) -> Weight:
        """Read some rows of a tensor, [rows, ...]; where it has a form that is only read whole, they are cut from that.

        Raises:
            CheckpointError: as `load`.
            ValueError: there is no such row.
        """
        ref = self.ref(name)
        for row in rows:  # beyond them the file has other tensors, which would be read in silence
            if not 0 <= row < ref.shape[0]:
                raise ValueError(f"rows: must be from 0 to {ref.shape[0] - 1} in {self.where(name)}, got {row}")
        if ref.rows is not None:
            return ref.rows(rows)
        from wanfast.linear import expand  # which takes torch

        return expand(ref.load("cpu"))[list(rows)]

    def where(self, name: str) -> str:
        """File and tensor for a message, with the stored name where a rename hides it."""
        ref = self.ref(name)
        stored = "" if ref.stored_name == name else f" (stored as {ref.stored_name})"
        return f"{ref.file}: tensor {name}{stored}"

    def renamed(self, names: Mapping[str, str]) -> Reader:
        """Return a reader of the same tensors under other names.

        Args:
            names: present name -> new name; a present name that is not a key is left out.

        Raises:
            CheckpointError: two tensors would get one name, or a key is not present.
        """
        refs: dict[str, TensorRef] = {}
        for old, new in names.items():
            ref = self.ref(old)
            if new in refs:
                raise CheckpointError(
                    f"{self.path}: tensors {refs[new].stored_name} and {ref.stored_name} both mean {new}; "
                    "the file mixes two naming schemes"
                )
            refs[new] = ref
        return Reader(refs, self.path)


def memory_reader(tensors: Mapping[str, Tensor], path: str | Path = "memory") -> Reader:
    """Return a reader over tensors that are in memory already; `load` returns them as they are."""
    return _tensors_reader(tensors, Path(path))


def open_file(path: str | Path) -> Reader:
    """Open one `.safetensors`, `.safetensors.index.json`, `.gguf`, `.pth` or `.pt` file.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or is of another kind.
    """
    path = Path(path)
    if path.name.endswith(".safetensors.index.json"):
        return open_sharded(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in (".pth", ".pt"):
        return open_pickle(path)
    if path.suffix == ".gguf":
        return open_gguf(path)
    raise CheckpointError(f"{path}: not a tensor file wanfast knows; it reads .safetensors, .gguf and .pth")


def open_folder(folder: str | Path) -> Reader:
    """Open the one checkpoint in a folder: its index with all shards, its files of blocks, or its single file.

    A GGUF file is taken where there is no safetensors file.

    Raises:
        CheckpointError: there is none, there are several, or a file in it cannot be used.
    """
    folder = Path(folder)
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        return open_sharded(_only(folder, "*.safetensors.index.json", indices, "keep one"))
    files = sorted(folder.glob("*.safetensors"))
    if any(_BLOCK_FILE.fullmatch(file.name) for file in files):
        return _open_blocks(folder, files)
    if files:
        return open_safetensors(
            _only(folder, "*.safetensors", files, "shards need their .safetensors.index.json; download it too")
        )
    packed = sorted(folder.glob("*.gguf"))
    if packed:
        return open_gguf(_only(folder, "*.gguf", packed, "keep one"))
    raise CheckpointError(f"{folder}: holds no .safetensors file and no .gguf file; download the folder again")


def _only(folder: Path, pattern: str, found: list[Path], rule: str) -> Path:
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:3]) + (", ..." if len(found) > 3 else "")
        raise CheckpointError(f"{folder}: {len(found)} files match {pattern} ({names}); {rule}")
    return found[0]


def _open_blocks(folder: Path, files: list[Path]) -> Reader:
    """Open a folder with a file for each block, and the rest beside them; which block is the last is not told here."""
    numbers = {int(match[1]) for file in files if (match := _BLOCK_FILE.fullmatch(file.name))}
    missing = [f"block_{number}.safetensors" for number in range(len(numbers)) if number not in numbers]
    missing += [_OUTSIDE_BLOCKS] if len(files) == len(numbers) else []
    if missing:
        raise CheckpointError(
            f"{folder / missing[0]}: missing ({len(missing)} of the files that hold the model block by block: "
            f"{', '.join(missing)}); download them"
        )
    refs: dict[str, TensorRef] = {}
    for file in files:
        for name, ref in safetensors_refs(file).items():
            if name in refs:
                raise CheckpointError(f"{file}: tensor {name} is also in {refs[name].file.name}; keep one copy")
            refs[name] = ref
    return Reader(refs, folder)


def open_sharded(index: str | Path) -> Reader:
    """Open all shards that a `.safetensors.index.json` names.

    Raises:
        CheckpointError: the index or a shard is missing or damaged, or they disagree about who holds which tensor.
    """
    index = Path(index)
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensor to file; download it again")
    shards = sorted(set(weight_map.values()))
    foreign = [shard for shard in shards if Path(shard).name != shard]
    if foreign:
        raise CheckpointError(f"{index}: names {foreign[0]!r}, which is not a file beside it; download it again")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent / missing[0]}: missing ({len(missing)} of {len(shards)} shards named by {index.name}: "
            f"{', '.join(missing)}); download them"
        )
    refs: dict[str, TensorRef] = {}
    for shard in shards:
        for name, ref in safetensors_refs(index.parent / shard).items():
            if name in refs:
                raise CheckpointError(f"{ref.file}: tensor {name} is also in {refs[name].file.name}; keep one copy")
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{ref.file}: tensor {name} is not listed there by {index.name}; download both again"
                )
            refs[name] = ref
    lost = sorted(weight_map.keys() - refs.keys())
    if lost:
        file = index.parent / weight_map[lost[0]]
        raise CheckpointError(f"{file}: tensor {lost[0]} is missing, though {index.name} lists it; download it again")
    return Reader(refs, index)


def open_safetensors(path: str | Path) -> Reader:
    """Open one safetensors file.

    Raises:
        CheckpointError: the file cannot be read, or breaks the format: named with the tensor at fault.
    """
    path = Path(path)
    refs = safetensors_refs(path)
    return Reader(packed_refs(refs) if VERSION_KEY in safetensors_metadata(path) else refs, path)


def open_gguf(path: str | Path) -> Reader:
    """Open one GGUF file of a DiT or of a umT5 encoder, by official names; what is quantised stays so.

    Raises:
        CheckpointError: the file cannot be read, breaks the format, is of another architecture, or holds a tensor of a
            type that wanfast does not read: named with the tensor at fault.
    """
    refs = gguf_refs(Path(path))
    return Reader(refs, Path(path)).renamed(gguf_to_official(refs))


def open_pickle(path: str | Path) -> Reader:
    """Open a `.pth` zip pickle that holds one dict of tensors; nothing else in it is ever run.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or holds anything but a dict of tensors.
    """
    import torch  # whose unpickler is needed even for the header

    path = Path(path)
    refuse_pointer(path)
    _refuse_bomb(path)
    seen = path.stat()
    try:
        content = torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # the unpickler raises whatever the damaged bytes lead it to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "Cannot allocate memory" in reason:
            raise CheckpointError(f"{path}: larger than this machine's memory and swap; add swap space") from None
        if "weights_only" in reason or "Weights only" in reason:
            reason = "it holds more than tensors"  # torch would advise to run what it holds
        raise CheckpointError(
            f"{path}: not a zip pickle of plain tensors, or damaged ({reason}); download it again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dict of tensors; use the original file")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path}: entry {name!r} is a {type(tensor).__name__}, not a tensor with a name; "
                "use a file that holds the bare state dict"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: tensor {name} is not a plain dense tensor; use the original file")
    return Reader(_pickled_refs(content, path, seen), path)


def _refuse_bomb(path: Path) -> None:
    """Refuse a zip that unpacks to more than it holds, which torch writes none of; any other fault is told later."""
    packed: list[str] = []
    with suppress(OSError, zipfile.BadZipFile, ValueError, NotImplementedError), zipfile.ZipFile(path) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(
            f"{path}: its entry {packed[0]} is compressed, which torch never does; use the original file"
        )


def _pickled_refs(tensors: Mapping[str, Tensor], path: Path, seen: os.stat_result) -> dict[str, TensorRef]:
    """Where in the file the tensors are that torch has mapped; where the system does not tell, they stay mapped."""
    from wanfast.mappings import MappedFiles

    file, mapped = OpenFile(path, seen), MappedFiles()
    real_path, inode = path.resolve(), (seen.st_dev, seen.st_ino)
    refs = {}
    for name, tensor in tensors.items():
        at = mapped.find(tensor)
        if at is not None and (at.path == real_path or at.inode == inode):
            refs[name] = _pickled_ref(file, at.offset, name, tensor)
        else:
            refs[name] = _memory_ref(path, name, tensor)
    return refs


def _pickled_ref(file: OpenFile, offset: int, name: str, tensor: Tensor) -> TensorRef:
    shape, strides, dtype = tuple(tensor.shape), tensor.stride(), dtype_name(tensor.dtype)
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if tensor.numel() else 0
    stored = StoredBytes(file, offset, span * tensor.itemsize, name)
    if tensor.is_contiguous():
        return replace(plain_ref(stored, shape, dtype), stored_bytes=tensor.nbytes)
    load = partial(_load_strided, stored, shape, strides, dtype)
    first = partial(_first_loaded, load)
    return TensorRef(file.path, name, shape, dtype, load, first, stored_bytes=tensor.nbytes)


def _load_strided(
    stored: StoredBytes, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, where: Where
) -> Tensor:
    return stored.read(where).view(torch_dtype(dtype)).as_strided(shape, strides)


def _tensors_reader(tensors: Mapping[str, Tensor], path: Path) -> Reader:
    return Reader({name: _memory_ref(path, name, tensor) for name, tensor in tensors.items()}, path)


def _memory_ref(path: Path, name: str, tensor: Tensor) -> TensorRef:
    load, first = partial(_taken, tensor), partial(_first_bytes, tensor)
    shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
    return TensorRef(path, name, shape, dtype, load, first, stored_bytes=tensor.nbytes)


def _taken(tensor: Tensor, where: Where) -> Tensor:
    return tensor.detach() if where == "cpu" else tensor.detach().to(where)


def _first_loaded(load: Callable[[Where], Tensor], num_bytes: int) -> bytes:
    return _first_bytes(load("cpu"), num_bytes)


def _first_bytes(tensor: Tensor, num_bytes: int) -> bytes:
    import torch

    return tensor.detach().flatten().view(torch.uint8)[:num_bytes].numpy().tobytes()
