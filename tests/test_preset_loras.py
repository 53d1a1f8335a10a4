"""A folder may bring LoRAs along for a preset: they are used with it where none are asked for, everywhere alike."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from reference import loras
from reference.tiny import random_tiny

import wanfast
from wanfast.__main__ import main
from wanfast.convert import convert_model
from wanfast.errors import CheckpointError
from wanfast.lora import file_digest
from wanfast.model import open_model
from wanfast.video import read_settings

SMALL = {"width": 32, "height": 32, "num_frames": 1, "seed": 1}
WORDS = ["--size", "32x32", "--num-frames", "1", "--seed", "1", "--preset", "lightning4", "--quiet", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a pair of LoRAs for its preset, and another LoRA beside it."""
    folder = random_tiny(tmp_path_factory.mktemp("presets") / "model")
    layers = loras.linear_layers(open_model(folder).config.dit)
    (folder / "lightning").mkdir()
    names = [f"lightning/{name}_model.safetensors" for name in ("high_noise", "low_noise")]
    for seed, name in enumerate(names):
        loras.write_lora(folder / name, loras.random_factors(layers, rank=4, seed=seed))
    loras.write_lora(folder.parent / "other.safetensors", loras.random_factors(layers, rank=4, seed=7))
    settings = json.loads((folder / "wanfast.json").read_text())
    (folder / "wanfast.json").write_text(json.dumps(settings | {"preset_loras": {"lightning4": names}}))
    return folder


def of(folder: Path, **options: object) -> torch.Tensor:
    made = wanfast.load(folder, device="cpu").generate("a", output="latents", **SMALL, **options)
    assert isinstance(made, torch.Tensor)
    return made


def test_they_go_with_the_preset_and_with_nothing_else(folder: Path) -> None:
    pair = sorted((folder / "lightning").iterdir())
    four = {"num_inference_steps": 4, "solver": "euler", "shift": 5.0, "guidance": 1.0}
    with_preset = of(folder, preset="lightning4")
    assert torch.equal(with_preset, of(folder, preset="lightning4", loras=pair))
    assert torch.equal(with_preset, of(folder, loras=pair, **four))
    assert not torch.equal(with_preset, of(folder, **four))
    other = [folder.parent / "other.safetensors"]
    assert torch.equal(of(folder, preset="lightning4", loras=other), of(folder, loras=other, **four))


def test_the_command_uses_and_records_them(folder: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    assert main(["generate", "a", "--model", str(folder), *WORDS, "-o", str(clip)]) == 0
    recorded = read_settings(clip)["loras"]
    pair = sorted((folder / "lightning").iterdir())
    assert [one["sha256"] for one in recorded] == [file_digest(file) for file in pair]
    again = tmp_path / "again.mp4"
    assert main(["rerun", str(clip), "--device", "cpu", "--quiet", "-o", str(again)]) == 0
    assert read_settings(again)["loras"] == recorded


def test_a_moved_model_still_has_them_for_a_rerun(folder: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    assert main(["generate", "a", "--model", str(folder), *WORDS, "-o", str(clip)]) == 0
    moved = folder.rename(folder.parent / "moved")
    try:
        words = ["--model", str(moved), "--device", "cpu", "--quiet"]
        assert main(["rerun", str(clip), *words, "-o", str(tmp_path / "again.mp4")]) == 0
    finally:
        moved.rename(folder)


def test_batches_and_plans_have_them_too(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    out = tmp_path / "out"
    out.mkdir()
    assert main(["generate", "--prompts", str(prompts), "--model", str(folder), *WORDS, "-o", str(out)]) == 0
    (clip,) = out.glob("*.mp4")
    assert len(read_settings(clip)["loras"]) == 2
    words = [word for word in WORDS if word != "--quiet"]
    assert main(["plan", "a", "--model", str(folder), *words]) == 0
    assert "LoRAs" in capsys.readouterr().out


def test_a_conversion_takes_them_along(folder: Path, tmp_path: Path) -> None:
    converted = convert_model(open_model(folder), tmp_path / "converted", "exact")
    pair = {file_digest(file) for file in (folder / "lightning").iterdir()}
    loras = open_model(converted).preset_loras["lightning4"]
    assert {file_digest(file) for file in loras} == pair
    assert all(file.is_relative_to(converted) for file in loras)
    loras[0].unlink()
    with pytest.raises(CheckpointError, match=r"is missing, which .* names for preset lightning4"):
        open_model(converted)


def test_a_conversion_keeps_files_of_one_name_apart(folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    pair = sorted((folder / "lightning").iterdir())
    names = ["one/model.safetensors", "two/model.safetensors"]
    for file, name in zip(pair, names, strict=True):
        (model / name).parent.mkdir()
        shutil.copyfile(file, model / name)
    settings = json.loads((model / "wanfast.json").read_text())
    (model / "wanfast.json").write_text(json.dumps(settings | {"preset_loras": {"lightning4": names}}))
    copied = open_model(convert_model(open_model(model), tmp_path / "converted", "exact")).preset_loras["lightning4"]
    assert [file.name for file in copied] == ["model.safetensors"] * 2
    assert [file_digest(file) for file in copied] == [file_digest(file) for file in pair]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"lightnng4": []}, "preset_loras: must be for lightning4, got 'lightnng4'"),
        ({"lightning4": ["gone.safetensors"]}, r"gone\.safetensors: is missing, which .* names for preset lightning4"),
        ({"lightning4": "a.safetensors"}, "preset_loras: must be lists of files by preset"),
        ({"lightning4": [3]}, "preset_loras: must be lists of files by preset"),
        (["a.safetensors"], "preset_loras: must be lists of files by preset"),
    ],
    ids=["misspelt", "gone", "text", "number", "list"],
)
def test_what_names_no_files_is_refused(value: object, told: str, tmp_path: Path) -> None:
    folder = random_tiny(tmp_path / "model")
    (folder / "wanfast.json").write_text(json.dumps({"preset_loras": value}))
    with pytest.raises(CheckpointError, match=told):
        wanfast.load(folder, device="cpu")
