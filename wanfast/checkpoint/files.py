"""What every file of a checkpoint has in common: how a tensor in it is named, and how its faults are told."""

import json
import math
import mmap
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanfast.errors import CheckpointError
from wanfast.stored import Weight

_GIT_LFS_POINTER = b"version https://git-lfs"
_MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor lies, and how to get it."""

    file: Path
    stored_name: str  # its name in the file
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Weight]
    stored_as: str | None = None  # what the numbers are where they are not plain `dtype`: "Q4_K", "float8_e4m3fn", ...
    stored_bytes: int | None = None  # where shape and dtype do not tell them

    @property
    def num_bytes(self) -> int:
        """Bytes the tensor occupies in its file."""
        return math.prod(self.shape) * self.dtype.itemsize if self.stored_bytes is None else self.stored_bytes


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
        if begin == end:
            return torch.empty(0, dtype=torch.uint8)
        pages = None if self._pages is None else self._pages()
        if pages is not None and self._path.exists() and self._path.stat().st_size < self._length:
            # A page that is mapped and no longer in the file ends the process when it is touched.
            raise CheckpointError(f"{self._path}: has shrunk while it is in use; was it replaced?")
        if pages is None:
            pages = self._map()
            self._pages = weakref.ref(pages)
        return torch.frombuffer(pages, dtype=torch.uint8, offset=begin, count=end - begin)  # which keeps the pages

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
