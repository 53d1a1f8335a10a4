"""A small Wan 2.2 model as the single files that ComfyUI's users have."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from reference.quantised import comfy_fp8
from safetensors.torch import save_file
from torch import Tensor

from wanfast.checkpoint.names import text_to_transformers
from wanfast.config import VAE_2_1, VAE_2_2, DiTConfig, TextConfig
from wanfast.dit.weights import expected_tensors as dit_tensors
from wanfast.random_weights import byte_tokenizer, random_tensors
from wanfast.text.weights import expected_tensors as text_tensors
from wanfast.vae.weights import expected_tensors as vae_tensors

CHANNELS = {"t2v": (16, 16), "i2v": (36, 16), "ti2v": (48, 48)}
TEXT = TextConfig(
    vocab_size=400,
    dim=24,
    attention_dim=24,
    ffn_dim=40,
    num_heads=2,
    num_layers=2,
    num_buckets=32,
    max_distance=128,
    eps=1e-6,
)
State = dict[str, Tensor]


def dit_state(task: str = "t2v", seed: str = "high") -> State:
    """One expert with a single head of 128 channels."""
    taken, given = CHANNELS[task]
    config = DiTConfig(
        in_channels=taken,
        out_channels=given,
        dim=128,
        ffn_dim=160,
        num_heads=1,
        num_layers=2,
        text_dim=TEXT.dim,
        text_len=512,
        freq_dim=32,
        patch_size=(1, 2, 2),
        eps=1e-6,
    )
    return random_tensors(dit_tensors(config), seed=seed)


def vae_state(version: str = "2.1") -> State:
    row = VAE_2_1 if version == "2.1" else VAE_2_2
    return random_tensors(vae_tensors(replace(row, encoder_dim=8, decoder_dim=8)), seed="vae")


def text_state() -> State:
    return random_tensors(text_tensors(TEXT), seed="text")


def comfy_text_encoder(state: Mapping[str, Tensor], spiece: bytes | None) -> tuple[State, State]:
    """umT5 as ComfyUI ships it: transformers' names, fp8, the vocabulary inside; and the values it stands for."""
    file, plain = comfy_fp8(state, has_input_scales=False)
    renamed: State = {}
    for name, tensor in file.items():
        layer, _, kind = name.rpartition(".")
        is_scale = kind == "scale_weight"
        other = text_to_transformers(f"{layer}.weight" if is_scale else name)
        renamed[other.removesuffix("weight") + kind if is_scale else other] = tensor
    if spiece is not None:
        renamed["spiece_model"] = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    return renamed, plain


def write(path: Path, state: Mapping[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def write_comfy(models: Path, *, spiece: bytes | None = None, task: str = "t2v", kind: str = "fp8_scaled") -> Path:
    """Write a ComfyUI `models/` folder with one model; without SentencePiece bytes, a tokenizer.json lies in it."""
    dits = models / "diffusion_models"
    if task == "ti2v":
        write(dits / f"wan2.2_ti2v_5B_{kind}.safetensors", comfy_fp8(dit_state(task))[0])
    else:
        for word in ("high", "low"):
            write(dits / f"wan2.2_{task}_{word}_noise_14B_{kind}.safetensors", comfy_fp8(dit_state(task, word))[0])
    write(models / "vae" / "wan_2.1_vae.safetensors", {name: t.half() for name, t in vae_state("2.1").items()})
    write(models / "vae" / "wan2.2_vae.safetensors", {name: t.half() for name, t in vae_state("2.2").items()})
    text = comfy_text_encoder(text_state(), spiece)[0]
    write(models / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", text)
    if spiece is None:
        byte_tokenizer(TEXT.vocab_size).save(str(models / "text_encoders" / "tokenizer.json"))
    return models
