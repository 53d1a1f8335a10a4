"""The published checkpoints as hand-written lists of names and shapes, and writers of small ones in both layouts.

Sources: parameter tables of Wan-Video/Wan2.2 (wan/modules) and the file lists of Wan-AI/Wan2.2-* on Hugging Face.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
State = Mapping[str, Tensor]

TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "post_processor": None,
    "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "model": {
        "type": "Unigram",
        "unk_id": 3,
        "byte_fallback": False,
        "vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<s>", 0.0], ["<unk>", 0.0], ["▁", -2.0], ["a", -3.0], ["b", -3.0]],
    },
}


def dit_shapes(
    *, dim: int, ffn_dim: int, in_dim: int, out_dim: int, layers: int, text_dim: int = 4096, freq_dim: int = 256
) -> Shapes:
    """Official names and shapes of a DiT."""
    shapes: Shapes = {
        "patch_embedding.weight": (dim, in_dim, 1, 2, 2),
        "patch_embedding.bias": (dim,),
        **_linear("text_embedding.0", dim, text_dim),
        **_linear("text_embedding.2", dim, dim),
        **_linear("time_embedding.0", dim, freq_dim),
        **_linear("time_embedding.2", dim, dim),
        **_linear("time_projection.1", 6 * dim, dim),
        "head.modulation": (1, 2, dim),
        **_linear("head.head", 4 * out_dim, dim),
    }
    for n in range(layers):
        block = f"blocks.{n}"
        shapes |= {f"{block}.modulation": (1, 6, dim), f"{block}.norm3.weight": (dim,), f"{block}.norm3.bias": (dim,)}
        shapes |= _linear(f"{block}.ffn.0", ffn_dim, dim) | _linear(f"{block}.ffn.2", dim, ffn_dim)
        for attention in (f"{block}.self_attn", f"{block}.cross_attn"):
            shapes |= {f"{attention}.norm_q.weight": (dim,), f"{attention}.norm_k.weight": (dim,)}
            for letter in "qkvo":
                shapes |= _linear(f"{attention}.{letter}", dim, dim)
    return shapes


def text_shapes(*, vocab: int, dim: int, ffn_dim: int, heads: int, layers: int) -> Shapes:
    """Official names and shapes of a umT5 encoder."""
    shapes: Shapes = {"token_embedding.weight": (vocab, dim), "norm.weight": (dim,)}
    for n in range(layers):
        shapes |= {f"blocks.{n}.norm1.weight": (dim,), f"blocks.{n}.norm2.weight": (dim,)}
        shapes |= {f"blocks.{n}.attn.{letter}.weight": (dim, dim) for letter in "qkvo"}
        shapes[f"blocks.{n}.pos_embedding.embedding.weight"] = (32, heads)
        shapes |= {f"blocks.{n}.ffn.{gate}.weight": (ffn_dim, dim) for gate in ("gate.0", "fc1")}
        shapes[f"blocks.{n}.ffn.fc2.weight"] = (dim, ffn_dim)
    return shapes


def vae_shapes(version: str, *, z: int, encoder_dim: int, decoder_dim: int) -> Shapes:
    """Official names and shapes of a VAE with multipliers 1, 2, 4, 4 and 2 residual blocks per encoder level."""
    e, d, pixels = encoder_dim, decoder_dim, 3 if version == "2.1" else 12
    shapes: Shapes = (
        _conv("encoder.conv1", e, pixels) | _middle("encoder.middle", 4 * e) | _head("encoder", 4 * e, 2 * z)
    )
    shapes |= _conv("conv1", 2 * z, 2 * z, 1) | _conv("conv2", z, z, 1)
    shapes |= _conv("decoder.conv1", 4 * d, z) | _middle("decoder.middle", 4 * d) | _head("decoder", d, pixels)
    down = [(e, e, 0), (e, 2 * e, 2 * e), (2 * e, 4 * e, 4 * e), (4 * e, 4 * e, None)]  # from, to, time_conv
    if version == "2.1":  # its upsampling convolution halves the channels
        up = [(4 * d, 4 * d, 2 * d, 8 * d), (2 * d, 4 * d, 2 * d, 8 * d), (2 * d, 2 * d, d, 0), (d, d, None, 0)]
    else:
        up = [(4 * d, 4 * d, 4 * d, 8 * d), (4 * d, 4 * d, 4 * d, 8 * d), (4 * d, 2 * d, 2 * d, 0), (2 * d, d, None, 0)]
    for level, (before, after, time) in enumerate(down):
        stages = [_residual(before, after), _residual(after, after)]
        if time is not None:
            stages.append(_resample(after, after, time))
        for j, stage in enumerate(stages):
            place = f"{3 * level + j}" if version == "2.1" else f"{level}.downsamples.{j}"
            shapes |= {f"encoder.downsamples.{place}.{name}": shape for name, shape in stage.items()}
    for level, (before, after, next_dim, time) in enumerate(up):
        stages = [_residual(before, after), _residual(after, after), _residual(after, after)]
        if next_dim is not None:
            stages.append(_resample(after, next_dim, time))
        for j, stage in enumerate(stages):
            place = f"{4 * level + j}" if version == "2.1" else f"{level}.upsamples.{j}"
            shapes |= {f"decoder.upsamples.{place}.{name}": shape for name, shape in stage.items()}
    return shapes


def random_state(shapes: Shapes, *, seed: str = "", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Draw tensors, each from its own name."""
    state = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}{name}".encode()))
        state[name] = torch.randn(shape, generator=generator).to(dtype)
    return state


