import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from reference.checkpoints import write_safetensors
from safetensors.torch import load_file, save_file

from wanfast.checkpoint.files import TensorRef
from wanfast.checkpoint.reader import (
    memory_reader,
    open_file,
    open_folder,
    open_pickle,
    open_safetensors,
    open_sharded,
)
from wanfast.checkpoint.safetensors_format import DTYPES
from wanfast.errors import CheckpointError


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: (8 * torch.randn(3, 5, generator=generator)).to(getattr(torch, name)) for name in DTYPES.values()}
    return drawn | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "long.name.weight": torch.arange(7)}


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _equal(got: torch.Tensor, want: torch.Tensor) -> bool:
    return got.dtype == want.dtype and got.shape == want.shape and _bits(got) == _bits(want)


def _tells_its_bytes(ref: TensorRef, want: torch.Tensor) -> bool:
    bits, counts = _bits(want.detach()), (0, 3, 1 << 20)
    return ref.num_bytes == len(bits) and all(ref.first_bytes(count) == bits[:count] for count in counts)


def _write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _entry(shape=(2,), dtype="F32", offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def _shards(folder: Path) -> dict[str, torch.Tensor]:
    state = {name: torch.randn(4, 3) for name in "abcdefg"}
    write_safetensors(folder, state, shards=3)
    return state


def test_every_dtype_comes_back_as_the_safetensors_library_wrote_it(tmp_path):
    tensors = _tensors()
    save_file(tensors, tmp_path / "a file é.safetensors", metadata={"format": "pt"})
    reader = open_file(tmp_path / "a file é.safetensors")
    assert reader.names() == tensors.keys()
    for name, tensor in load_file(tmp_path / "a file é.safetensors").items():
        assert _equal(reader.load(name), tensor), name
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        assert reader.file_of(name) == tmp_path / "a file é.safetensors"
        assert _tells_its_bytes(reader.ref(name), tensor)


def test_a_pickle_comes_back(tmp_path):
    tensors = _tensors()
    tensors["transposed"] = torch.arange(6.0).view(2, 3).t()
    tensors["parameter"] = torch.nn.Parameter(torch.ones(2))
    torch.save(tensors, tmp_path / "a.pth")
    reader = open_file(str(tmp_path / "a.pth"))
    assert all(_equal(reader.load(name), tensor) for name, tensor in tensors.items())
    assert all(_tells_its_bytes(reader.ref(name), tensor) for name, tensor in tensors.items())
    assert not reader.load("parameter").requires_grad


def test_shards_come_back(tmp_path):
    state = _shards(tmp_path)
    for reader in (open_folder(tmp_path), open_file(tmp_path / "diffusion_pytorch_model.safetensors.index.json")):
        assert reader.names() == state.keys()
        assert all(_equal(reader.load(name), tensor) for name, tensor in state.items())
        assert len({reader.file_of(name) for name in state}) == 3


def test_memory_comes_back_without_a_copy():
    tensor = torch.ones(3)
    reader = memory_reader({"a": tensor}, "somewhere")
    assert reader.load("a").data_ptr() == tensor.data_ptr()
    with pytest.raises(CheckpointError, match=r"somewhere: tensor b is missing"):
        reader.load("b")


def test_tensors_at_odd_bytes_are_read(tmp_path):
    header = {"a": _entry((3,), "U8", (0, 3)), "b": _entry((2,), "F32", (3, 11))}
    want = torch.tensor([1.5, -2.0])
    reader = open_file(_write_raw(tmp_path / "odd.safetensors", header, b"\1\2\3" + want.numpy().tobytes()))
    assert torch.equal(reader.load("b"), want)
    assert reader.load("a").tolist() == [1, 2, 3]


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "a.safetensors")
    os.chmod(tmp_path / "a.safetensors", 0o444)
    open_file(tmp_path / "a.safetensors").load("a").zero_()
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.ones(4))


