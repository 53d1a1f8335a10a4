"""What every file of a checkpoint has in common: how a tensor in it is named, and how its faults are told."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanfast.errors import CheckpointError

_GIT_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor lies, and how to get it."""

    file: Path
    stored_name: str  # its name in the file
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes the tensor occupies."""
        return math.prod(self.shape) * self.dtype.itemsize


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
