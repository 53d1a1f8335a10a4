"""A small SentencePiece model with T5's special tokens, byte pieces and normalisation; and the same in a GGUF file."""

import io
import random
from collections.abc import Callable
from typing import Any

import gguf

# fmt: off
WORDS = (
    "a", "the", "red", "ball", "rolling", "left", "猫", "在", "跑", "größe", "naïve", "fi", "ﬁne", "①", "Ａ",
    "ｈｅｌｌｏ", "cat", "dog", "moves", "slowly", "sky",
)
# fmt: on


def train_spiece(*, vocab_size: int = 390, byte_fallback: bool = True, **options: Any) -> bytes:
    """Train one; it has at most `vocab_size` pieces. `options` are the trainer's own."""
    import sentencepiece

    draw = random.Random(0)
    sentences = [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) for _ in range(300)]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=written,
        vocab_size=vocab_size,
        model_type="unigram",
        byte_fallback=byte_fallback,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        user_defined_symbols=["<extra_id_0>"],
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return written.getvalue()


def gguf_keys(spiece: bytes, rows: int, **changes: Any) -> Callable[[gguf.GGUFWriter], None]:
    """Keys of a GGUF file that llama.cpp's converter makes of a T5 model: unused tokens fill up the embedding's rows.

    Args:
        spiece: the model.
        rows: of the embedding.
        changes: other values of the keys, without their prefix; None leaves one out. The two flags about spaces are
            not read from the model.
    """
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    kinds = gguf.TokenType
    tests = {
        kinds.UNKNOWN: model.is_unknown,
        kinds.CONTROL: model.is_control,
        kinds.UNUSED: model.is_unused,
        kinds.BYTE: model.is_byte,
    }
    size, spare = model.get_piece_size(), range(model.get_piece_size(), rows)
    types = [next((int(kind) for kind, test in tests.items() if test(i)), int(kinds.NORMAL)) for i in range(size)]
    values: dict[str, Any] = {
        "model": "t5",
        "pre": "default",
        "tokens": [model.id_to_piece(index).encode() for index in range(size)] + [b"[PAD%d]" % i for i in spare],
        "scores": [model.get_score(index) for index in range(size)] + [-10000.0 for _ in spare],
        "token_type": types + [int(kinds.UNUSED) for _ in spare],
        "add_space_prefix": True,
        "remove_extra_whitespaces": True,
        "precompiled_charsmap": charsmap(spiece),
        "eos_token_id": model.eos_id(),
        "padding_token_id": model.pad_id(),
    }
    writers = {str: "add_string", bool: "add_bool", int: "add_uint32", list: "add_array", bytes: "add_array"}

    def write(writer: gguf.GGUFWriter) -> None:
        for name, value in (values | changes).items():
            if value is not None:
                getattr(writer, writers[type(value)])(f"tokenizer.ggml.{name}", value)

    return write


def charsmap(spiece: bytes) -> bytes | None:
    """The table that stands behind the name of the normalisation in the model's bytes."""
    start = b"\x0a\x08nmt_nfkc\x12"
    if start not in spiece:
        return None
    place, size, shift = spiece.index(start) + len(start), 0, 0
    while True:
        byte = spiece[place]
        place, size, shift = place + 1, size | (byte & 127) << shift, shift + 7
        if byte < 128:
            return spiece[place : place + size]
