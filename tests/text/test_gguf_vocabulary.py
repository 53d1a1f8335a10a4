"""The vocabulary of a umT5 GGUF file against sentencepiece's own ids for the model that it was made from."""

import dataclasses
import random
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from reference.gguf_files import write_gguf
from reference.single_files import TEXT, dit_state, text_state, vae_state, write
from reference.vocabulary import gguf_keys, train_spiece

from wanfast.checkpoint.lookup import Sources
from wanfast.checkpoint.names import text_to_llama_cpp
from wanfast.checkpoint.part import open_part
from wanfast.config import UMT5_XXL
from wanfast.errors import CheckpointError
from wanfast.model import open_model
from wanfast.text import weights as text_weights
from wanfast.text.tokenizer import Tokenizer, clean_prompt, tokenize, tokenizer_of_sentencepiece

TEXTS = (
    "a red ball rolling left, slowly!",
    "  leading,  double   and trailing  ",
    "größe naïve ﬁne ① Ａ ｈｅｌｌｏ",
    "猫在跑 — 红色的球",
    "кошка бежит, μια γάτα, بلی, חתול, 고양이, ネコ, แมว, बिल्ली",
    "emoji 🎬👩‍👩‍👧 and ¨ accents é",
    "zero\u200bwidth\ttab\u3000wide",
    "[PAD395] and 猫在[PAD395]",
    "▁a ▁▁ ball",
    "a <extra_id_0> ball<extra_id_0>red",
    "",
    " ",
)
ROWS = TEXT.vocab_size  # of the embedding; more than the model has pieces
VARIANTS: dict[str, dict[str, Any]] = {
    "as umT5": {},
    "no byte fallback": {"byte_fallback": False, "vocab_size": 120},
    "no normalisation": {"normalization_rule_name": "identity"},
    "spaces kept": {"remove_extra_whitespaces": False},
    "no space before": {"add_dummy_prefix": False},
}


def write_text_encoder(path: Path, spiece: bytes, **changes: Any) -> Path:
    tensors = {text_to_llama_cpp(name): tensor for name, tensor in text_state().items()}
    keys = gguf_keys(spiece, ROWS, **changes)
    write_gguf(path, tensors, lambda _name, _tensor: "F32", architecture="t5encoder", prepare=keys)
    return path


def tokenizer_in(path: Path) -> Tokenizer:
    vocabulary = open_part(path, "text").vocabulary
    assert vocabulary is not None
    data = vocabulary.load("cpu")
    assert isinstance(data, torch.Tensor)
    assert (data.dtype, tuple(data.shape)) == (vocabulary.dtype, vocabulary.shape)
    assert vocabulary.first_bytes(100) == data.numpy().tobytes()[:100]
    return tokenizer_of_sentencepiece(data.numpy().tobytes(), vocabulary.file)


@pytest.fixture(scope="module")
def spiece() -> bytes:
    return train_spiece()


@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_are_sentencepieces_own(variant, tmp_path):
    options = VARIANTS[variant]
    spiece = train_spiece(**options)
    own = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    flags = {
        "add_space_prefix": options.get("add_dummy_prefix", True),
        "remove_extra_whitespaces": options.get("remove_extra_whitespaces", True),
    }
    tokenizer = tokenizer_in(write_text_encoder(tmp_path / "umt5.gguf", spiece, **flags))
    assert tokenizer.vocabulary.get_vocab_size() == ROWS > own.get_piece_size()
    for text in TEXTS:
        assert tokenize(tokenizer, text, 512).ids == (*own.encode(text), 1), repr(text)
    draw = random.Random(variant)
    letters = "abcdefghijklmnopqrstuvwxyzABC0123.,!?'\"-  猫跑在ßﬁ①Ａ\u3000é🎬¨жع"
    for _ in range(300):
        text = clean_prompt("".join(draw.choices(letters, k=draw.randint(1, 40))))
        assert tokenize(tokenizer, text, 512).ids == (*own.encode(text), 1), repr(text)


