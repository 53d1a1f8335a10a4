"""The safetensors format: a JSON header, checked whole before any tensor is believed, and reads of its bytes.

Source: https://github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from wanfast.checkpoint.files import (
    ITEM_BYTES,
    StoredBytes,
    TensorRef,
    parse_object,
    plain_ref,
    refuse_pointer,
    unreadable,
)
from wanfast.errors import CheckpointError
from wanfast.open_file import OpenFile

DTYPES = {  # torch's names by the format's
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}

# The format's own limit; a longer header is damage, and must not be read into memory.
_MAX_HEADER_BYTES = 100_000_000
_DAMAGED = "the file is damaged; download it again"


def safetensors_refs(path: Path) -> dict[str, TensorRef]:
    """Read the header of a safetensors file into entries by tensor name.

    Raises:
        CheckpointError: the file cannot be read or breaks the format: named with the tensor at fault.
    """
    header, data_start, seen = _read_header(path)
    header.pop("__metadata__", None)

    file, data_bytes = OpenFile(path, seen), seen.st_size - data_start
    refs: dict[str, TensorRef] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        shape, dtype, begin, end = _check_entry(path, name, entry)
        spans.append((begin, end, name))
        stored = StoredBytes(file, data_start + begin, end - begin, name)
        refs[name] = plain_ref(stored, shape, dtype)
    _check_spans(path, spans, data_bytes)
    return refs


def safetensors_metadata(path: Path) -> dict[str, str]:
    """Read the free-form text entries of a safetensors header.

    Raises:
        CheckpointError: the file cannot be read, or the entries are not text.
    """
    entries = _read_header(path)[0].get("__metadata__", {})
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        raise CheckpointError(f"{path}: its __metadata__ is not a map from text to text; {_DAMAGED}")
    return entries


def _read_header(path: Path) -> tuple[dict[str, Any], int, os.stat_result]:
    """Header, byte where the data starts, what the file is like."""
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            seen = os.fstat(file.fileno())
            file_bytes = seen.st_size
            length = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or not 2 <= length <= _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: not a safetensors file; download it again")
            if length > file_bytes - 8:
                raise CheckpointError(
                    f"{path}: not a safetensors file, or cut short within its header "
                    f"(of {length} bytes, in a file of {file_bytes}); download it again"
                )
            text = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        return parse_object(text), 8 + length, seen
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file (header: {error}); download it again") from None


def _check_entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], str, int, int]:
    """Shape, dtype, first and last-plus-one byte of one header entry, each checked."""
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: tensor {name} has no dtype, shape and data_offsets; {_DAMAGED}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name} has dtype {entry['dtype']!r}; wanfast reads {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or math.prod(max(size, 1) for size in shape) >= 2**63:
        raise CheckpointError(f"{path}: tensor {name} has no valid shape; {_DAMAGED}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: tensor {name} has no valid data_offsets; {_DAMAGED}")
    begin, end = offsets
    want = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != want:
        raise CheckpointError(
            f"{path}: tensor {name} occupies {end - begin} bytes, but {entry['dtype']} {shape} is {want}; {_DAMAGED}"
        )
    return tuple(shape), dtype, begin, end


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_spans(path: Path, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    """Tensors must cover the data without gap or overlap, as the format demands."""
    position = 0
    for begin, end, name in sorted(spans):
        if end > data_bytes:
            raise CheckpointError(
                f"{path}: tensor {name} ends at byte {end} of the data, but the file holds {data_bytes}: "
                "the file is cut short; download it again"
            )
        if begin != position:
            fault = "overlaps the one before it" if begin < position else f"leaves {begin - position} bytes unused"
            raise CheckpointError(f"{path}: tensor {name} {fault}; {_DAMAGED}")
        position = end
    if position != data_bytes:
        raise CheckpointError(f"{path}: {data_bytes - position} bytes after the last tensor; {_DAMAGED}")
