"""A file that is cut short in use, as by `cp` over it: a named error or the undisturbed frames, no dead process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reference.gguf_files import write_gguf
from reference.loras import linear_layers, random_factors, write_lora
from reference.tiny import random_tiny

from wanfast.convert import convert_model
from wanfast.model import Model, open_model

HIGH, LOW = (f"{name}_noise_model/diffusion_pytorch_model.safetensors" for name in ("high", "low"))
RUN = ("--size", "32x32", "--num-frames", "5", "--steps", "4", "--seed", "1", "--device", "cpu")
BLOCKS = 4  # of an expert; both take two steps
FIRST, IN_PASS, LAST_OF_STEP, AT_SWAP, IN_LOW = 0, 2, BLOCKS - 1, 2 * BLOCKS, 3 * BLOCKS + 1

# form: words of the command, file that is cut -> moments at which it is
CASES: dict[tuple[str, str], list[tuple[str, int]]] = {
    ("fp32", HIGH): [("block", IN_PASS), ("block", BLOCKS + 1), ("decoder", 0)],
    ("fp32", LOW): [("block", IN_PASS), ("block", AT_SWAP), ("block", IN_LOW)],
    ("rounded", HIGH): [("block", IN_PASS)],
    ("rounded", LOW): [("block", LAST_OF_STEP)],
    ("slots", HIGH): [("block", BLOCKS + 1)],
    ("slots", LOW): [("block", IN_LOW)],
    ("bf16", "high_noise.safetensors"): [("block", FIRST), ("block", IN_PASS)],
    ("bf16", "low_noise.safetensors"): [("block", IN_PASS), ("block", AT_SWAP)],
    ("int8", "high_noise.safetensors"): [("block", IN_PASS)],
    ("gguf", "high_noise.gguf"): [("block", IN_PASS)],
    ("gguf", "low_noise.gguf"): [("block", IN_PASS), ("block", AT_SWAP)],
    ("fp32", "models_t5_umt5-xxl-enc-bf16.pth"): [("text block", 0), ("text block", 1), ("block", FIRST)],
    ("bf16", "text_encoder.safetensors"): [("text block", 1)],
    ("fp32", "Wan2.1_VAE.pth"): [("decoder", 0)],
    ("bf16", "vae.safetensors"): [("decoder", 0)],
    ("lora", "lora.safetensors"): [("adapter", 0), ("adapter", 1), ("block", IN_PASS)],
}


def _gguf(model: Model, folder: Path) -> Path:
    folder.mkdir()
    for name, reader in model.experts.items():
        tensors = {key: reader.load(key) for key in reader.names()}
        matrices = {key for key in tensors if key.startswith("blocks.") and len(reader.shape(key)) == 2}
        write_gguf(folder / f"{name}.gguf", tensors, lambda key, _: "Q8_0" if key in matrices else "F32")  # type: ignore[arg-type]  # noqa: B023
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tiny = random_tiny(folder / "tiny")
    model = open_model(tiny)
    lora = random_factors(linear_layers(model.config.dit), seed=1)
    (folder / "lora").mkdir()
    write_lora(folder / "lora" / "lora.safetensors", lora)
    return {
        "fp32": tiny,
        "bf16": convert_model(model, folder / "bf16", "exact"),
        "int8": convert_model(model, folder / "int8", "int8"),
        "gguf": _gguf(model, folder / "gguf"),
        "lora": folder / "lora",
    }


def _words(form: str, model: Path, whole: Path) -> list[str]:
    """Of the command; `model` is a copy that may be cut, `whole` the tiny model that stays."""
    if form == "gguf":
        parts = ["--high", model / "high_noise.gguf", "--low", model / "low_noise.gguf"]
        parts += ["--vae", whole / "Wan2.1_VAE.pth", "--text-encoder", whole / "models_t5_umt5-xxl-enc-bf16.pth"]
        return [*RUN, *map(str, parts), "--tokenizer", str(whole / "google/umt5-xxl"), "--precision", "exact"]
    if form == "lora":
        return [*RUN, "--model", str(whole), "--precision", "fp32", "--lora", str(model / "lora.safetensors")]
    more = {"fp32": "fp32", "slots": "fp32 --vram 7MB", "rounded": "exact", "bf16": "exact", "int8": "int8"}[form]
    return [*RUN, "--model", str(model), "--precision", *more.split()]


@pytest.fixture(scope="module")
def ended(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], dict[str, Any]]:
    """How each case ended, those undisturbed among them."""
    place, cases = tmp_path_factory.mktemp("runs"), {}
    runs = [(form, None, "", 0) for form in dict.fromkeys(form for form, _ in CASES)]
    runs += [(*case, *moment) for case, moments in CASES.items() for moment in moments]  # type: ignore[misc]
    for number, (form, file, moment, at) in enumerate(runs):
        model = models["fp32" if form in ("slots", "rounded") else form]
        if file is not None:
            copy = place / f"model{number}"
            shutil.copytree(model, copy)
            model = copy
        cases[form, file, moment, at] = {
            "words": _words(form, model, models["fp32"]),
            "cut": None if file is None else str(model / file),
            "moment": moment,
            "number": at,
            "cache": str(place / f"cache{number}"),
            "output": str(place / f"{number}.mp4"),
        }
    script, environment = Path(__file__).with_name("truncated_runs.py"), os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(list(cases.values())),
        capture_output=True,
        text=True,
        cwd=place,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    results = zip(cases, cases.values(), json.loads(done.stdout), strict=True)
    return {key: case | result for key, case, result in results}


def _bytes(case: dict[str, Any]) -> bytes | None:
    output = Path(case["output"])
    return output.read_bytes() if output.exists() else None


@pytest.mark.parametrize(
    ("form", "file", "moment", "number"),
    [(*case, *moment) for case, moments in CASES.items() for moment in moments],
)
def test_a_named_error_or_the_undisturbed_frames(
    form: str, file: str, moment: str, number: int, ended: dict[tuple[Any, ...], dict[str, Any]]
) -> None:
    whole, case = ended[form, None, "", 0], ended[form, file, moment, number]
    assert whole["code"] == 0 and _bytes(whole), whole["told"]
    assert Path(case["cut"]).stat().st_size > 0
    if case["code"] == 0:
        assert form == "lora" and _bytes(case) == _bytes(whole), "weights that were read belong to a file that is gone"
        return
    assert case["code"] == 1, f"{case['code']}: {case['told']}"
    assert _bytes(case) is None
    assert case["told"].startswith(f"wanfast generate: {case['cut']}: ") and len(case["told"].splitlines()) == 1
    assert any(said in case["told"] for said in ("truncated while in use", "written to while in use")), case["told"]
