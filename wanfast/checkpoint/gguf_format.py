"""The GGUF format: a binary header, checked whole before any tensor is believed, and reads of its bytes.

`gguf`'s own reader is not used: it trusts every count in the header, so a damaged one keeps it busy without end, and it
spends seconds on the vocabulary of a text encoder, which is stepped over here unless it is asked for.

Source: ggml-org/ggml, docs/gguf.md; city96/ComfyUI-GGUF, loader.py (prefixes, `comfy.gguf.orig_shape`).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from wanfast.block_sizes import GGUF_BLOCKS
from wanfast.checkpoint.files import (
    ITEM_BYTES,
    StoredBytes,
    TensorRef,
    plain_ref,
    refuse_pointer,
    torch_dtype,
    unreadable,
)
from wanfast.errors import CheckpointError
from wanfast.open_file import OpenFile
from wanfast.stored import GGUFWeight

if TYPE_CHECKING:
    from wanfast.open_file import Where
    from wanfast.stored import Weight

# Every type a tensor can have, by its number in the file; numbers left out have been withdrawn from the format.
# fmt: off
_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}
# fmt: on
_PLAIN = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}
_EXPANDS_TO = "bfloat16"  # until whoever binds a weight says otherwise

# None is stable-diffusion.cpp; "pig" and "cow" are converters that say so instead of naming the model.
_ARCHITECTURES = (None, "wan", "t5", "t5encoder", "pig", "cow")
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

_COUNTS_AT = 8  # bytes; before them stand "GGUF" and the version
_VERSIONS = (2, 3)  # version 1 had 32-bit counts and no published Wan file
_MAX_HEADER_BYTES = 1 << 25  # umT5's, with its vocabulary of 256,384 words, is a quarter of that
_PIECE_BYTES = 1 << 16  # that are read at once
_MAX_ENTRIES = 1 << 16  # keys, and tensors
_MAX_AXES = 8
_MAX_ITEMS = 64  # of an array whose values are wanted
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")  # before a string
_DAMAGED = "the file is damaged; download it again"

_T = TypeVar("_T")


def gguf_refs(path: Path) -> dict[str, TensorRef]:
    """Read the header of a GGUF file into entries by the names it has in the file.

    A quantised matrix loads as `GGUFWeight`, any other quantised tensor (there is none in published files) is expanded
    to fp32.

    Raises:
        CheckpointError: the file cannot be read, breaks the format, is of another architecture, or holds a tensor of a
            type that wanfast does not read: named with the tensor at fault.
    """
    (keys, entries, header_bytes), seen = _with_header(path, _read_header)
    _check_keys(path, keys)
    alignment = keys.get("general.alignment", 32)
    data_start = -(-header_bytes // alignment) * alignment
    file = OpenFile(path, seen)
    refs: dict[str, TensorRef] = {}
    spans: list[tuple[int, int, str]] = []
    for entry in entries:
        shape = _shape(path, entry, keys.get(_ORIGINAL_SHAPE + entry.name))
        kind, num_bytes = _check_type(path, entry)
        begin = data_start + entry.offset
        if entry.offset % alignment:
            raise CheckpointError(f"{path}: tensor {entry.name} starts off the file's alignment; {_DAMAGED}")
        spans.append((begin, begin + num_bytes, entry.name))
        refs[entry.name] = _ref(StoredBytes(file, begin, num_bytes, entry.name), kind, shape)
    _check_spans(path, spans, seen.st_size)
    return refs


def gguf_values(path: Path, prefix: str) -> dict[str, Any]:
    """Read the keys of a GGUF file that begin with `prefix`, arrays whole.

    Returns:
        Numbers as int and float, texts as `str`; an array of numbers as a `memoryview` of them, of texts as a list of
        `bytes`.

    Raises:
        CheckpointError: the file cannot be read, or its header is damaged.
    """
    keys, _ = _with_header(path, lambda cursor: _read_keys(cursor, _read_counts(cursor)[1], prefix))
    return {key: value for key, value in keys.items() if key.startswith(prefix)}


def _with_header(path: Path, read: Callable[[_Cursor], _T]) -> tuple[_T, os.stat_result]:
    """What `read` makes of a file's header, and what the file is like."""
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            seen = os.fstat(file.fileno())
            start = file.read(_COUNTS_AT)
            _check_start(path, start, seen.st_size)
            return read(_Cursor(file, min(seen.st_size, _MAX_HEADER_BYTES), bytearray(start), _COUNTS_AT)), seen
    except OSError as error:
        raise unreadable(path, error) from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; {_DAMAGED}") from None


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor as the header describes it."""

    name: str
    sizes: tuple[int, ...]  # innermost axis first
    type: int
    offset: int  # from the start of the data


@dataclass(slots=True)
class _Cursor:
    """A place in the header; reading past its end is a ValueError."""

    file: BinaryIO
    limit: int  # bytes that there are, or may be
    data: bytearray  # of the file, from its start, as far as it was read
    place: int

    def skip(self, num_bytes: int) -> None:
        """Step over bytes that must be there."""
        missing = self.place + num_bytes - len(self.data)
        if num_bytes <= self.limit - self.place and missing > 0:
            self.data += self.file.read(min(max(missing, _PIECE_BYTES), self.limit - len(self.data)))
        if num_bytes > len(self.data) - self.place:
            cut = self.limit < _MAX_HEADER_BYTES
            raise ValueError("cut short within its header" if cut else f"header exceeds {_MAX_HEADER_BYTES} bytes")
        self.place += num_bytes

    def numbers(self, layout: str) -> tuple[Any, ...]:
        """Little-endian numbers, as `struct` writes their types."""
        begin = self.place
        self.skip(struct.calcsize(f"<{layout}"))
        return struct.unpack_from(f"<{layout}", self.data, begin)

    def texts(self, count: int, *, keep: bool) -> list[bytes]:
        """Strings, or none where they are only stepped over; ends with the header at the latest."""
        found: list[bytes] = []
        for _ in range(count):  # a loop for speed: a vocabulary has 256,384 of them
            self.skip(_LENGTH.size)
            (length,) = _LENGTH.unpack_from(self.data, self.place - _LENGTH.size)
            self.skip(length)
            if keep:
                found.append(bytes(self.data[self.place - length : self.place]))
        return found

    def text(self) -> str:
        """A string."""
        return self.texts(1, keep=True)[0].decode("utf-8")


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], list[_Entry], int]:
    """The keys that are looked at, every tensor, and the header's length."""
    num_tensors, num_keys = _read_counts(cursor)
    keys = _read_keys(cursor, num_keys)
    entries: dict[str, _Entry] = {}
    for _ in range(num_tensors):
        entry = _read_entry(cursor)
        if entry.name in entries:
            raise ValueError(f"tensor {entry.name} appears twice")
        entries[entry.name] = entry
    return keys, list(entries.values()), cursor.place


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """How many tensors and keys there are."""
    num_tensors, num_keys = cursor.numbers("QQ")
    if max(num_tensors, num_keys) > _MAX_ENTRIES:
        raise ValueError(f"header claims {num_tensors} tensors and {num_keys} keys")
    return num_tensors, num_keys


