"""What every file of a checkpoint has in common: how a tensor in it is named, and how its faults are told.

Headers are read without torch, which takes longer to import than a header to read: a dtype is a name until somebody
asks for it, and torch is imported where numbers are loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanfast.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wanfast.open_file import OpenFile, Where
    from wanfast.stored import Weight

# Bytes of one number, of every dtype that a file's header can name.
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
_GIT_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor lies, and how to get it."""

    file: Path
    stored_name: str  # its name in the file
    shape: tuple[int, ...]
    dtype_name: str  # of what `load` gives, as torch calls it: "bfloat16"
    load: Callable[[Where], Weight]  # on the CPU, in memory of its own
    first_bytes: Callable[[int], bytes]  # gives so many of its first bytes, as stored; of a file without torch
    stored_as: str | None = None  # what the numbers are where they are not plain `dtype`: "Q4_K", "float8_e4m3fn", ...
    stored_bytes: int | None = None  # where shape and dtype do not tell them
    is_ready: bool = False  # whether 8-bit arithmetic multiplies these very numbers: by wanfast's own kinds of scale
    rows: Callable[[Sequence[int]], Weight] | None = None  # reads these rows alone; None: it is only read whole

    @property
    def dtype(self) -> torch.dtype:
        """What `load` gives; torch is imported for it."""
        return torch_dtype(self.dtype_name)

    @property
    def num_bytes(self) -> int:
        """Bytes the tensor occupies in its file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype_name] if self.stored_bytes is None else self.stored_bytes


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """The bytes of one tensor in a file."""

    file: OpenFile
    offset: int
    num_bytes: int
    name: str

    def read(self, where: Where) -> Tensor:
        """Give all of them, uint8 [num_bytes].

        Raises:
            CheckpointError: they cannot be read, or the file is not what it was.
        """
        return self.file.tensor(self.offset, self.num_bytes, f"tensor {self.name}", where)

    def rows(self, rows: Sequence[int], count: int) -> Tensor:
        """Give some of `count` equal rows, uint8 [rows, bytes of a row]; each is read once.

        Raises:
            CheckpointError: as `read`.
        """
        import torch

        size = self.num_bytes // max(1, count)
        if not rows or not size:
            return torch.empty(len(rows), size, dtype=torch.uint8)
        places = {row: self.offset + row * size for row in rows}
        read = {row: self.file.tensor(place, size, f"tensor {self.name}") for row, place in places.items()}
        return torch.stack([read[row] for row in rows])

    def first(self, num_bytes: int) -> bytes:
        """Give the first bytes, or all where they are fewer; without torch.

        Raises:
            CheckpointError: as `read`.
        """
        return self.file.first(self.offset, min(num_bytes, self.num_bytes), f"tensor {self.name}")


def plain_ref(stored: StoredBytes, shape: tuple[int, ...], dtype: str) -> TensorRef:
    """Make the entry of a tensor whose bytes are numbers of one dtype."""
    load, rows = partial(_load_plain, stored, shape, dtype), partial(_load_rows, stored, shape, dtype)
    return TensorRef(stored.file.path, stored.name, shape, dtype, load, stored.first, rows=rows if shape else None)


def _load_plain(stored: StoredBytes, shape: tuple[int, ...], dtype: str, where: Where) -> Tensor:
    return stored.read(where).view(torch_dtype(dtype)).view(shape)


def _load_rows(stored: StoredBytes, shape: tuple[int, ...], dtype: str, rows: Sequence[int]) -> Tensor:
    return stored.rows(rows, shape[0]).view(-1).view(torch_dtype(dtype)).view(len(rows), *shape[1:])


def torch_dtype(name: str) -> torch.dtype:
    """Give the dtype that torch calls so."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Give torch's name of a dtype, without "torch." before it."""
    return str(dtype).removeprefix("torch.")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, is not an object, or has a key twice.
    """
    refuse_pointer(path)
    try:
        return parse_object(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON object ({error}); download it again") from None


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: it is anything else, or has a key twice.
        RecursionError: it is nested too deeply.
    """

    def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"{key} appears twice")
            result[key] = value
        return result

    content = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    if not isinstance(content, dict):
        raise ValueError(f"it is a {type(content).__name__}")
    return content


def refuse_pointer(path: Path) -> None:
    """Refuse what a clone made without Git LFS holds in place of the weights: small text files.

    Raises:
        CheckpointError: the file is one, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_GIT_LFS_POINTER)) == _GIT_LFS_POINTER
    except OSError as error:
        raise unreadable(path, error) from None
    if is_pointer:
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Give the error for a file that the operating system does not let us read."""
    return CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions")
