"""What every file of a checkpoint has in common: how a tensor in it is named, and how its faults are told.

Headers are read without torch, which takes longer to import than a header to read: a dtype is a name until somebody
asks for it, and torch is imported where numbers are loaded.
"""

from __future__ import annotations

import json
import math
import mmap
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanfast.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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
_MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor lies, and how to get it."""

    file: Path
    stored_name: str  # its name in the file
    shape: tuple[int, ...]
    dtype_name: str  # of what `load` gives, as torch calls it: "bfloat16"
    load: Callable[[], Weight]
    first_bytes: Callable[[int], bytes]  # gives so many of its first bytes, as stored; of a file without torch
    stored_as: str | None = None  # what the numbers are where they are not plain `dtype`: "Q4_K", "float8_e4m3fn", ...
    stored_bytes: int | None = None  # where shape and dtype do not tell them
    is_ready: bool = False  # whether 8-bit arithmetic multiplies these very numbers: by wanfast's own kinds of scale

    @property
    def dtype(self) -> torch.dtype:
        """What `load` gives; torch is imported for it."""
        return torch_dtype(self.dtype_name)

    @property
    def num_bytes(self) -> int:
        """Bytes the tensor occupies in its file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype_name] if self.stored_bytes is None else self.stored_bytes


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


class MappedFile:
    """The bytes of a file, mapped while any view of them lives: nothing is read until a view is used.

    When the last view has gone, so has the mapping, and its pages no longer count as this process's memory.
    """

    __slots__ = ("_length", "_pages", "_path")

    def __init__(self, path: Path, length: int) -> None:
        """Map nothing yet; `length` is the file's size in bytes."""
        self._path = path
        self._length = length
        self._pages: weakref.ref[mmap.mmap] | None = None

    def view(self, begin: int, end: int) -> Tensor:
        """Give bytes [begin, end) as uint8 [end - begin], copy-on-write; views share one mapping.

        Raises:
            CheckpointError: the file has gone or has shrunk.
        """
        import torch

        if begin == end:
            return torch.empty(0, dtype=torch.uint8)
        # The tensor keeps the pages.
        return torch.frombuffer(self._mapped(), dtype=torch.uint8, offset=begin, count=end - begin)

    def first(self, begin: int, end: int, num_bytes: int) -> bytes:
        """Copy the first `num_bytes` of bytes [begin, end), or all of them if they are fewer.

        Raises:
            CheckpointError: as `view`.
        """
        return self._mapped()[begin : min(end, begin + num_bytes)] if begin < end else b""

    def _mapped(self) -> mmap.mmap:
        """The mapping that views share, or a new one where there is none."""
        pages = None if self._pages is None else self._pages()
        if pages is not None and self._path.exists() and self._path.stat().st_size < self._length:
            # A page that is mapped and no longer in the file ends the process when it is touched.
            raise CheckpointError(f"{self._path}: has shrunk while it is in use; was it replaced?")
        if pages is None:
            pages = self._map()
            self._pages = weakref.ref(pages)
        return pages

    def _map(self) -> mmap.mmap:
        try:
            with self._path.open("rb") as file:
                if sys.platform == "linux":
                    # Without NORESERVE Linux refuses to map, with copy-on-write, a file larger than memory and swap.
                    flags, protection = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                    return mmap.mmap(file.fileno(), self._length, flags=flags, prot=protection)
                return mmap.mmap(file.fileno(), self._length, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self._path}: cannot be mapped any more ({error}); was it replaced?") from None


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Give the error for a file that the operating system does not let us read."""
    return CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions")
