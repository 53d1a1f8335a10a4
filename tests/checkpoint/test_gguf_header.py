"""Whatever bytes a GGUF file holds, opening it succeeds or says why not, quickly and in little memory."""

import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wanfast.checkpoint.reader import open_gguf
from wanfast.errors import CheckpointError
from wanfast.linear import expand

F32, Q8_0, Q4_K, IQ4_XS = 0, 8, 12, 23
UINT32, STRING, ARRAY, UINT64 = 4, 8, 9, 10


def text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, sizes: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


ARCHITECTURE = key("general.architecture", STRING, text("wan"))
WEIGHT, BIAS = tensor("ffn.weight", (32, 2), Q8_0, 0), tensor("ffn.bias", (2,), F32, 96)


def gguf_bytes(
    keys: tuple[bytes, ...] = (ARCHITECTURE,),
    tensors: tuple[bytes, ...] = (WEIGHT, BIAS),
    *,
    counts: tuple[int, int] | None = None,
    start: bytes = b"GGUF\3\0\0\0",
    alignment: int = 32,
    data: int = 128,
) -> bytes:
    """A file by hand: by default a matrix [2, 32] of 68 bytes and, 96 bytes after it, a bias [2]."""
    header = start + struct.pack("<QQ", *(counts or (len(tensors), len(keys)))) + b"".join(keys + tensors)
    return header + bytes(-len(header) % alignment) + bytes(data)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzz.gguf"


def opens(path: Path) -> bool:
    """Open and load everything; a refusal must name the file."""
    try:
        reader = open_gguf(path)
        for name in reader.names():
            weight = reader.load(name)
            assert (tuple(weight.shape), weight.dtype) == (reader.shape(name), reader.dtype(name))
            if weight.dtype.is_floating_point:
                assert expand(weight).shape == weight.shape
    except CheckpointError as error:
        assert str(path) in str(error)
        return False
    return True


def test_the_file_that_the_bad_ones_are_made_from_is_good(path):
    path.write_bytes(gguf_bytes())
    reader = open_gguf(path)
    assert {name: reader.shape(name) for name in reader.names()} == {"ffn.weight": (2, 32), "ffn.bias": (2,)}
    assert opens(path)


HUGE = 1 << 60
BAD = {
    "empty": (b"", "not a GGUF file"),
    "another magic": (gguf_bytes(start=b"GGML\3\0\0\0"), "not a GGUF file"),
    "version 1": (gguf_bytes(start=b"GGUF\1\0\0\0"), "is of GGUF version 1; wanfast reads 2 and 3"),
    "big-endian": (gguf_bytes(start=b"GGUF\0\0\0\3"), "is a big-endian GGUF file"),
    "another model": (
        gguf_bytes((key("general.architecture", STRING, text("llama")),)),
        "is a GGUF file of architecture 'llama'; wanfast reads wan and t5encoder",
    ),
    "architecture 7": (gguf_bytes((key("general.architecture", UINT32, struct.pack("<I", 7)),)), "architecture 7;"),
    "split": (gguf_bytes((ARCHITECTURE, key("split.count", 2, b"\3\0"))), "one of 3 parts of a split GGUF file"),
    "no type of value": (gguf_bytes((key("a", 13, b""),)), "key a has unknown type 13"),
    "nested array": (
        gguf_bytes((key("a", ARRAY, struct.pack("<IQ", ARRAY, 1)),)),
        "key a is an array of unknown type 9",
    ),
    "a key twice": (gguf_bytes((ARCHITECTURE, ARCHITECTURE)), "key general.architecture appears twice"),
    "a tensor twice": (gguf_bytes(tensors=(WEIGHT, WEIGHT)), "tensor ffn.weight appears twice"),
    "terabytes of tensors": (gguf_bytes(counts=(HUGE, 1)), f"header claims {HUGE} tensors and 1 keys"),
    "terabytes of keys": (gguf_bytes(counts=(2, HUGE)), f"header claims 2 tensors and {HUGE} keys"),
    "more tensors than there are": (gguf_bytes(counts=(9, 1), data=0), "cut short within its header"),
    "terabytes of text": (
        gguf_bytes((key("a", STRING, struct.pack("<Q", HUGE)),)),
        "cut short within its header",
    ),
    "terabytes of array": (
        gguf_bytes((key("a", ARRAY, struct.pack("<IQ", UINT64, HUGE)),)),
        "cut short within its header",
    ),
    "terabytes of texts": (
        gguf_bytes((key("a", ARRAY, struct.pack("<IQ", STRING, HUGE)),)),
        "cut short within its header",
    ),
    "not text": (gguf_bytes((text("a")[:-1] + b"\xff" + bytes(4),)), "can't decode byte 0xff"),
    "alignment 24": (
        gguf_bytes((key("general.alignment", UINT32, struct.pack("<I", 24)),)),
        "general.alignment is 24, not a power of two",
    ),
    "alignment 0": (gguf_bytes((key("general.alignment", UINT32, bytes(4)),)), "general.alignment is 0, not a"),
    "nine axes": (gguf_bytes(tensors=(tensor("w", (1,) * 9, F32, 0),)), "tensor w claims 9 axes"),
    "an empty axis": (gguf_bytes(tensors=(tensor("w", (0, 4), F32, 0),)), "tensor w has no valid shape"),
    "a size beyond counting": (
        gguf_bytes(tensors=(tensor("w", (1 << 40, 1 << 40), F32, 0),)),
        "tensor w has no valid shape",
    ),
    "half a block": (
        gguf_bytes(tensors=(tensor("w", (48, 2), Q8_0, 0),)),
        "tensor w has rows that are not whole blocks of Q8_0",
    ),
    "a type not read": (
        gguf_bytes(tensors=(tensor("w", (256, 2), IQ4_XS, 0),)),
        "tensor w is stored as IQ4_XS; wanfast reads F32, F16, BF16, Q8_0",
    ),
    "a type of the future": (gguf_bytes(tensors=(tensor("w", (2,), 99, 0),)), "tensor w is stored as type 99;"),
    "off its alignment": (gguf_bytes(tensors=(tensor("w", (2,), F32, 4),)), "tensor w starts off the file's alignment"),
    "overlap": (
        gguf_bytes(tensors=(WEIGHT, tensor("ffn.bias", (2,), F32, 64))),
        "tensor ffn.bias overlaps the one before it",
    ),
    "cut short": (gguf_bytes(data=103), "tensor ffn.bias ends at byte .* but the file has .* it is cut short"),
    "beyond the file": (
        gguf_bytes(tensors=(tensor("w", (2,), F32, HUGE),)),
        "tensor w ends at byte .* it is cut short",
    ),
    "another original shape": (
        gguf_bytes(
            (key("comfy.gguf.orig_shape.ffn.weight", ARRAY, struct.pack("<IQ2i", 5, 2, 2, 33)),),
        ),
        "tensor ffn.weight has an original shape that does not fit it",
    ),
    "two prefixes": (
        gguf_bytes(tensors=(WEIGHT, tensor("model.diffusion_model.ffn.weight", (2,), F32, 96))),
        "both mean ffn.weight",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_is_refused_by_name(fault, path):
    content, message = BAD[fault]
    path.write_bytes(content)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message) as caught:
        open_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.perf_counter() - start < 1
    assert peak < 1 << 20
    assert str(path) in str(caught.value)


def test_every_prefix_of_a_file_is_refused(path):
    whole = gguf_bytes()
    for length in range(len(whole) - 24):  # the last 24 bytes are padding
        path.write_bytes(whole[:length])
        assert not opens(path), length
    path.write_bytes(whole[:-24])
    assert opens(path)


def test_a_header_that_never_ends_is_given_up(path):
    strings = key("a", ARRAY, struct.pack("<IQ", STRING, HUGE))
    with path.open("wb") as file:
        file.write(gguf_bytes((strings,), ()))
        file.truncate(1 << 34)  # sparse: the array of empty texts goes on for gigabytes
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="header exceeds 33554432 bytes"):
        open_gguf(path)
    path.unlink()
    assert time.perf_counter() - start < 10


