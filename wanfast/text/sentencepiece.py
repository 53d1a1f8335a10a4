"""Builds a vocabulary from a SentencePiece model: the `spiece.model` beside umT5, or what a tensor file holds of it.

Only a unigram model is read, which T5's are. Special tokens and pieces of bytes (`<0x41>`) that are spelled out in a
text become their ids, as with the model's `tokenizer.json`; all else gets SentencePiece's own ids.

Source: google/sentencepiece, src/sentencepiece_model.proto (the message) and src/normalizer.cc (white space).
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

_MAX_BYTES = 100_000_000  # umT5's has 4.5 million
_SPACE = "▁"

# Field numbers of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_MODEL_TYPE, _SPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_SPACE, _ESCAPE_SPACE = 2, 3, 4, 5
_UNIGRAM = 1
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_Field = tuple[int, int | bytes]


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    score: float
    kind: int


def read_sentencepiece(data: bytes) -> tokenizers.Tokenizer:
    """Build the tokenizer of a SentencePiece unigram model.

    Args:
        data: the whole model, a serialised `ModelProto`.

    Returns:
        A tokenizer without post-processor: `encode` adds no token of its own.

    Raises:
        ValueError: the bytes are no such model, or are of a kind that is not read.
    """
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes, more than any SentencePiece model")
    pieces: list[_Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == _PIECES:
            pieces.append(_piece(_message(value)))
        elif number == _TRAINER:
            trainer = dict(_fields(_message(value)))
        elif number == _NORMALIZER:
            normalizer = dict(_fields(_message(value)))
    _check_kind(pieces, trainer, normalizer)
    unknown = [index for index, piece in enumerate(pieces) if piece.kind == _UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"it has {len(unknown)} unknown pieces instead of one")
    vocabulary = tokenizers.Tokenizer(
        models.Unigram(_words(pieces), unk_id=unknown[0], byte_fallback=bool(trainer.get(_BYTE_FALLBACK, 0)))
    )
    vocabulary.normalizer = _normalizer(normalizer)
    prefix = "always" if normalizer.get(_ADD_DUMMY_PREFIX, 1) else "never"
    vocabulary.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme=prefix, split=False)
    special = [piece.text for piece in pieces if piece.kind in (_UNKNOWN, _CONTROL)]
    vocabulary.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    own = [piece.text for piece in pieces if piece.kind == _USER_DEFINED]
    vocabulary.add_tokens([AddedToken(text, normalized=False) for text in own])
    return vocabulary


def _words(pieces: list[_Piece]) -> list[tuple[str, float]]:
    """Text and score of each piece; an unused one keeps its id and is never met.

    The lowest score of all decides what an unknown character costs, and only normal pieces count for that.
    """
    lowest = min((piece.score for piece in pieces if piece.kind == _NORMAL), default=0.0)
    return [
        (f" {index}", lowest) if piece.kind == _UNUSED else (piece.text, max(piece.score, lowest))
        for index, piece in enumerate(pieces)  # a text has no space left when it meets the pieces
    ]


def _check_kind(pieces: list[_Piece], trainer: dict[int, int | bytes], normalizer: dict[int, int | bytes]) -> None:
    if not pieces or not normalizer:
        raise ValueError("it holds no pieces or no normaliser")
    if trainer.get(_MODEL_TYPE, _UNIGRAM) != _UNIGRAM:
        raise ValueError("it is not a unigram model, as T5's are")
    if trainer.get(_SPACE_AS_SUFFIX, 0) or not normalizer.get(_ESCAPE_SPACE, 1):
        raise ValueError("it treats white space in a way that T5's does not")


def _normalizer(spec: dict[int, int | bytes]) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if charsmap := _message(spec.get(_CHARSMAP, b"")):
        try:
            steps.append(normalizers.Precompiled(charsmap))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"its normaliser cannot be read ({error})") from None
    if spec.get(_REMOVE_EXTRA_SPACE, 1):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.get(_ADD_DUMMY_PREFIX, 1):  # even before a space of the text's own, which tokenizers' Metaspace leaves out
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _piece(data: bytes) -> _Piece:
    fields = dict(_fields(data))
    score, kind = fields.get(_PIECE_SCORE, 0), fields.get(_PIECE_TYPE, _NORMAL)
    if not isinstance(kind, int):
        raise ValueError("a piece has no valid type")
    value = struct.unpack("<f", struct.pack("<I", score))[0] if isinstance(score, int) else float("nan")
    if not math.isfinite(value):
        raise ValueError("a piece has no valid score")
    return _Piece(_message(fields.get(_PIECE_TEXT, b"")).decode("utf-8"), value, kind)


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a message has a number where it must have bytes")
    return value


def _fields(data: bytes) -> Iterator[_Field]:
    """Number and value of every field of a protobuf message: an int, or the bytes of a string or an inner message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"byte {at}: no field of a SentencePiece model")
        if size > len(data) - at:
            raise ValueError("it is cut short")
        chunk = data[at : at + size]
        yield number, chunk if wire == 2 else int.from_bytes(chunk, "little")
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    if at < len(data) and data[at] < 128:  # most are: umT5's has 1.5 million
        return data[at], at + 1
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it is cut short")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"byte {at}: no number of a SentencePiece model")
