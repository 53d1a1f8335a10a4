import re
from html import unescape
from pathlib import Path

import ftfy
import pytest
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.text import PIECES, write_tokenizer
from transformers import PreTrainedTokenizerFast

from wanfast.errors import CheckpointError, RequestError
from wanfast.text.tokenizer import TokenIds, clean_prompt, load_tokenizer, tokenize

END = PIECES.index("</s>")
PROMPTS = [
    "a red ball rolls left",
    "the cat, running.",
    "猫在跑",
    "A RED cat",
    "red\u3000ball \u00a0 left",
    "",
    " ",
    "zzz 😀 é",
    "a </s> b <pad> c",
    "ｆｕｌｌ width",
    "ball" * 40,
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a red ball", "a red ball"),
        ("  a \t red\r\n\n ball\u3000\u00a0rolls\u2028left ", "a red ball rolls left"),
        ("AT&amp;T &lt;b&gt;", "AT&T <b>"),
        ("&amp;amp;", "&"),
        ("<b> &amp;lt; &amp;amp;", "<b> < &"),  # ftfy leaves entities alone where there is a tag
        ("fish &amp;lt; chips", "fish < chips"),
        ("a&nbsp;&nbsp;b&#32;", "a b"),
        ("schÃ¶n, donâ€™t", "schön, don't"),  # UTF-8 once read as another encoding
        ("“curly” ‘quotes’", "\"curly\" 'quotes'"),
        ("ﬁne Ｆｕｌｌ", "fine Full"),
        ("UPPER, Case!?", "UPPER, Case!?"),
        ("色调艳丽，过曝", "色调艳丽,过曝"),
        ("a\x00b\x1b[31m", "ab"),
        (" \n ", ""),
        ("", ""),
    ],
)
def test_clean_prompt_repairs_unescapes_and_collapses(text: str, want: str) -> None:
    assert clean_prompt(text) == want


_DIRTY = st.lists(
    st.sampled_from([*"aB&;#<> \t\n\u00a0\u3000\u2028é猫â€™“", "&amp;lt;", "&amp;amp;", "&nbsp;", "&#x27;"]),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(_DIRTY.map("".join), st.text(max_size=30)))
def test_clean_prompt_equals_the_rule_and_diffusers(text: str) -> None:
    rule = re.sub(r"\s+", " ", unescape(unescape(ftfy.fix_text(text))).strip()).strip()
    assert clean_prompt(text) == rule == prompt_clean(text)


def test_clean_prompt_makes_unpaired_surrogates_tokenizable(vocabulary: Path) -> None:
    text = "a \ud83d cat"  # what an undecodable command line gives
    assert tokenize(load_tokenizer(vocabulary), clean_prompt(text), 512).ids[-1] == END
    with pytest.raises(RequestError, match=r"prompt: must be valid Unicode, got '\\ud83d' at position 2"):
        tokenize(load_tokenizer(vocabulary), text, 512)


@pytest.mark.parametrize("text", PROMPTS)
@pytest.mark.parametrize("max_length", [1, 2, 5, 512])
def test_ids_equal_transformers(vocabulary: Path, text: str, max_length: int) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(vocabulary), eos_token="</s>", pad_token="<pad>")
    want = theirs(text, padding="max_length", max_length=max_length, truncation=True, add_special_tokens=True)
    got = tokenize(load_tokenizer(vocabulary), text, max_length)
    num_tokens = sum(want["attention_mask"])
    assert list(got.ids) == want["input_ids"][:num_tokens]
    whole = len(theirs(text)["input_ids"])
    assert got.num_dropped == max(0, whole - max_length)
    assert got.is_truncated == (whole > max_length)


def test_an_empty_prompt_is_the_end_token_alone(vocabulary: Path) -> None:
    assert tokenize(load_tokenizer(vocabulary), "", 512) == TokenIds((END,), num_dropped=0)


def test_a_long_prompt_keeps_its_start_and_ends_in_the_end_token(vocabulary: Path) -> None:
    tokenizer = load_tokenizer(vocabulary)
    whole = tokenize(tokenizer, "red cat " * 300, 10_000)
    cut = tokenize(tokenizer, "red cat " * 300, 512)
    assert len(whole.ids) == 601
    assert not whole.is_truncated
    assert len(cut.ids) == 512
    assert cut.ids == (*whole.ids[:511], END)
    assert cut.is_truncated
    assert cut.num_dropped == 89
    assert not tokenize(tokenizer, "red cat " * 300, 601).is_truncated
    assert tokenize(tokenizer, "red cat " * 300, 600).num_dropped == 1


def test_padding_and_truncation_saved_in_the_file_are_not_used(vocabulary: Path, tmp_path: Path) -> None:
    used = load_tokenizer(write_tokenizer(tmp_path, settings_of_a_past_use=True))
    assert tokenize(used, "a red ball rolls left", 512) == tokenize(load_tokenizer(vocabulary), PROMPTS[0], 512)
    assert tokenize(used, "a", 512).ids == (PIECES.index("▁a"), END)


def test_the_end_token_is_looked_up(tmp_path: Path) -> None:
    pieces = [piece for piece in PIECES if piece != "</s>"] + ["</s>"]
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, pieces))
    assert tokenize(tokenizer, "", 512).ids == (len(pieces) - 1,)


def test_a_folder_and_its_file_are_the_same(vocabulary: Path) -> None:
    assert load_tokenizer(vocabulary.parent).path == load_tokenizer(str(vocabulary)).path == vocabulary


def test_max_length_below_one_is_refused(vocabulary: Path) -> None:
    with pytest.raises(RequestError, match="max_length: must be >= 1, got 0"):
        tokenize(load_tokenizer(vocabulary), "a", 0)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"version": "1.0"}', b"\xff\xfe", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "tokenizer.json"))):
        load_tokenizer(tmp_path)


def test_a_truncated_file_is_refused_by_name(vocabulary: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(vocabulary.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_without_end_token_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, [piece for piece in PIECES if piece != "</s>"])
    with pytest.raises(CheckpointError, match="has no </s>"):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_refused_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json here, found nothing"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json here"):
        load_tokenizer(tmp_path / "absent" / "tokenizer.json")
    pieces = tmp_path / "spiece.model"
    pieces.write_bytes(b"\x0a\x0e")
    for path in (tmp_path, pieces):
        with pytest.raises(CheckpointError, match=r"spiece\.model: holds no readable SentencePiece model"):
            load_tokenizer(path)