def test_a_file_aligned_to_single_bytes_is_read(path):
    keys = (key("general.alignment", UINT32, struct.pack("<I", 1)),)
    for pad in range(8):
        name = "b" * (1 + pad)  # moves the data through every alignment
        tensors = (tensor(name, (2,), F32, 0), tensor("w", (32, 2), Q8_0, 8))
        content = bytearray(gguf_bytes(keys, tensors, alignment=1, data=76))
        content[-76:-68] = struct.pack("<2f", 1.5, -2.5)
        content[-68:-66] = struct.pack("<e", 0.5)
        content[-66] = 3
        path.write_bytes(content)
        reader = open_gguf(path)
        assert reader.load(name).tolist() == [1.5, -2.5]
        assert expand(reader.load("w"))[0, :2].tolist() == [1.5, 0.0]


_COUNT = st.one_of(st.integers(0, 3), st.sampled_from([2**16, 2**31, 2**63, 2**64 - 1]))
_NAME = st.one_of(
    st.sampled_from([text("general.architecture"), text("w"), text("split.count")]), st.binary(max_size=9)
)
_VALUE = st.one_of(st.binary(max_size=24), st.tuples(st.integers(0, 14), _COUNT).map(lambda v: struct.pack("<IQ", *v)))
_KEY = st.tuples(_NAME, st.integers(0, 14), _VALUE).map(lambda v: v[0] + struct.pack("<I", v[1]) + v[2])
_SIZES = st.lists(st.one_of(st.integers(0, 2), st.sampled_from([32, 256, 2**32, 2**64 - 1])), max_size=5)
_OFFSET = st.one_of(st.sampled_from([0, 32, 64, 2**40, 2**64 - 32]), st.integers(0, 99))
_TENSOR = st.tuples(st.text(max_size=3), _SIZES.map(tuple), st.integers(0, 42), _OFFSET).map(lambda v: tensor(*v))
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(
    keys=st.lists(_KEY, max_size=3),
    tensors=st.lists(st.one_of(_TENSOR, st.binary(max_size=40)), max_size=3),
    counts=st.one_of(st.none(), st.tuples(_COUNT, _COUNT)),
    data=st.integers(0, 600),
)
def test_any_header_is_read_or_refused(path, keys, tensors, counts, data):
    path.write_bytes(gguf_bytes(tuple(keys), tuple(tensors), counts=counts, data=data))
    opens(path)


@FUZZ
@given(content=st.binary(max_size=96))
def test_any_bytes_are_read_or_refused(path, content):
    path.write_bytes(b"GGUF\3\0\0\0" + content)
    opens(path)


@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 255)), min_size=1, max_size=3))
def test_a_valid_file_with_flipped_bits_is_read_or_refused(path, flips):
    whole = bytearray(gguf_bytes())
    for place, flip in flips:
        whole[place] ^= flip
    path.write_bytes(whole)
    opens(path)
