"""A tiny model of random weights, and as diffusers sees it: the same tensors in its modules, saved in its layout."""

import atexit
import functools
import json
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from reference.dit import diffusers_dit
from reference.text import umt5_encoder
from reference.vae import diffusers_vae
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from wanfast.checkpoint.names import dit_to_diffusers, text_to_transformers, vae_to_diffusers
from wanfast.checkpoint.reader import Reader
from wanfast.config import T2V_A14B, VAE_2_1, DiTConfig, TextConfig, VAEConfig
from wanfast.dit.weights import expected_tensors as dit_tensors
from wanfast.model import Model, open_model
from wanfast.random_weights import byte_tokenizer, random_tensors
from wanfast.text.weights import expected_tensors as text_tensors
from wanfast.vae.weights import expected_tensors as vae_tensors

_TEXT = TextConfig(
    vocab_size=512,
    dim=64,
    attention_dim=64,
    ffn_dim=128,
    num_heads=4,
    num_layers=2,
    num_buckets=32,
    max_distance=128,
    eps=1e-6,
)
_DIT = DiTConfig(
    in_channels=16,
    out_channels=16,
    dim=256,
    ffn_dim=512,
    num_heads=2,
    num_layers=4,
    text_dim=_TEXT.dim,
    text_len=512,
    freq_dim=256,
    patch_size=(1, 2, 2),
    eps=1e-6,
)
_VAE: VAEConfig = replace(VAE_2_1, encoder_dim=16, decoder_dim=16)
_DEFAULTS = {"name": "wan-tiny", "width": 128, "height": 128, "num_frames": 17, "num_inference_steps": 20}


def random_tiny(folder: Path) -> Path:
    """Write a model of random weights as a folder in the layout of Wan-AI/Wan2.2-T2V-A14B, and return it."""
    folder.mkdir()
    (folder / "wanfast.json").write_text(json.dumps(_DEFAULTS, indent=1))
    for expert in T2V_A14B.experts:
        part = folder / f"{expert.name}_model"
        part.mkdir()
        (part / "config.json").write_text(json.dumps(_official_config(), indent=1))
        save_file(random_tensors(dit_tensors(_DIT), seed=expert.name), part / "diffusion_pytorch_model.safetensors")
    text = random_tensors(text_tensors(_TEXT), seed="text")
    torch.save({name: tensor.bfloat16() for name, tensor in text.items()}, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(random_tensors(vae_tensors(_VAE), seed="vae"), folder / "Wan2.1_VAE.pth")
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    byte_tokenizer(_TEXT.vocab_size).save(str(folder / "google" / "umt5-xxl" / "tokenizer.json"))
    return folder


@functools.cache
def random_folder() -> Path:
    """One `random_tiny` for all tests of a process, which none may write to."""
    parent = Path(tempfile.mkdtemp(prefix="wanfast-tests-"))
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    return random_tiny(parent / "wan-tiny")


def write_both_layouts(folder: Path) -> None:
    """Write `folder/official` and `folder/diffusers`, two folders of one model."""
    diffusers_pipeline(open_model(random_tiny(folder / "official"))).save_pretrained(folder / "diffusers")


def diffusers_pipeline(model: Model) -> WanPipeline:
    """Build diffusers' text-to-video pipeline over the tensors of an open wanfast model, in fp32."""
    high, low = (_transformer(model, reader) for reader in model.experts.values())
    return WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=model.tokenizer.vocabulary, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=_text_encoder(model),
        vae=_vae(model),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=model.config.shift
        ),
        transformer=high,
        transformer_2=low,
        boundary_ratio=model.config.boundary,
    )


def _transformer(model: Model, reader: Reader) -> WanTransformer3DModel:
    transformer = diffusers_dit(model.config.dit)
    transformer.load_state_dict({dit_to_diffusers(name): reader.load(name).float() for name in reader.names()})
    return transformer


def _vae(model: Model) -> AutoencoderKLWan:
    config = model.config.vae
    vae = diffusers_vae(config)
    vae.load_state_dict({vae_to_diffusers(name, config.version): model.vae.load(name) for name in model.vae.names()})
    return vae


def _text_encoder(model: Model) -> UMT5EncoderModel:
    encoder = umt5_encoder(model.config.text)
    tensors = {text_to_transformers(name): model.text.load(name).float() for name in model.text.names()}
    encoder.load_state_dict(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]})
    return encoder


def _official_config() -> dict[str, Any]:
    sizes = asdict(_DIT)
    return {
        "_class_name": "WanModel",
        "dim": sizes["dim"],
        "eps": sizes["eps"],
        "ffn_dim": sizes["ffn_dim"],
        "freq_dim": sizes["freq_dim"],
        "in_dim": sizes["in_channels"],
        "model_type": T2V_A14B.task,
        "num_heads": sizes["num_heads"],
        "num_layers": sizes["num_layers"],
        "out_dim": sizes["out_channels"],
        "text_len": sizes["text_len"],
    }