def test_a_model_of_files_takes_it_where_no_tokenizer_is_given(spiece, tmp_path):
    named = {word: write(tmp_path / f"{word}.safetensors", dit_state("t2v", word)) for word in ("high", "low")}
    encoder = write_text_encoder(tmp_path / "umt5-xxl-encoder-F32.gguf", spiece)
    vae = write(tmp_path / "wan_vae.safetensors", vae_state())
    own = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    for given in ({"vae": vae, "text_encoder": encoder}, {}):
        model = open_model(Sources(**named, **given))
        assert model.tokenizer.path == encoder
        assert tokenize(model.tokenizer, "a red ball", 512).ids == (*own.encode("a red ball"), own.eos_id())
    (tmp_path / "spiece.model").write_bytes(spiece)
    assert open_model(Sources(**named, tokenizer=tmp_path / "spiece.model")).tokenizer.path.name == "spiece.model"


@pytest.mark.parametrize("changes", [{"model": None}, {"model": "gpt2"}, {"model": "llama"}])
def test_a_file_without_a_unigram_vocabulary_gives_none(changes, spiece, tmp_path):
    assert open_part(write_text_encoder(tmp_path / "umt5.gguf", spiece, **changes), "text").vocabulary is None


def _one(values: list[Any], index: int, value: Any) -> list[Any]:
    return [*values[:index], value, *values[index + 1 :]]