def _read_keys(cursor: _Cursor, num_keys: int, whole: str | None = None) -> dict[str, Any]:
    """Every key, with its value where somebody looks at it; those that begin with `whole` to the last item."""
    keys: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text()
        if key in keys:
            raise ValueError(f"key {key} appears twice")
        (kind,) = cursor.numbers("I")
        keys[key] = _read_value(cursor, key, kind, is_whole=whole is not None and key.startswith(whole))
    return keys


def _read_value(cursor: _Cursor, key: str, kind: int, *, is_whole: bool) -> Any:
    """The value of a key; None for one that nobody looks at: long texts and arrays are stepped over."""
    is_wanted = is_whole or key.startswith(("general.", "split.", _ORIGINAL_SHAPE))
    if kind in _SCALARS:
        return cursor.numbers(_SCALARS[kind])[0]
    if kind == _STRING:
        text = cursor.texts(1, keep=is_wanted)
        return text[0].decode("utf-8") if is_wanted else None
    if kind != _ARRAY:
        raise ValueError(f"key {key} has unknown type {kind}")
    item, count = cursor.numbers("IQ")
    if item == _STRING:
        texts = cursor.texts(count, keep=is_whole)
        return texts if is_whole else None
    if item not in _SCALARS:
        raise ValueError(f"key {key} is an array of unknown type {item}")
    if is_wanted and not is_whole and count <= _MAX_ITEMS:
        return cursor.numbers(f"{count}{_SCALARS[item]}")
    begin = cursor.place
    cursor.skip(count * struct.calcsize(f"<{_SCALARS[item]}"))
    if not is_whole:
        return None
    numbers: Any = memoryview(bytes(cursor.data[begin : cursor.place]))
    return numbers.cast(_SCALARS[item])


def _read_entry(cursor: _Cursor) -> _Entry:
    name = cursor.text()
    (num_axes,) = cursor.numbers("I")
    if num_axes > _MAX_AXES:
        raise ValueError(f"tensor {name} claims {num_axes} axes")
    sizes = cursor.numbers(f"{num_axes}Q")
    kind, offset = cursor.numbers("IQ")
    return _Entry(name, sizes, kind, offset)


