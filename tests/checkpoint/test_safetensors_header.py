"""Whatever bytes a safetensors file holds, opening it succeeds or says why not, in little memory."""

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wanfast.checkpoint.reader import open_safetensors
from wanfast.checkpoint.safetensors_format import DTYPES
from wanfast.errors import CheckpointError

_SMALL = st.integers(-2, 40)
_SIZES = st.lists(st.one_of(_SMALL, st.sampled_from([2**31, 2**63, 2**64, 10**30])), max_size=4)
_JSON = st.recursive(st.one_of(st.none(), st.booleans(), _SMALL, st.text(max_size=4)), st.lists, max_leaves=4)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from([*DTYPES, "F4", ""]), _JSON),
        "shape": st.one_of(_SIZES, _JSON),
        "data_offsets": st.one_of(st.tuples(_SMALL, _SMALL).map(list), _SIZES, _JSON),
    }
)
_HEADER = st.dictionaries(st.sampled_from(["a", "b", "", "__metadata__"]), st.one_of(_ENTRY, _JSON), max_size=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzz.safetensors"


def _open_and_load_all(path: Path) -> bool:
    try:
        reader = open_safetensors(path)
        for name in reader.names():
            tensor = reader.load(name)
            assert tuple(tensor.shape) == reader.shape(name)
            assert tensor.dtype == reader.dtype(name)
    except CheckpointError as error:
        assert str(path) in str(error)
        return False
    return True


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=_HEADER, data=st.binary(max_size=48), length=st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_any_header_is_read_or_refused(path, header, data, length):
    text = json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    _open_and_load_all(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(path, content):
    path.write_bytes(content)
    _open_and_load_all(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=3))
def test_a_valid_file_with_flipped_bits_is_read_or_refused(path, flips):
    header = {
        "weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "bias": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]},
    }
    text = json.dumps(header).encode()
    whole = bytearray(len(text).to_bytes(8, "little") + text + bytes(16))
    path.write_bytes(whole)
    assert _open_and_load_all(path)
    for place, flip in flips:
        whole[place % len(whole)] ^= flip
    path.write_bytes(whole)
    _open_and_load_all(path)


def test_a_deeply_nested_header_is_refused(path):
    text = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert not _open_and_load_all(path)


def test_a_number_too_long_to_read_is_refused(path):
    text = b'{"a":{"dtype":"U8","data_offsets":[0,0],"shape":[' + b"9" * 10_000 + b"]}}"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert not _open_and_load_all(path)


@pytest.mark.parametrize("length", [1 << 33, 1 << 62])
def test_a_huge_header_length_takes_no_memory(path, length):
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + b"{")
        file.truncate(1 << 34)  # sparse: the header would even fit
    tracemalloc.start()
    assert not _open_and_load_all(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    path.unlink()
    assert peak < 1 << 20
