import json
import time
from pathlib import Path

import pytest
import torch
from reference.checkpoints import (
    Shapes,
    dit_shapes,
    random_state,
    text_shapes,
    vae_shapes,
    write_diffusers,
    write_json,
    write_official,
    write_safetensors,
)
from safetensors.torch import save_file

from wanfast.checkpoint.inspect import describe, format_description
from wanfast.checkpoint.names import dit_to_diffusers, text_to_transformers, vae_to_diffusers
from wanfast.errors import CheckpointError

DIT = dit_shapes(dim=24, ffn_dim=20, in_dim=12, out_dim=4, layers=2, text_dim=10, freq_dim=8)
TEXT = text_shapes(vocab=7, dim=10, ffn_dim=12, heads=2, layers=2)
VAE = vae_shapes("2.1", z=4, encoder_dim=4, decoder_dim=4)


def _official(folder: Path) -> Path:
    experts = {name: random_state(DIT, seed=name) for name in ("high_noise", "low_noise")}
    text = random_state(TEXT, dtype=torch.bfloat16)
    return write_official(folder, task="i2v", experts=experts, vae=random_state(VAE), text=text, num_heads=2, shards=2)


def _count(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def test_a_checkpoint_folder_is_described_part_by_part(tmp_path):
    folder = _official(tmp_path / "model")
    write_json(folder / "wanfast.json", {"name": "small", "fps": 8})
    description = describe(folder)
    assert description == json.loads(json.dumps(description))
    assert (description["layout"], description["task"]) == ("official", "i2v")
    assert description["defaults"] == {"name": "small", "fps": 8}
    assert list(description["parts"]) == ["high_noise", "low_noise", "text", "vae"]
    high = description["parts"]["high_noise"]
    assert high["num_tensors"] == len(DIT) and high["num_parameters"] == _count(DIT)
    assert high["bytes_by_dtype"] == {"float32": 4 * _count(DIT)}
    assert high["sizes"] == {"dim": 24, "in_channels": 12, "out_channels": 4, "num_layers": 2}
    assert len(high["files"]) == 2
    text = description["parts"]["text"]
    assert text["bytes_by_dtype"] == {"bfloat16": 2 * _count(TEXT)} and text["num_bytes"] == 2 * _count(TEXT)
    assert text["sizes"] == {"vocab_size": 7, "dim": 10, "num_layers": 2}
    assert description["parts"]["vae"]["sizes"] == {"version": "2.1", "z_dim": 4}


def test_a_diffusers_folder_is_described_alike(tmp_path):
    high, low = (
        {dit_to_diffusers(name): tensor for name, tensor in random_state(DIT, seed=expert).items()}
        for expert in ("high_noise", "low_noise")
    )
    folder = write_diffusers(
        tmp_path / "diffusers",
        task="i2v",
        transformer=high,
        transformer_2=low,
        vae={vae_to_diffusers(name, "2.1"): tensor for name, tensor in random_state(VAE).items()},
        text={text_to_transformers(name): t for name, t in random_state(TEXT, dtype=torch.bfloat16).items()},
        num_heads=2,
        boundary=0.9,
    )
    parts = [describe(path)["parts"] for path in (folder, _official(tmp_path / "official"))]
    for described in parts:
        for part in described.values():
            del part["files"]
    assert parts[0] == parts[1]
    assert describe(folder)["boundary"] == 0.9


@pytest.mark.parametrize("naming", ["official", "converted"])
@pytest.mark.parametrize(
    ("kind", "shapes", "convert", "sizes"),
    [
        ("dit", DIT, dit_to_diffusers, {"dim": 24, "in_channels": 12, "out_channels": 4, "num_layers": 2}),
        ("text", TEXT, text_to_transformers, {"vocab_size": 7, "dim": 10, "num_layers": 2}),
        ("vae", VAE, lambda name: vae_to_diffusers(name, "2.1"), {"version": "2.1", "z_dim": 4}),
        (
            "vae",
            vae_shapes("2.2", z=6, encoder_dim=4, decoder_dim=4),
            lambda name: vae_to_diffusers(name, "2.2"),
            {"version": "2.2", "z_dim": 6},
        ),
    ],
)
def test_a_single_file_is_told_by_its_names(tmp_path, kind, shapes, convert, sizes, naming):
    state = {convert(name) if naming == "converted" else name: t for name, t in random_state(shapes).items()}
    save_file(state, tmp_path / "file.safetensors")
    torch.save(state, tmp_path / "file.pth")
    for path in (tmp_path / "file.safetensors", tmp_path / "file.pth"):
        (part,) = describe(path)["parts"].values()
        assert (part["kind"], part["sizes"], part["num_parameters"]) == (kind, sizes, _count(shapes))


def test_any_single_shard_is_told(tmp_path):
    write_safetensors(tmp_path, random_state(DIT), shards=5)
    for shard in tmp_path.glob("*.safetensors"):
        assert describe(shard)["parts"]["file"]["kind"] == "dit"
    assert describe(next(tmp_path.glob("*.index.json")))["parts"]["file"]["num_tensors"] == len(DIT)


@pytest.mark.parametrize(
    "name", ["blocks.0.self_attn.q.lora_down.weight", "diffusion_model.blocks.0.ffn.0.lora_A.weight", "x"]
)
def test_other_tensor_files_are_not_taken_for_a_model(tmp_path, name):
    save_file({name: torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors: not a file wanfast knows"):
        describe(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["a.txt", "a.ckpt", "a"])
def test_other_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"text")
    with pytest.raises(CheckpointError, match="not a tensor file wanfast knows"):
        describe(tmp_path / name)
    with pytest.raises(CheckpointError, match="no such folder"):
        describe(tmp_path / "absent")


def test_the_table_has_a_line_for_every_part(tmp_path):
    folder = _official(tmp_path)
    lines = format_description(describe(folder)).splitlines()
    assert lines[0] == str(folder)
    assert [line.split()[:2] for line in lines[1:3]] == [["task", "i2v"], ["layout", "official"]]
    rows = {line.split()[0]: line for line in lines[4:]}
    assert list(rows) == ["high_noise", "low_noise", "text", "vae"]
    assert f"{_count(DIT):,}" in rows["high_noise"] and "in_channels=12" in rows["high_noise"]
    assert f"{2 * _count(TEXT) / 1000:.2f} kB" in rows["text"] and "bfloat16" in rows["text"]


def test_the_full_size_model_is_described_in_under_a_second(tmp_path):
    header, end = {}, 0
    for name, shape in dit_shapes(dim=5120, ffn_dim=13824, in_dim=36, out_dim=16, layers=40).items():
        begin, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path = tmp_path / "dit.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)  # sparse
    start = time.perf_counter()
    part = describe(path)["parts"]["file"]
    assert time.perf_counter() - start < 1
    assert part["num_parameters"] == 14_288_901_184
    assert part["sizes"] == {"dim": 5120, "in_channels": 36, "out_channels": 16, "num_layers": 40}