def write_safetensors(folder: Path, state: State, *, stem: str = "diffusion_pytorch_model", shards: int = 1) -> None:
    """Write one file, or shards with their index, as Hugging Face does."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    if shards == 1:
        save_file(tensors, folder / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    names = sorted(tensors)
    for index in range(shards):
        file, held = f"{stem}-{index + 1:05}-of-{shards:05}.safetensors", names[index::shards]
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index_json))


def write_official(
    folder: Path,
    *,
    task: str,
    experts: Mapping[str, State],
    vae: State,
    text: State,
    num_heads: int,
    text_len: int = 512,
    shards: int = 1,
    tokenizer: Path | None = None,
    vae_file: str | None = None,
) -> Path:
    """Write a checkpoint in the official layout; every state by official names.

    Args:
        folder: to write into; made if needed.
        task: "t2v", "i2v" or "ti2v".
        experts: "high_noise" and "low_noise", or "single".
        vae: as `vae_file`, by default the one of the task.
        text: stored as given; the published one is bf16.
        num_heads: of the DiT.
        text_len: rows of text the DiT attends to.
        shards: per expert.
        tokenizer: a tokenizer.json to copy; None writes a minimal one.
        vae_file: name of the VAE's file.
    """
    for name, state in experts.items():
        part = folder if name == "single" else folder / f"{name}_model"
        write_safetensors(part, state, shards=shards)
        write_json(part / "config.json", official_config(state, task=task, num_heads=num_heads, text_len=text_len))
    torch.save(dict(text), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(dict(vae), folder / (vae_file or ("Wan2.2_VAE.pth" if task == "ti2v" else "Wan2.1_VAE.pth")))
    _write_tokenizer(folder / "google" / "umt5-xxl", tokenizer)
    return folder


def write_diffusers(
    folder: Path,
    *,
    task: str,
    transformer: State,
    transformer_2: State | None = None,
    vae: State,
    text: State,
    num_heads: int,
    boundary: float | None = None,
    vae_config: Mapping[str, Any] | None = None,
    text_config: Mapping[str, Any] | None = None,
    shards: int = 1,
    tokenizer: Path | None = None,
) -> Path:
    """Write a checkpoint in the Diffusers layout; every state as the modules' `state_dict()` names it."""
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "WanImageToVideoPipeline" if task == "i2v" else "WanPipeline",
            "_diffusers_version": "0.35.0",
            "boundary_ratio": boundary,
            "expand_timesteps": task == "ti2v",
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "transformer_2": ["diffusers", "WanTransformer3DModel"] if transformer_2 else [None, None],
        },
    )
    for name, state in (("transformer", transformer), ("transformer_2", transformer_2)):
        if state is None:
            continue
        write_safetensors(folder / name, state, shards=shards)
        dim, in_dim, *patch = state["patch_embedding.weight"].shape
        config = {"_class_name": "WanTransformer3DModel", "attention_head_dim": dim // num_heads, "eps": 1e-6}
        write_json(
            folder / name / "config.json",
            config | {"num_attention_heads": num_heads, "in_channels": in_dim, "patch_size": patch, "image_dim": 1280},
        )
    write_safetensors(folder / "vae", vae)
    write_json(folder / "vae" / "config.json", {"_class_name": "AutoencoderKLWan", **(vae_config or {})})
    write_safetensors(folder / "text_encoder", text, stem="model", shards=shards)
    write_json(folder / "text_encoder" / "config.json", {"model_type": "umt5", **(text_config or {})})
    _write_tokenizer(folder / "tokenizer", tokenizer)
    return folder


def official_config(state: State, *, task: str, num_heads: int, text_len: int = 512) -> dict[str, Any]:
    """The config.json that belongs to a DiT."""
    dim, in_dim = state["patch_embedding.weight"].shape[:2]
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": dim,
        "eps": 1e-06,
        "ffn_dim": state["blocks.0.ffn.0.weight"].shape[0],
        "freq_dim": state["time_embedding.0.weight"].shape[1],
        "in_dim": in_dim,
        "model_type": task,
        "num_heads": num_heads,
        "num_layers": sum(name.startswith("blocks.") and name.endswith("norm3.bias") for name in state),
        "out_dim": state["head.head.weight"].shape[0] // 4,
        "text_len": text_len,
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def _write_tokenizer(folder: Path, tokenizer: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = tokenizer.read_bytes() if tokenizer else json.dumps(TOKENIZER).encode()
    (folder / "tokenizer.json").write_bytes(content)


def _linear(name: str, out_features: int, in_features: int) -> Shapes:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def _conv(name: str, out_dim: int, in_dim: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (out_dim, in_dim, size, size, size), f"{name}.bias": (out_dim,)}


def _residual(before: int, after: int) -> Shapes:
    shapes: Shapes = {"residual.0.gamma": (before, 1, 1, 1), "residual.3.gamma": (after, 1, 1, 1)}
    shapes |= _conv("residual.2", after, before) | _conv("residual.6", after, after)
    return shapes | (_conv("shortcut", after, before, 1) if before != after else {})


def _resample(before: int, after: int, time: int) -> Shapes:
    shapes: Shapes = {"resample.1.weight": (after, before, 3, 3), "resample.1.bias": (after,)}
    return shapes | ({"time_conv.weight": (time, before, 3, 1, 1), "time_conv.bias": (time,)} if time else {})


def _middle(name: str, c: int) -> Shapes:
    attention: Shapes = {"norm.gamma": (c, 1, 1), "to_qkv.weight": (3 * c, c, 1, 1), "to_qkv.bias": (3 * c,)}
    attention |= {"proj.weight": (c, c, 1, 1), "proj.bias": (c,)}
    stages = {"0": _residual(c, c), "1": attention, "2": _residual(c, c)}
    return {f"{name}.{i}.{rest}": shape for i, stage in stages.items() for rest, shape in stage.items()}


def _head(side: str, before: int, after: int) -> Shapes:
    return {f"{side}.head.0.gamma": (before, 1, 1, 1)} | _conv(f"{side}.head.2", after, before)
