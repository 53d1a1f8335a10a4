"""What `wanfast inspect` says of LoRA files, those of the published sizes among them, made sparse."""

import json
import time
from pathlib import Path

import pytest
import torch
from reference import loras
from safetensors.torch import save_file

from wanfast.__main__ import main
from wanfast.config import MODELS
from wanfast.lora import LoraSpec, open_lora
from wanfast.lora_summary import lora_summary

RANK = 64


def write_sparse(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Path:
    """Write a safetensors file whose tensors are holes: all its names and sizes, none of its bytes."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = torch.Size(shape).numel() * {"F32": 4, "F64": 8, "BF16": 2}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def published(dtype: str = "F32", *, alpha: bool = True) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a Lightning LoRA for A14B: rank 64 on the ten layers of each of 40 blocks."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (out, inner) in loras.linear_layers(MODELS["t2v-A14B"].dit).items():
        tensors |= {f"diffusion_model.{name}.alpha": ("F64", ())} if alpha else {}
        tensors[f"diffusion_model.{name}.lora_down.weight"] = (dtype, (RANK, inner))
        tensors[f"diffusion_model.{name}.lora_up.weight"] = (dtype, (out, RANK))
    return tensors


def test_the_published_lightning_lora_opens_and_is_described_at_once(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "high_noise_model.safetensors", published())
    assert abs(path.stat().st_size - 1_226_977_424) < 64_000, "as published, but for the spelling of the header"
    seconds = []
    for _ in range(3):
        started = time.process_time()
        summary = lora_summary(path)
        lora = open_lora(LoraSpec(path), MODELS["t2v-A14B"])
        seconds.append(time.process_time() - started)
    assert min(seconds) < 2
    assert summary is not None
    assert (summary["what"], summary["models"], summary["experts"]) == (
        "LoRA",
        ["t2v-A14B", "i2v-A14B"],
        ["high_noise"],
    )
    assert (summary["ranks"], summary["unmatched"]) == ([RANK], [])
    assert summary["layers"] == dict.fromkeys(sorted(summary["layers"]), 40)
    assert len(summary["layers"]) == 10
    assert summary["dtypes"] == {"float32": 800, "float64": 400}
    assert len(lora.report.matched) == 1200


def test_the_distilled_lora_with_differences(tmp_path: Path) -> None:
    """The lightx2v kind: no alpha, more layers, differences, and image attention that Wan 2.2 does not have."""
    tensors = published("BF16", alpha=False)
    for index in range(40):
        block = f"diffusion_model.blocks.{index}"
        tensors |= {f"{block}.diff_m": ("BF16", (1, 6, 5120)), f"{block}.norm3.diff_b": ("BF16", (5120,))}
        tensors |= {f"{block}.cross_attn.k_img.lora_down.weight": ("BF16", (RANK, 5120))}
    tensors |= {"diffusion_model.patch_embedding.diff": ("BF16", (5120, 36, 1, 2, 2))}
    path = write_sparse(tmp_path / "wan2.2_i2v_A14b_low_noise_lora_rank64_lightx2v_4step_1022.safetensors", tensors)
    summary = lora_summary(path)
    assert summary is not None
    assert (summary["models"], summary["experts"], summary["scales"]) == (["i2v-A14B"], ["low_noise"], [1.0])
    assert summary["layers"]["modulation"] == summary["layers"]["norm3"] == 40
    assert summary["layers"]["patch_embedding"] == 1
    lora = open_lora(LoraSpec(path), MODELS["i2v-A14B"])
    assert len(lora.report.skipped) == 40
    assert lora.report.unmatched == ()


def test_what_is_no_lora_is_left_to_others(tmp_path: Path) -> None:
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    assert lora_summary(tmp_path / "model.safetensors") is None
    assert lora_summary(tmp_path) is None
    assert lora_summary(tmp_path / "nothing") is None


def test_inspect_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = {"blocks.0.ffn.0": (96, 64)}
    path = loras.write_lora(tmp_path / "small.safetensors", loras.random_factors(layers), dialect="musubi", alpha=2.0)
    assert main(["inspect", str(path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["models"], summary["ranks"], summary["layers"]) == ([], [loras.RANK], {"ffn.0": 1})
    assert "another model" in summary["fault"]
    save_file({"lora_unet_blocks_0_ffn_0.dora_scale": torch.zeros(4)}, tmp_path / "d.safetensors")
    assert main(["inspect", str(tmp_path / "d.safetensors")]) == 0
    assert "DoRA" in capsys.readouterr().out