def _check_start(path: Path, start: bytes, file_bytes: int) -> None:
    if not start.startswith(b"GGUF") or file_bytes < _COUNTS_AT + 16:
        raise CheckpointError(f"{path}: not a GGUF file; download it again")
    version = int.from_bytes(start[4:], "little")
    if int.from_bytes(start[4:], "big") in _VERSIONS:
        raise CheckpointError(f"{path}: is a big-endian GGUF file; wanfast reads little-endian ones")
    if version not in _VERSIONS:
        raise CheckpointError(
            f"{path}: is of GGUF version {version}; wanfast reads {' and '.join(map(str, _VERSIONS))}"
        )


def _check_keys(path: Path, keys: dict[str, Any]) -> None:
    architecture = keys.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"{path}: is a GGUF file of architecture {architecture!r}; wanfast reads wan and t5encoder (umT5)"
        )
    if keys.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{path}: is one of {keys['split.count']} parts of a split GGUF file; "
            "join them with llama-gguf-split --merge"
        )
    alignment = keys.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}, not a power of two; {_DAMAGED}")


def _shape(path: Path, entry: _Entry, original: Any) -> tuple[int, ...]:
    """Outermost axis first; `original` stands in for a shape that the file could not express."""
    num_elements = math.prod(entry.sizes)
    if not 0 < num_elements < 2**63:
        raise CheckpointError(f"{path}: tensor {entry.name} has no valid shape; {_DAMAGED}")
    if original is None:
        return tuple(reversed(entry.sizes))
    is_shape = isinstance(original, tuple) and all(type(size) is int and size > 0 for size in original)
    if not is_shape or math.prod(original) != num_elements:
        raise CheckpointError(f"{path}: tensor {entry.name} has an original shape that does not fit it; {_DAMAGED}")
    return tuple(original)


def _check_type(path: Path, entry: _Entry) -> tuple[str, int]:
    """The type's name, and the bytes the tensor occupies."""
    kind = _TYPES.get(entry.type, f"type {entry.type}")
    num_elements = math.prod(entry.sizes)
    if kind in _PLAIN:
        return kind, num_elements * ITEM_BYTES[_PLAIN[kind]]
    if kind not in GGUF_BLOCKS:
        readable = ", ".join(GGUF_BLOCKS)
        raise CheckpointError(
            f"{path}: tensor {entry.name} is stored as {kind}; wanfast reads {readable}: get the file in one of them"
        )
    elements, num_bytes = GGUF_BLOCKS[kind]
    if not entry.sizes or entry.sizes[0] % elements:
        raise CheckpointError(f"{path}: tensor {entry.name} has rows that are not whole blocks of {kind}; {_DAMAGED}")
    return kind, num_elements // elements * num_bytes


def _check_spans(path: Path, spans: list[tuple[int, int, str]], file_bytes: int) -> None:
    position = 0
    for begin, end, name in sorted(spans):
        if end > file_bytes:
            raise CheckpointError(
                f"{path}: tensor {name} ends at byte {end}, but the file has {file_bytes}: it is cut short; "
                "download it again"
            )
        if begin < position:
            raise CheckpointError(f"{path}: tensor {name} overlaps the one before it; {_DAMAGED}")
        position = end


def _ref(stored: StoredBytes, kind: str, shape: tuple[int, ...]) -> TensorRef:
    if kind in _PLAIN:
        return plain_ref(stored, shape, _PLAIN[kind])
    is_matrix = len(shape) == 2 and shape[1] % GGUF_BLOCKS[kind].elements == 0
    return TensorRef(
        stored.file.path,
        stored.name,
        shape,
        _EXPANDS_TO if is_matrix else "float32",
        partial(_matrix if is_matrix else _expanded, stored, shape, kind),
        stored.first,
        stored_as=kind,
        stored_bytes=stored.num_bytes,
        rows=partial(_matrix_rows, stored, shape, kind) if is_matrix else None,
    )


def _matrix(stored: StoredBytes, shape: tuple[int, ...], kind: str, where: Where) -> Weight:
    return GGUFWeight(stored.read(where).view(shape[0], -1), kind, shape[1], torch_dtype(_EXPANDS_TO))


def _matrix_rows(stored: StoredBytes, shape: tuple[int, ...], kind: str, rows: Sequence[int]) -> Weight:
    return GGUFWeight(stored.rows(rows, shape[0]), kind, shape[1], torch_dtype(_EXPANDS_TO))


def _expanded(stored: StoredBytes, shape: tuple[int, ...], kind: str, where: Where) -> Weight:
    import torch

    from wanfast.kernels import dequantize_gguf  # which takes torch and triton

    if where == "meta":
        return torch.empty(shape, dtype=torch.float32, device=where)
    data = stored.read(where).view(1, -1)
    row = dequantize_gguf(data, kind, in_features=math.prod(shape), dtype=torch.float32)
    return row.view(shape)
