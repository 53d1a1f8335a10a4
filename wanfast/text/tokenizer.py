"""From a prompt to token ids: cleaning, then the model's own SentencePiece unigram vocabulary.

Cleaning and the vocabulary are the reference's; a prompt ends in `</s>`, has no other special token and no padding.
Source: Wan-Video/Wan2.2, wan/modules/tokenizers.py.
"""

import html
import re
from dataclasses import dataclass
from pathlib import Path

import ftfy
import tokenizers

from wanfast.errors import CheckpointError, RequestError
from wanfast.text.sentencepiece import read_sentencepiece

_FILE_NAME = "tokenizer.json"
_SENTENCEPIECE_NAME = "spiece.model"
_END_OF_TEXT = "</s>"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A vocabulary read from a model's `tokenizer.json` or SentencePiece model."""

    vocabulary: tokenizers.Tokenizer
    end_id: int  # of </s>
    path: Path  # the file it came from


@dataclass(frozen=True, slots=True)
class TokenIds:
    """One tokenized prompt."""

    ids: tuple[int, ...]  # true tokens only, </s> last
    num_dropped: int  # tokens cut off so that the prompt fits

    @property
    def is_truncated(self) -> bool:
        """Whether the end of the prompt was cut off."""
        return self.num_dropped > 0


def clean_prompt(text: str) -> str:
    """Repair broken encodings, resolve HTML entities and make every run of white space one space.

    Args:
        text: as typed; entities may be escaped twice (`&amp;lt;`), white space is Unicode's.

    Returns:
        The text the model was trained to see; case and punctuation are kept, so "" only for blank text.

    Source: Wan-Video/Wan2.2, wan/modules/tokenizers.py, clean="whitespace".
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a vocabulary.

    Args:
        path: a `tokenizer.json` or `spiece.model`, or a folder that holds one (`google/umt5-xxl/` of the official
            layout, `tokenizer/` of the Diffusers layout); of both the first.

    Raises:
        CheckpointError: the file is missing, cannot be read, or has no `</s>`.
    """
    path = Path(path)
    inside = [path / name for name in (_FILE_NAME, _SENTENCEPIECE_NAME) if (path / name).is_file()]
    file = inside[0] if inside else path
    if not file.is_file():
        raise CheckpointError(f"{path}: no {_FILE_NAME} here, found nothing; copy it from google/umt5-xxl of the model")
    if file.suffix == ".model":
        return tokenizer_of_sentencepiece(file.read_bytes(), file)
    try:
        vocabulary = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{file}: not a readable {_FILE_NAME} ({error}); download it again") from error
    return _tokenizer(vocabulary, file)


def tokenizer_of_sentencepiece(data: bytes, file: Path) -> Tokenizer:
    """Read a vocabulary from the bytes of a SentencePiece model.

    Args:
        data: the model.
        file: that holds it, for messages.

    Raises:
        CheckpointError: the bytes are no such model, or it has no `</s>`.
    """
    try:
        vocabulary = read_sentencepiece(data)
    except ValueError as error:
        raise CheckpointError(f"{file}: holds no readable SentencePiece model ({error}); download it again") from None
    return _tokenizer(vocabulary, file)


def _tokenizer(vocabulary: tokenizers.Tokenizer, file: Path) -> Tokenizer:
    end_id = vocabulary.token_to_id(_END_OF_TEXT)
    if end_id is None:
        raise CheckpointError(f"{file}: the vocabulary has no {_END_OF_TEXT}; use the model's own tokenizer")
    # A file saved after use carries the padding and truncation of that use.
    vocabulary.no_padding()
    vocabulary.no_truncation()
    return Tokenizer(vocabulary, end_id, file)


def tokenize(tokenizer: Tokenizer, text: str, max_length: int) -> TokenIds:
    """Turn a cleaned prompt into ids, cutting its end off where it is too long.

    Args:
        tokenizer: from `load_tokenizer`.
        text: from `clean_prompt`; "" gives `</s>` alone.
        max_length: most ids to return, `</s>` included, >= 1; 512 for the Wan models.

    Returns:
        At least one id; the last is always `</s>`. Special tokens spelled out in the text become their ids.

    Raises:
        RequestError: max_length < 1, or the text is not valid Unicode.
        CheckpointError: the vocabulary's file is damaged in a way that only shows here.
    """
    if max_length < 1:
        raise RequestError(f"max_length: must be >= 1, got {max_length}; </s> alone takes one token")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = text[error.start]
        raise RequestError(f"prompt: must be valid Unicode, got {surrogate!r} at position {error.start}") from None
    # The file's own post-processor is left out: it may add </s>, another token or none.
    try:
        ids = tokenizer.vocabulary.encode(text, add_special_tokens=False).ids
    except BaseException as error:  # what tokenizers raises where its tables lead it astray is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{tokenizer.path}: its normaliser is damaged ({error}); download it again") from None
    kept = ids[: max_length - 1]
    return TokenIds((*kept, tokenizer.end_id), num_dropped=len(ids) - len(kept))
