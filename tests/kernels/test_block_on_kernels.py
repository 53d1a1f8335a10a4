"""A whole DiT block through its kernels, launched as a GPU would launch them, against the same block on references."""

import importlib
import pkgutil
from dataclasses import replace

import pytest
import torch
from reference.dit import golden_state, golden_tensor, small_config
from torch import Tensor

import wanfast.kernels
from wanfast.checkpoint.reader import memory_reader
from wanfast.dit.model import predict_velocities
from wanfast.dit.packed import pack_block, prepare_block
from wanfast.dit.weights import load_block, load_outer
from wanfast.residency import to_device

CONFIG = replace(small_config("ti2v"), dim=256, num_heads=2, ffn_dim=384, num_layers=1, text_len=16)
GRID = (3, 10, 10)  # 75 tokens: no multiple of anything


dequantize_scaled = importlib.import_module("wanfast.kernels.dequantize_scaled")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Every operation launches its kernel; where there is no GPU, the interpreter runs it."""
    if device.type == "cuda":
        return
    for module in pkgutil.iter_modules(wanfast.kernels.__path__):
        found = importlib.import_module(f"wanfast.kernels.{module.name}")
        if hasattr(found, "runs_triton"):
            monkeypatch.setattr(found, "runs_triton", lambda x: True)
    monkeypatch.setattr(dequantize_scaled, "_converts", lambda *_: True)  # asks the GPU what it can


def velocity(precision: str, device: torch.device) -> Tensor:
    reader = memory_reader(golden_state(CONFIG))
    dtype = torch.bfloat16
    blocks = [load_block(reader, CONFIG, index, dtype) for index in range(CONFIG.num_layers)]
    if precision != "exact":
        eight_bit = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[precision]
        blocks = [prepare_block(block, eight_bit) for block in blocks]
    blocks = [to_device(block, device) for block in blocks]
    if precision != "exact":
        blocks = [pack_block(block, eight_bit) for block in blocks]
    outer = to_device(load_outer(reader, CONFIG, dtype), device)
    contexts = [golden_tensor("ctx", 1, 9, CONFIG.text_dim).to(device, dtype)]
    latents = golden_tensor("x48", 1, 48, *GRID).to(device)
    options = {"first_frame_timestep": 0.0, "chunk_tokens": 64}
    return predict_velocities(latents, 500, contexts, outer, blocks, CONFIG, **options)[0].cpu()


@pytest.fixture(scope="module")
def references() -> dict[str, Tensor]:
    """Velocities without a kernel; made before `launches`, which lives for one test."""
    with torch.no_grad():
        return {precision: velocity(precision, torch.device("cpu")) for precision in ("exact", "int8", "fp8")}


@pytest.mark.parametrize("precision", ["exact", "int8", "fp8"])
@torch.no_grad()
def test_the_model_on_its_kernels_is_the_model_on_its_references(
    precision: str, references: dict[str, Tensor], launches: None, device: torch.device
) -> None:
    """What differs is a value here and there that is rounded to the other neighbour."""
    got = velocity(precision, device)
    error = (got - references[precision]).square().mean().sqrt() / references[precision].square().mean().sqrt()
    assert error < {"exact": 0.004, "int8": 0.008, "fp8": 0.02}[precision]
