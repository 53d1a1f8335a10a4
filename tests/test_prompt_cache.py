"""Encoded prompts on disk: the same numbers without the encoder, and never a wrong one."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.families import make_family
from safetensors.torch import load_file, save_file
from torch import Tensor

import wanfast
from wanfast import prompt_cache
from wanfast.loaded import LoadedModel

SMALL: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 2, "seed": 1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_family("t2v", tmp_path).write_official(tmp_path / "model")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prompt_cache, "MIN_ENCODER_BYTES", 0)
    return tmp_path / "cache" / "wanfast" / "prompts"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often the text encoder is read."""
    calls: list[int] = []
    own = LoadedModel.text_encoder

    def counted(self: LoadedModel) -> Any:
        calls.append(1)
        return own(self)

    monkeypatch.setattr(LoadedModel, "text_encoder", counted)
    return calls


def latents(model: Path, prompt: str = "a red ball", precision: str = "fp32") -> Tensor:
    pipeline = wanfast.load(model, precision=precision, device="cpu")
    return pipeline.generate(prompt, negative_prompt="the cat", output="latents", **SMALL)


@pytest.mark.parametrize("precision", ["fp32", "exact"])
def test_a_second_run_reads_no_encoder_and_gives_the_same(
    precision: str, model: Path, folder: Path, encoded: list[int]
) -> None:
    first = latents(model, precision=precision)
    assert len(encoded) == 1 and len(list(folder.iterdir())) == 2
    assert torch.equal(latents(model, precision=precision), first)
    assert len(encoded) == 1


def test_the_negative_prompt_is_there_for_another_prompt(model: Path, folder: Path, encoded: list[int]) -> None:
    want = latents(model, "the ball")
    for path in folder.iterdir():
        path.unlink()
    latents(model)
    assert torch.equal(latents(model, "the ball"), want), "one of the two encoded alone"
    assert len(encoded) == 3 and len(list(folder.iterdir())) == 3


def test_a_changed_encoder_is_read_again(model: Path, encoded: list[int]) -> None:
    first = latents(model)
    path = model / "models_t5_umt5-xxl-enc-bf16.pth"
    state = torch.load(path)
    torch.save({name: tensor * 1.5 for name, tensor in state.items()}, path)
    second = latents(model)
    assert len(encoded) == 2 and not torch.equal(first, second)


def test_other_precisions_do_not_meet(model: Path, encoded: list[int]) -> None:
    latents(model)
    latents(model, precision="exact")
    assert len(encoded) == 2


def damage(path: Path) -> Iterator[None]:
    whole = path.read_bytes()
    for data in (b"", whole[:-1], b"\xff" * len(whole)):
        path.write_bytes(data)
        yield
    context = load_file_of(whole, path)
    for wrong in (context[:-1], context.double(), torch.full_like(context, torch.nan)):
        save_file({"context": wrong.contiguous()}, path)
        yield
    save_file({"other": context}, path)
    yield


def load_file_of(data: bytes, path: Path) -> Tensor:
    path.write_bytes(data)
    return load_file(path)["context"].clone()


def test_a_damaged_entry_is_as_if_it_were_not_there(model: Path, folder: Path, encoded: list[int]) -> None:
    want = latents(model)
    calls = 1
    for path in list(folder.iterdir()):
        for _ in damage(path):
            assert torch.equal(latents(model), want)
            calls += 1
            assert len(encoded) == calls


def test_a_folder_that_cannot_be_written_to_is_no_fault(model: Path, folder: Path, encoded: list[int]) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file stands where the folder would")
    want = latents(model)
    assert torch.equal(latents(model), want)
    assert len(encoded) == 2


def test_a_small_encoder_is_not_cached(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "MIN_ENCODER_BYTES", 100_000_000)
    latents(model)
    assert not folder.exists()


def test_the_oldest_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(prompt_cache, "MAX_CACHE_BYTES", 80_000)
    config = wanfast.load(device="cpu").loaded.config.text
    files = [folder / f"{index}.safetensors" for index in range(4)]
    for index, file in enumerate(files):
        prompt_cache.write_context(file, torch.full((50, config.dim), float(index)))  # 25,600 bytes each
        os.utime(file, (1000 + index, 1000 + index))
        if index == 2:
            assert prompt_cache.read_context(files[0], 50, config, torch.float32) is not None
    assert [file.exists() for file in files] == [True, False, True, True], "0 was used after 1"
    assert not list(folder.glob("*.part"))


def test_no_prompt_is_written_down(model: Path, folder: Path) -> None:
    latents(model, "a red ball")
    for path in folder.iterdir():
        assert b"ball" not in path.read_bytes() and "ball" not in path.name