_MEASURE = """
import sys
import zipfile
import torch  # what it takes itself does not count
from wanfast.checkpoint.reader import open_file

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024

for path in sys.argv[1:]:
    before = resident()
    reader = open_file(path)
    rows, small = reader.load_rows("large", [(1 << 28) - 1, 0]), reader.load("small")
    assert rows.tolist() == [[0.0] * 4] * 2 and small.tolist() == [0.0, 0.0]
    assert reader.load("large", "meta").shape == (1 << 28, 4) and reader.ref("large").first_bytes(8) == bytes(8)
    print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory from /proc")
def test_of_a_large_file_only_what_is_asked_for_is_read(tmp_path):
    num_bytes, paths = 4 << 30, [tmp_path / "large.safetensors", tmp_path / "large.pth"]
    text = json.dumps({"small": _entry((2,), "F32", (0, 8)), "large": _entry((1 << 28, 4), "F32", (8, 8 + num_bytes))})
    _write_raw(paths[0], text.ljust(-(-len(text) // 8) * 8).encode())
    with paths[0].open("r+b") as file:
        file.truncate(paths[0].stat().st_size + 8 + num_bytes)
    with torch.serialization.skip_data():
        torch.save({"small": torch.empty(2), "large": torch.empty(1 << 28, 4)}, paths[1])
    assert all(path.stat().st_blocks * 512 < 1 << 26 < path.stat().st_size for path in paths), (
        "the files must be sparse"
    )
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *map(str, paths)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert all(int(grown) < 64 << 20 for grown in done.stdout.split())


def test_a_file_larger_than_all_memory_is_opened(tmp_path):
    num_bytes = 1 << 40
    text = json.dumps({"large": _entry((num_bytes,), "U8", (0, num_bytes))}).encode()
    path = _write_raw(tmp_path / "large.safetensors", text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + num_bytes)
    assert open_file(path).load_rows("large", [num_bytes - 1]).tolist() == [0]


def test_renamed_readers_speak_the_new_names_and_say_the_old_ones():
    reader = memory_reader({"old": torch.ones(2), "gone": torch.ones(3)}, "file").renamed({"old": "new"})
    assert reader.names() == {"new"}
    assert reader.where("new") == "file: tensor new (stored as old)"
    assert reader.load("new").tolist() == [1, 1]
    with pytest.raises(CheckpointError, match="tensors a and b both mean c"):
        memory_reader({"a": torch.ones(1), "b": torch.ones(1)}).renamed({"a": "c", "b": "c"})


_F32_2 = b"\0" * 8

BAD_HEADERS = {
    "too short": (b"", None, "not a safetensors file"),
    "not JSON": (b"{nonsense", b"", "not a safetensors file"),
    "not an object": ([1], b"", "it is a list"),
    "name twice": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}', b"", "a appears twice"),
    "no fields": ({"a": {"dtype": "F32"}}, b"", "tensor a has no dtype, shape and data_offsets"),
    "not a tensor": ({"a": 3}, b"", "tensor a has no dtype"),
    "unknown dtype": ({"a": _entry(dtype="F4")}, _F32_2, "tensor a has dtype 'F4'; wanfast reads F64, F32"),
    "dtype no text": ({"a": _entry(dtype=[1])}, _F32_2, "tensor a has dtype"),
    "negative size": ({"a": _entry(shape=(-2,))}, _F32_2, "tensor a has no valid shape"),
    "size too large": ({"a": _entry(shape=(0, 2**70), offsets=(0, 0))}, b"", "tensor a has no valid shape"),
    "boolean size": ({"a": _entry(shape=(True,), offsets=(0, 4))}, b"1234", "tensor a has no valid shape"),
    "three offsets": ({"a": _entry(offsets=(0, 4, 8))}, _F32_2, "tensor a has no valid data_offsets"),
    "wrong length": ({"a": _entry(offsets=(0, 7))}, _F32_2, r"tensor a occupies 7 bytes, but F32 \[2\] is 8"),
    "reversed": ({"a": _entry(offsets=(8, 0))}, _F32_2, "tensor a occupies -8 bytes"),
    "cut short": (
        {"a": _entry(shape=(4,), offsets=(0, 16))},
        _F32_2,
        "tensor a ends at byte 16 .* holds 8: .* download",
    ),
    "overlap": ({"a": _entry(), "b": _entry(offsets=(4, 12))}, b"\0" * 12, "tensor b overlaps the one before it"),
    "gap": ({"a": _entry(), "b": _entry(offsets=(12, 20))}, b"\0" * 20, "tensor b leaves 4 bytes unused"),
    "trailing": ({"a": _entry()}, b"\0" * 11, "3 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_broken_safetensors_file_is_refused_by_name(tmp_path, case):
    header, data, message = BAD_HEADERS[case]
    path = tmp_path / "bad.safetensors"
    if data is None:
        path.write_bytes(b"\1\2")
    else:
        _write_raw(path, header, data)
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors: .*{message}"):
        open_safetensors(path)


@pytest.mark.parametrize("length", [0, 1, 200, 10**9, 2**63, 2**64 - 1])
def test_an_impossible_header_length_is_refused_without_reading(tmp_path, length):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" * 50)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: not a safetensors file"):
        open_safetensors(path)


def test_a_truncated_download_is_refused_when_opened(tmp_path):
    state = _shards(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: tensor .* cut short; download it again"):
        open_folder(tmp_path)
    shard.write_bytes(whole[:40])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: .*cut short within its header"):
        open_folder(tmp_path)
    shard.write_bytes(whole)
    assert open_folder(tmp_path).names() == state.keys()


def test_all_missing_shards_are_named(tmp_path):
    _shards(tmp_path)
    first, second, _ = sorted(tmp_path.glob("*.safetensors"))
    first.unlink()
    second.unlink()
    with pytest.raises(CheckpointError, match=rf"2 of 3 shards .*{first.name}, {second.name}\); download them"):
        open_folder(tmp_path)


def _edit_index(folder: Path, edit) -> Path:
    index = next(folder.glob("*.index.json"))
    content = json.loads(index.read_text())
    edit(content)
    index.write_text(json.dumps(content))
    return index


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("weight_map"), "has no weight_map"),
        (lambda c: c.update(weight_map={"a": 3}), "has no weight_map"),
        (
            lambda c: c["weight_map"].update(a="../elsewhere.safetensors"),
            "'../elsewhere.safetensors', which is not a file",
        ),
        (lambda c: c["weight_map"].update(z=c["weight_map"]["a"]), r"00001-of-00003\.safetensors: tensor z is missing"),
        (lambda c: c["weight_map"].pop("b"), r"00002-of-00003\.safetensors: tensor b is not listed there"),
        (lambda c: c["weight_map"].update(b=c["weight_map"]["a"]), r"tensor b is not listed there"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, edit, message):
    _shards(tmp_path)
    _edit_index(tmp_path, edit)
    with pytest.raises(CheckpointError, match=message):
        open_folder(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    _shards(tmp_path)
    first, second, _ = sorted(tmp_path.glob("*.safetensors"))
    save_file(load_file(first) | {"b": torch.ones(1)}, first)
    _edit_index(tmp_path, lambda c: c["weight_map"].update(b=first.name))
    with pytest.raises(CheckpointError, match=rf"{second.name}: tensor b is also in {first.name}"):
        open_folder(tmp_path)


def test_an_index_that_names_a_tensor_twice_is_refused(tmp_path):
    index = tmp_path / "a.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"a\.safetensors\.index\.json: not a JSON object \(a appears twice\)"):
        open_sharded(index)


def test_a_folder_must_hold_one_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        open_folder(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert open_folder(tmp_path).names() == {"a"}
    save_file({"a": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"2 files match \*\.safetensors \(a\.safetensors, b\.safetensors\)"):
        open_folder(tmp_path)


class _Code:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list, not a dict of tensors"),
        ({"a": 3}, "entry 'a' is a int, not a tensor"),
        ({"state_dict": {"a": torch.ones(1)}}, "entry 'state_dict' is a dict, not a tensor"),
        ({3: torch.ones(1)}, "entry 3 is a Tensor"),
        ({"a": torch.eye(3).to_sparse()}, "tensor a is not a plain dense tensor"),
        ({"a": _Code()}, "not a zip pickle of plain tensors"),
    ],
    ids=["list", "number", "nested", "no name", "sparse", "code"],
)
def test_a_pickle_of_anything_else_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=rf"bad\.pth: {message}"):
        open_pickle(tmp_path / "bad.pth")
    assert not (tmp_path / "made-by-a-pickle").exists()


def test_a_damaged_pickle_is_refused(tmp_path):
    path = tmp_path / "bad.pth"
    torch.save({"a": torch.ones(1000)}, path)
    whole = path.read_bytes()
    plain = pickle.dumps({"a": 1})
    for damaged in (whole[:-30], whole[: len(whole) // 2], b"", b"not a pickle", plain):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"bad\.pth: not a zip pickle of plain tensors, or damaged .*again"):
            open_pickle(path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.safetensors.index.json"])
def test_a_git_lfs_pointer_and_a_missing_file_are_told_apart(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file"):
        open_file(tmp_path / name)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"is a Git LFS pointer.*git lfs pull"):
        open_file(tmp_path / name)


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"a\.ckpt: not a tensor file wanfast knows"):
        open_file(tmp_path / "a.ckpt")


def test_a_file_that_is_gone_before_it_is_read_is_refused_when_loaded(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    reader = open_file(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be read any more \(No such file"):
        reader.load("a")


def test_a_pickle_that_unpacks_to_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(1 << 24))
    with pytest.raises(CheckpointError, match=r"bomb\.pth: its entry bomb/data\.pkl is compressed"):
        open_file(path)