NAMES, SCORES, TYPES = [b"a"] * ROWS, [-1.0] * ROWS, [1] * ROWS
BAD = {
    "fewer tokens than rows": ({"tokens": NAMES[1:]}, r"tokens has 399 items, but tensor token_embd\.weight has 400"),
    "more tokens than rows": ({"tokens": [*NAMES, b"b"]}, r"tokens has 401 items"),
    "no tokens": ({"tokens": None}, r"tokens is missing or of another type"),
    "numbers for tokens": ({"tokens": TYPES}, r"tokens is missing or of another type"),
    "a text for tokens": ({"tokens": "abc"}, r"tokens is missing or of another type"),
    "no scores": ({"scores": None}, r"scores is missing or of another type"),
    "fewer scores": ({"scores": SCORES[1:]}, r"scores has 399 items"),
    "whole numbers for scores": ({"scores": TYPES}, r"scores is missing or of another type"),
    "texts for scores": ({"scores": NAMES}, r"scores is missing or of another type"),
    "a score that is no number": ({"scores": _one(SCORES, 7, float("nan"))}, r"scores gives token 7 a score that is"),
    "a score without end": ({"scores": _one(SCORES, 9, float("-inf"))}, r"scores gives token 9 a score that is"),
    "no types": ({"token_type": None}, r"token_type is missing or of another type"),
    "a type of its own": ({"token_type": _one(TYPES, 3, 7)}, r"token_type has type 7"),
    "a negative type": ({"token_type": _one(TYPES, 3, -1)}, r"token_type has type -1"),
    "a table that is a text": ({"precompiled_charsmap": "abc"}, r"precompiled_charsmap is not an array of bytes"),
    "a table of numbers": ({"precompiled_charsmap": TYPES}, r"precompiled_charsmap is not an array of bytes"),
    "a space before that is a number": ({"add_space_prefix": 3}, r"add_space_prefix is 3, not true or false"),
    "spaces removed by a text": ({"remove_extra_whitespaces": "yes"}, r"remove_extra_whitespaces is 'yes'"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_damaged_vocabulary_is_refused_by_key(fault, spiece, tmp_path):
    changes, message = BAD[fault]
    path = write_text_encoder(tmp_path / "umt5.gguf", spiece, **changes)
    with pytest.raises(CheckpointError, match=rf"umt5\.gguf: key tokenizer\.ggml\.{message}"):
        open_part(path, "text")


LATER = {
    "no end": ({"tokens": NAMES, "token_type": _one(TYPES, 2, 2)}, r"the vocabulary has no </s>"),
    "no unknown": ({"token_type": TYPES}, r"0 unknown pieces instead of one"),
    "tokens that are no text": ({"tokens": _one(NAMES, 5, b"\xff"), "token_type": _one(TYPES, 2, 2)}, r"can't decode"),
    "a damaged table": ({"precompiled_charsmap": b"\xff\xff\xff\xff12"}, r"its normaliser cannot be read"),
}


@pytest.mark.parametrize("fault", LATER)
def test_a_vocabulary_that_makes_no_tokenizer_is_refused(fault, spiece, tmp_path):
    changes, message = LATER[fault]
    with pytest.raises(CheckpointError, match=rf"umt5\.gguf: .*{message}"):
        tokenizer_in(write_text_encoder(tmp_path / "umt5.gguf", spiece, **changes))


def test_changed_bytes_of_the_header_are_read_or_refused(spiece, tmp_path):
    """Lengths, counts, types and numbers anywhere in the vocabulary, at random."""
    path = write_text_encoder(tmp_path / "umt5.gguf", spiece)
    whole = path.read_bytes()
    begin, end = whole.index(b"tokenizer.ggml.model"), whole.index(b"token_embd.weight")
    keys = [whole.index(name, begin) for name in (b"tokens", b"scores", b"token_type", b"precompiled_charsmap")]
    draw, begun, refused = random.Random(2), time.perf_counter(), 0
    for turn in range(400):
        changed = bytearray(whole)
        place = draw.randrange(begin, end) if turn % 2 else draw.choice(keys) + draw.randrange(40)
        changed[place : place + 8] = struct.pack("<Q", draw.choice((0, 1, draw.getrandbits(8), draw.getrandbits(64))))
        path.write_bytes(changed)
        try:
            tokenizer_in(path).vocabulary.encode("a red ball")
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
        except AssertionError:  # the vocabulary is gone: no key of it was met
            refused += 1
    assert 50 < refused < 400
    assert time.perf_counter() - begun < 60


def test_a_full_size_file_opens_at_once(tmp_path):
    """The published header: 256,384 tokens and the tensors of umT5-XXL, without their data."""
    draw, rows = np.random.default_rng(0), UMT5_XXL.vocab_size
    special = [b"<pad>", b"</s>", b"<s>", b"<unk>", *(b"<0x%02X>" % byte for byte in range(256))]
    words = ["▁" + "".join(map(chr, letters)) for letters in draw.integers(97, 123, (rows - len(special), 7))]
    writer = gguf.GGUFWriter(tmp_path / "umt5.gguf", "t5encoder")
    writer.add_tokenizer_model("t5")
    writer.add_token_list(special + [word.encode() for word in words])
    writer.add_token_scores([0.0] * len(special) + (-draw.random(len(words))).tolist())
    writer.add_token_types([3, 3, 3, 2] + [6] * 256 + [1] * len(words))
    small = dataclasses.replace(UMT5_XXL, num_layers=1)
    for name, shape in text_weights.expected_tensors(small).items():
        kind = gguf.GGMLQuantizationType.F16
        writer.add_tensor_info(text_to_llama_cpp(name), shape, np.dtype(np.float16), 2 * int(np.prod(shape)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with (tmp_path / "umt5.gguf").open("r+b") as file:
        file.truncate(6 << 30)
    begun = time.perf_counter()
    vocabulary = open_part(tmp_path / "umt5.gguf", "text").vocabulary
    assert time.perf_counter() - begun < 2
    assert vocabulary is not None
    ids = tokenize(tokenizer_in(tmp_path / "umt5.gguf"), words[5].removeprefix("▁"), 512).ids
    assert ids == (len(special) + 5, 1)
    assert time.perf_counter() - begun < 20
