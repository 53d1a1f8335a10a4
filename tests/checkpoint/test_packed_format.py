"""Packed files: any safetensors reader takes them, each block is one run of whole pages, and unfinished ones go on."""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from reference.gguf_files import pack
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanfast.checkpoint.packed_format import PAGE_BYTES, Group, packed_bytes, stored_tensors, write_packed
from wanfast.checkpoint.part import open_part
from wanfast.checkpoint.quantize import quantize_rows
from wanfast.checkpoint.reader import open_file
from wanfast.errors import CheckpointError
from wanfast.linear import expand
from wanfast.open_file import origin
from wanfast.stored import GGUFWeight, ScaledWeight


def tensors_of(index: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(index)
    shapes = {"q.weight": (40, 24), "q.bias": (40,), "k.weight": (40, 24), "k.bias": (40,)}
    drawn = {f"blocks.{index}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    block = {name: tensor.bfloat16() for name, tensor in drawn.items()}
    block[f"blocks.{index}.norm"] = torch.randn(33, generator=generator)
    block[f"blocks.{index}.small"] = torch.randn(7, 5, generator=generator).to(torch.float8_e4m3fn)
    return block


class Source:
    """Groups that count how often they are loaded, and fail where they are told to."""

    def __init__(self, num_groups: int = 4) -> None:
        self.loaded: list[int] = []
        self.fails_at: int | None = None
        self.groups = [self._group(index) for index in range(num_groups)]

    def _group(self, index: int) -> Group:
        def load() -> Mapping[str, Tensor]:
            if index == self.fails_at:
                raise KeyboardInterrupt
            self.loaded.append(index)
            return tensors_of(index)

        return Group({name: (t.dtype, tuple(t.shape)) for name, t in tensors_of(index).items()}, load)


def write(path: Path, source: Source, metadata: Mapping[str, str] | None = None) -> list[int]:
    told: list[int] = []
    write_packed(path, source.groups, metadata or {}, told.append)
    return told


def test_any_safetensors_reader_takes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    told = write(path, Source(), {"format": "pt"})
    stored = load_file(path)
    for index in range(4):
        for name, tensor in tensors_of(index).items():
            assert stored[name].dtype == tensor.dtype
            assert torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8))
    assert sum(told) == packed_bytes(Source().groups) == path.stat().st_size - header_bytes(path)
    assert not path.with_name("a.safetensors.part").exists()


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_a_block_is_one_run_of_whole_pages(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, Source())
    assert header_bytes(path) % PAGE_BYTES == 0
    header = json.loads(path.read_bytes()[8 : header_bytes(path)])
    place = 0
    for index in range(4):
        spans = {name: header[name]["data_offsets"] for name in tensors_of(index)}
        assert min(begin for begin, _ in spans.values()) == place
        ordered = sorted(spans.values())
        assert all(end == begin for (_, end), (begin, _) in pairwise(ordered))
        q, k = (spans[f"blocks.{index}.{name}.weight"] for name in "qk")
        assert q[1] == k[0], "matrices that take the same input are one matrix"
        place = -(-ordered[-1][1] // PAGE_BYTES) * PAGE_BYTES


def test_the_tensors_of_a_block_are_one_run_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, Source())
    reader = open_file(path)
    assert reader.names() == {name for index in range(4) for name in tensors_of(index)}
    spans = []
    for name in tensors_of(2):
        tensor = reader.load(name)
        at = origin(tensor)
        assert at is not None
        spans.append((at.offset, at.offset + tensor.nbytes))
    begin, end = min(spans)[0], max(end for _, end in spans)
    assert begin % PAGE_BYTES == 0
    assert end - begin == sum(last - first for first, last in spans)


@pytest.mark.parametrize("fails_at", range(4))
def test_an_interrupted_file_goes_on_where_it_was(tmp_path: Path, fails_at: int) -> None:
    path, source = tmp_path / "a.safetensors", Source()
    source.fails_at = fails_at
    with pytest.raises(KeyboardInterrupt):
        write(path, source)
    assert not path.exists()
    source.fails_at, source.loaded = None, []
    told = write(path, source)
    assert source.loaded == list(range(max(fails_at - 1, 0), 4)), "but the last group, which may not be on the disk"
    assert sum(told) == packed_bytes(source.groups)
    whole = tmp_path / "whole.safetensors"
    write(whole, Source())
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("cut", [0, 5, 3000, 4096, 4097, 9000, 10**6])
def test_whatever_an_unfinished_file_holds_the_result_is_the_same(tmp_path: Path, cut: int) -> None:
    path, whole = tmp_path / "a.safetensors", tmp_path / "whole.safetensors"
    write(whole, Source())
    part = tmp_path / "a.safetensors.part"
    part.write_bytes(whole.read_bytes()[:cut] + b"\xff" * max(0, cut - whole.stat().st_size))
    write(path, Source())
    assert path.read_bytes() == whole.read_bytes()


