import contextlib
import io
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.vocabulary import charsmap, train_spiece

from wanfast.errors import CheckpointError
from wanfast.text.sentencepiece import read_sentencepiece
from wanfast.text.tokenizer import clean_prompt, load_tokenizer, tokenize, tokenizer_of_sentencepiece


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_spiece()


@pytest.mark.parametrize(
    "text",
    [
        "a red ball rolling left, slowly!",
        "  leading,  double and trailing  ",
        "größe naïve ﬁne ① Ａ ｈｅｌｌｏ",
        "猫在跑 — 红色的球",
        "emoji 🎬 and ¨ accents é",
        "zero\u200bwidth\ttab",
        "",
    ],
)
def test_ids_are_sentencepieces_own(model, text):
    own = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert read_sentencepiece(model).encode(text, add_special_tokens=False).ids == own.encode(text)


def test_random_texts_give_sentencepieces_ids(model):
    own, ours = sentencepiece.SentencePieceProcessor(model_proto=model), read_sentencepiece(model)
    draw = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyzABC0123.,!?'\"-  猫跑ßﬁ①Ａ\u3000é🎬¨"
    for _ in range(300):
        text = clean_prompt("".join(draw.choices(letters, k=draw.randint(1, 40))))
        assert ours.encode(text, add_special_tokens=False).ids == own.encode(text), repr(text)


def test_a_prompt_ends_in_the_end_token(model, tmp_path: Path):
    (tmp_path / "spiece.model").write_bytes(model)
    own = sentencepiece.SentencePieceProcessor(model_proto=model)
    for path in (tmp_path, tmp_path / "spiece.model"):
        assert tokenize(load_tokenizer(path), "a red ball", 512).ids == (*own.encode("a red ball"), own.eos_id())


def test_special_tokens_spelled_out_become_ids(model):
    vocabulary = read_sentencepiece(model)
    assert vocabulary.encode("</s><pad>", add_special_tokens=False).ids == [1, 0]
    assert vocabulary.encode("<0x41>", add_special_tokens=False).tokens == ["▁", "<0x41>"]


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_other_models_are_refused(kind):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red ball rolls left"] * 50),
        model_writer=written,
        vocab_size=18,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    with pytest.raises(ValueError, match="not a unigram model"):
        read_sentencepiece(written.getvalue())


def test_bytes_that_are_no_model_are_refused(model, tmp_path):
    for damaged in (b"", b"\x0a\x05ab", model[:-1], model[: len(model) // 2], b"\x0b", b"\xff" * 20, bytes(8)):
        file = tmp_path / "spiece.model"
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"spiece\.model: holds no readable SentencePiece model"):
            load_tokenizer(file)


def test_a_table_that_leads_astray_is_refused(model):
    """tokenizers panics on some tables, which would pass every `except Exception`."""
    table = charsmap(model)
    assert table is not None
    begin, size = model.index(table) + 4, int.from_bytes(table[:4], "little")  # of its trie
    draw, told = random.Random(0), set()
    for _ in range(10):
        changed = bytearray(model)
        for _ in range(size // 20):
            changed[begin + draw.randrange(size)] = draw.randrange(256)
        tokenizer = tokenizer_of_sentencepiece(bytes(changed), Path("my.model"))
        try:
            tokenize(tokenizer, "größe ① ﬁ ｈｅｌｌｏ\u3000猫", 512)
        except CheckpointError as error:
            told.add(str(error).partition(" (")[0])
    assert told == {"my.model: its normaliser is damaged"}


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_raise_nothing_else(data):
    with pytest.raises(ValueError):
        read_sentencepiece(data)


@given(place=st.integers(0, 10**9), byte=st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_a_changed_byte_is_read_or_refused(model, place, byte):
    changed = bytearray(model)
    changed[place % 4000] = byte
    with contextlib.suppress(ValueError):
        read_sentencepiece(bytes(changed))
