"""`wanfast inspect` imports nothing that takes longer than reading headers does, and tells the same without it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference import loras
from reference.checkpoints import dit_shapes
from reference.families import make_family
from reference.gguf_files import write_header
from reference.meta_files import fp8_scaled, lightx2v, plain, write_meta
from reference.quantised import comfy_new
from reference.single_files import dit_state, write, write_comfy
from safetensors.torch import save_file

from wanfast.__main__ import main
from wanfast.config import MODELS

HEAVY = ("torch", "triton", "numpy", "safetensors", "huggingface_hub", "tokenizers", "einops", "av", "PIL", "tqdm")
INSPECT = f"""
import sys
from wanfast.__main__ import main
code = main(["inspect", *sys.argv[1:], "--json"])
print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""
T2V = dit_shapes(dim=5120, ffn_dim=13824, in_dim=16, out_dim=16, layers=40)
RANK = 64


def inspect(path: Path, *, code: int = 0) -> tuple[str, str]:
    """Inspect in a process of its own, which must have imported nothing heavy; give its stdout and stderr."""
    done = subprocess.run([sys.executable, "-c", INSPECT, str(path)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    *told, imported = done.stderr.splitlines()
    assert imported == "[]"
    return done.stdout, "\n".join(told)


def _gguf(folder: Path) -> Path:
    kinds = {name: "Q4_K" if len(shape) == 2 and shape[1] % 256 == 0 else "F32" for name, shape in T2V.items()}
    entries = ((name, shape, kinds[name]) for name, shape in T2V.items())
    write_header(folder / "high_noise-Q4_K_M.gguf", entries, architecture="wan", file_type=15)
    return folder / "high_noise-Q4_K_M.gguf"


def _lora(folder: Path) -> Path:
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (out, inner) in loras.linear_layers(MODELS["t2v-A14B"].dit).items():
        entries |= {
            f"{name}.lora_down.weight": ("BF16", (RANK, inner)),
            f"{name}.lora_up.weight": ("BF16", (out, RANK)),
        }
        entries[f"{name}.alpha"] = ("F32", ())
    return write_meta(folder / "high_noise_lora.safetensors", entries)


def _converted(folder: Path) -> Path:
    model = make_family("ti2v", folder).write_diffusers(folder / "diffusers")
    assert main(["convert", "--model", str(model), "--precision", "int8", "-o", str(folder / "ready"), "--quiet"]) == 0
    return folder / "ready"


# name: what writes it, "what" it is
SUBJECTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "fp16": (lambda folder: write_meta(folder / "high_noise.safetensors", plain(T2V, "F16")), "file"),
    "fp8_scaled": (lambda folder: write_meta(folder / "high_noise.safetensors", fp8_scaled(T2V)), "file"),
    "int8": (lambda folder: write_meta(folder / "high_noise.safetensors", lightx2v(T2V, "I8")), "file"),
    "fp8 with notes": (lambda folder: write(folder / "high.safetensors", comfy_new(dit_state())[0]), "file"),
    "gguf": (_gguf, "file"),
    "lora": (_lora, "LoRA"),
    "diffusers": (lambda folder: make_family("t2v", folder).write_diffusers(folder / "model"), "checkpoint"),
    "comfyui": (lambda folder: write_comfy(folder / "models", spiece=b"a vocabulary"), "checkpoint"),
    "converted": (_converted, "checkpoint"),
}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_nothing_heavy_is_imported(subject: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, what = SUBJECTS[subject]
    path = make(tmp_path)
    out, err = inspect(path)
    assert (json.loads(out)["what"], err) == (what, "")
    capsys.readouterr()
    assert main(["inspect", str(path), "--json"]) == 0
    assert out == capsys.readouterr().out, "the same where torch is there already"


def test_one_expert_twice_is_refused_without_torch(tmp_path: Path) -> None:
    model = make_family("t2v", tmp_path).write_diffusers(tmp_path / "model")
    name = "diffusion_pytorch_model.safetensors"
    shutil.copy(model / "transformer" / name, model / "transformer_2" / name)
    assert "one expert twice" in inspect(model, code=1)[1]


def test_a_damaged_file_is_refused_without_torch(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert inspect(tmp_path / "a.safetensors", code=1)[1].startswith(f"wanfast inspect: {tmp_path / 'a.safetensors'}: ")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8"])
def test_an_alpha_of_any_dtype_is_its_number(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alpha = torch.tensor(3.3).to(getattr(torch, dtype))
    name, rank = "diffusion_model.blocks.0.self_attn.q", 4
    factors = {f"{name}.lora_down.weight": torch.ones(rank, 5120), f"{name}.lora_up.weight": torch.ones(5120, rank)}
    save_file({**factors, f"{name}.alpha": alpha}, tmp_path / "lora.safetensors")
    assert main(["inspect", str(tmp_path / "lora.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scales"] == [alpha.item() / rank]