def test_an_unfinished_file_of_something_else_is_written_anew(tmp_path: Path) -> None:
    path, source = tmp_path / "a.safetensors", Source()
    source.fails_at = 3
    with pytest.raises(KeyboardInterrupt):
        write(path, source, {"precision": "fp8"})
    source.fails_at, source.loaded = None, []
    write(path, source, {"precision": "int8"})
    assert source.loaded == [0, 1, 2, 3]


def dit_like(weight: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"patch_embedding.bias": torch.ones(4), **weight}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K", "Q3_K"])
def test_gguf_blocks_keep_their_bytes(tmp_path: Path, kind: str) -> None:
    name, values = "blocks.0.ffn.0.weight", torch.randn(3, 512)
    blocks = torch.from_numpy(pack(values, kind))
    stored = dit_like(stored_tensors(name, GGUFWeight(blocks, kind, 512, torch.bfloat16)))
    group = Group({key: (t.dtype, tuple(t.shape)) for key, t in stored.items()}, lambda: stored)
    write_packed(tmp_path / "a.safetensors", [group], {}, lambda _: None)
    reader = open_part(tmp_path / "a.safetensors", "dit").reader
    assert reader.names() == {"patch_embedding.bias", name}
    assert reader.shape(name) == (3, 512) and reader.ref(name).stored_as == kind
    weight = reader.load(name)
    assert isinstance(weight, GGUFWeight) and (weight.kind, weight.in_features) == (kind, 512)
    assert torch.equal(weight.blocks, blocks)


def test_a_tensor_that_is_no_gguf_block_is_refused(tmp_path: Path) -> None:
    tensors = dit_like({"blocks.0.ffn.0.weight.Q4_K": torch.zeros(3, 145, dtype=torch.uint8)})
    save_file(tensors, tmp_path / "a.safetensors", metadata={"wanfast_packed": "1"})
    with pytest.raises(CheckpointError, match=r"a\.safetensors: tensor blocks\.0\.ffn\.0\.weight\.Q4_K"):
        open_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_rows_are_quantised_to_half_a_step(dtype: torch.dtype) -> None:
    """Against float64: the scale maps a row's largest number to the largest code, and every number to its nearest."""
    largest = {torch.int8: 127, torch.float8_e4m3fn: 28}[dtype]
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 64)[:, None]
    weight[5] = 0
    stored = quantize_rows(weight, dtype)
    assert stored.scale.shape == (64, 1) and stored.values.dtype == dtype and stored.dtype == torch.float32
    codes = torch.arange(-127, 128).double()
    if dtype != torch.int8:
        codes = torch.arange(256, dtype=torch.uint8).view(dtype).double()
        codes = codes[codes.isfinite()]
    scale = stored.scale.double()
    rows = [row for row in range(64) if row != 5]
    torch.testing.assert_close(
        scale[rows], weight[rows].double().abs().amax(1, keepdim=True) / largest, rtol=1e-6, atol=0
    )
    nearest = (weight.double() / scale)[..., None].sub(codes).abs().amin(-1) * scale
    error = (stored.values.double() * scale - weight.double()).abs()
    assert (error <= nearest * (1 + 1e-5) + 1e-12).all()
    assert (stored.values[5].float() == 0).all() and stored.scale[5] == 1
    assert (stored.values.double().abs().amax(1)[rows] == largest).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_for_8_bit_arithmetic_are_read_back_as_what_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    """int8 of whole groups is rotated, so that an outlier channel does not take up its range."""
    name = "blocks.0.ffn.0.weight"
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    weight[:, 7] *= 40
    parts = stored_tensors(name, quantize_rows(weight, dtype))
    save_file(dit_like(parts), tmp_path / "a.safetensors", metadata={"wanfast_packed": "1"})
    stored = open_part(tmp_path / "a.safetensors", "dit").reader.load(name)
    assert isinstance(stored, ScaledWeight)
    assert (stored.is_rotated, stored.is_narrow) == ((True, False) if dtype == torch.int8 else (False, True))
    error = (expand(replace(stored, dtype=torch.float32)).double() - weight).square().mean().sqrt()
    plain = weight.abs().amax(1, keepdim=True) / 127 / 12**0.5  # RMS error of int8 without a rotation
    assert error < (0.5 if dtype == torch.int8 else 2) * plain.square().mean().sqrt()


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("rotated", torch.zeros(4, 256).to(torch.float8_e4m3fn)),
        ("rotated", torch.zeros(4, 200, dtype=torch.int8)),
        ("narrow", torch.zeros(4, 256, dtype=torch.int8)),
    ],
)
def test_a_scale_that_goes_with_other_weights_is_refused(kind: str, values: Tensor, tmp_path: Path) -> None:
    name = "blocks.0.ffn.0.weight"
    tensors = dit_like({name: values, f"{name}_scale_{kind}": torch.ones(4, 1)})
    save_file(tensors, tmp_path / "a.safetensors", metadata={"wanfast_packed": "1"})
    with pytest.raises(CheckpointError, match=rf"{name}.*weight_scale_{kind}"):
        open_part(tmp_path / "a.safetensors", "dit")
