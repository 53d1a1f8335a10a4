"""The vocabulary inside the GGUF file of a umT5 encoder, given as the SentencePiece model that it was made from.

    tokenizer.ggml.model                                  "t5": a unigram vocabulary
    tokenizer.ggml.tokens, .scores, .token_type           text, score and type of each piece
    tokenizer.ggml.precompiled_charsmap                   table of the normaliser, bytes
    tokenizer.ggml.add_space_prefix, .remove_extra_whitespaces

Types are numbered as SentencePiece numbers them. Whether unknown characters become bytes is not said: they do where
there are pieces of bytes.

Sources: ggml-org/llama.cpp, convert_hf_to_gguf.py (T5Model.set_vocab); google/sentencepiece,
src/sentencepiece_model.proto.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanfast.checkpoint.files import TensorRef
from wanfast.checkpoint.gguf_format import gguf_values
from wanfast.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from wanfast.open_file import Where

_PREFIX = "tokenizer.ggml."
_UNIGRAM = "t5"
_NORMAL, _BYTE = 1, 6  # first and last number of a type

# Tags of sentencepiece_model.proto: number of the field, and how its value is written.
_PIECES, _TRAINER, _NORMALIZER = b"\x0a", b"\x12", b"\x1a"
_TEXT, _SCORE, _TYPE = b"\x0a", b"\x15", b"\x18"
_MODEL_TYPE, _BYTE_FALLBACK = b"\x18", b"\x98\x02"
_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_SPACE = b"\x12", b"\x18", b"\x20"


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """What the file says, checked."""

    texts: Sequence[bytes]
    scores: Sequence[float]
    types: Sequence[int]
    settings: bytes  # the messages behind the pieces

    @property
    def num_bytes(self) -> int:
        """Of the model."""
        lengths = Counter(map(len, self.texts))
        return len(self.settings) + sum(num * len(_piece(bytes(size), 0.0, 1)) for size, num in lengths.items())


def gguf_vocabulary(path: Path, num_tokens: int) -> TensorRef | None:
    """Find the vocabulary in a GGUF file.

    Args:
        path: of the file.
        num_tokens: rows of its embedding.

    Returns:
        Bytes of a serialised SentencePiece model, uint8 [bytes], made when they are loaded; None where the file has no
        vocabulary, or one that is not a unigram.

    Raises:
        CheckpointError: a key is missing, damaged, or does not fit the embedding; named.
    """
    vocabulary = _read(path, num_tokens)
    if vocabulary is None:
        return None
    load, first = partial(_load, path, num_tokens), partial(_model, path, num_tokens)
    return TensorRef(path, f"{_PREFIX}tokens", (vocabulary.num_bytes,), "uint8", load, first)


def _load(path: Path, num_tokens: int, _: Where) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(_model(path, num_tokens)), dtype=torch.uint8)


def _model(path: Path, num_tokens: int, num_bytes: int | None = None) -> bytes:
    """The serialised model, or its first bytes."""
    vocabulary = _read(path, num_tokens)
    assert vocabulary is not None
    pieces = map(_piece, vocabulary.texts, vocabulary.scores, vocabulary.types)
    return b"".join((*pieces, vocabulary.settings))[:num_bytes]


def _read(path: Path, num_tokens: int) -> _Vocabulary | None:
    values = gguf_values(path, _PREFIX)
    if values.get(f"{_PREFIX}model") != _UNIGRAM:
        return None
    texts = _array(path, values, "tokens", num_tokens, list)
    scores = _array(path, values, "scores", num_tokens, memoryview, formats="f")
    types = _array(path, values, "token_type", num_tokens, memoryview, formats="bBhHiIqQ")
    wrong = next((index for index, score in enumerate(scores) if not math.isfinite(score)), None)
    if wrong is not None:
        raise _damaged(path, "scores", f"gives token {wrong} a score that is not finite")
    strange = set(types) - set(range(_NORMAL, _BYTE + 1))
    if strange:
        raise _damaged(path, "token_type", f"has type {min(strange)}, which is none of a vocabulary's")
    return _Vocabulary(texts, scores, types, _settings(path, values, has_bytes=_BYTE in types))


def _array(path: Path, values: dict[str, Any], name: str, length: int, kind: type[Any], formats: str = "") -> Any:
    """An array with one item for each token."""
    value = values.get(_PREFIX + name)
    if not isinstance(value, kind) or (isinstance(value, memoryview) and value.format not in formats):
        raise _damaged(path, name, "is missing or of another type than a vocabulary's")
    if len(value) != length:
        raise _damaged(path, name, f"has {len(value)} items, but tensor token_embd.weight has {length} rows")
    return value


def _settings(path: Path, values: dict[str, Any], *, has_bytes: bool) -> bytes:
    """The messages of the trainer and the normaliser, as far as they matter to a text."""
    charsmap = values.get(f"{_PREFIX}precompiled_charsmap", memoryview(b""))
    if not isinstance(charsmap, memoryview) or charsmap.itemsize != 1:
        raise _damaged(path, "precompiled_charsmap", "is not an array of bytes")
    flags = {}
    for name in ("add_space_prefix", "remove_extra_whitespaces"):
        flags[name] = values.get(_PREFIX + name, 1)
        if flags[name] not in (0, 1):
            raise _damaged(path, name, f"is {flags[name]!r}, not true or false")
    trainer = _MODEL_TYPE + _varint(1) + _BYTE_FALLBACK + _varint(has_bytes)
    normalizer = _ADD_DUMMY_PREFIX + _varint(flags["add_space_prefix"])
    normalizer += _REMOVE_EXTRA_SPACE + _varint(flags["remove_extra_whitespaces"])
    return _message(_TRAINER, trainer) + _message(_NORMALIZER, _message(_CHARSMAP, charsmap.tobytes()) + normalizer)


def _piece(text: bytes, score: float, kind: int) -> bytes:
    return _message(_PIECES, _message(_TEXT, text) + _SCORE + struct.pack("<f", score) + _TYPE + _varint(kind))


def _message(tag: bytes, content: bytes) -> bytes:
    return tag + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes((*groups, value))


def _damaged(path: Path, name: str, fault: str) -> CheckpointError:
    return CheckpointError(f"{path}: key {_PREFIX}{name} {fault}; download the file again")
