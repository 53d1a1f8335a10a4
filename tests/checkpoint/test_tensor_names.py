"""Names are held against hand-written lists of the published files, and against the converted modules themselves."""

import math
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from reference.checkpoints import dit_shapes, random_state, text_shapes, vae_shapes
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from wanfast.checkpoint.names import (
    dit_from_diffusers,
    dit_to_diffusers,
    text_from_transformers,
    text_to_transformers,
    vae_from_diffusers,
    vae_to_diffusers,
    vae_version,
)
from wanfast.checkpoint.reader import open_file

VAE_SIZES = {
    "2.1": {"base_dim": 8, "z_dim": 4},
    "2.2": {
        "base_dim": 8,
        "decoder_base_dim": 16,
        "z_dim": 4,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
    },
}


def _small_dit() -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=36,
            out_channels=16,
            text_dim=20,
            freq_dim=8,
            ffn_dim=28,
            num_layers=3,
        )


FULL = {
    "t2v": dit_shapes(dim=5120, ffn_dim=13824, in_dim=16, out_dim=16, layers=40),
    "i2v": dit_shapes(dim=5120, ffn_dim=13824, in_dim=36, out_dim=16, layers=40),
    "ti2v": dit_shapes(dim=3072, ffn_dim=14336, in_dim=48, out_dim=48, layers=30),
    "text": text_shapes(vocab=256_384, dim=4096, ffn_dim=10_240, heads=64, layers=24),
    "vae2.1": vae_shapes("2.1", z=16, encoder_dim=96, decoder_dim=96),
    "vae2.2": vae_shapes("2.2", z=48, encoder_dim=160, decoder_dim=256),
}


@pytest.mark.parametrize(
    ("part", "num_tensors", "num_parameters"),
    [
        ("t2v", 1095, 14_288_491_584),
        ("i2v", 1095, 14_288_901_184),
        ("ti2v", 825, 4_999_787_712),
        ("text", 242, 5_680_910_336),
        ("vae2.1", 194, 126_892_531),
        ("vae2.2", 196, 704_688_668),
    ],
)
def test_the_written_lists_are_the_published_ones(part, num_tensors, num_parameters):
    assert len(FULL[part]) == num_tensors
    assert sum(math.prod(shape) for shape in FULL[part].values()) == num_parameters


def test_every_dit_name_and_shape_is_that_of_the_diffusers_module():
    module = {name: tuple(tensor.shape) for name, tensor in _small_dit().state_dict().items()}
    official = dit_shapes(dim=24, ffn_dim=28, in_dim=36, out_dim=16, layers=3, text_dim=20, freq_dim=8)
    assert {dit_to_diffusers(name): shape for name, shape in official.items()} == module
    assert {official_name: module[name] for name, official_name in dit_from_diffusers(module).items()} == official


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_every_vae_name_and_shape_is_that_of_the_diffusers_module(version):
    sizes = VAE_SIZES[version]
    with torch.device("meta"):
        module = {name: tuple(tensor.shape) for name, tensor in AutoencoderKLWan(**sizes).state_dict().items()}
    official = vae_shapes(version, z=4, encoder_dim=8, decoder_dim=sizes.get("decoder_base_dim", 8))
    assert {vae_to_diffusers(name, version): shape for name, shape in official.items()} == module
    assert {new: module[old] for old, new in vae_from_diffusers(module, version).items()} == official
    assert vae_version(module) == vae_version(official) == version


ROUND_TRIPS = {
    "t2v": (FULL["t2v"], dit_to_diffusers, dit_from_diffusers),
    "i2v": (FULL["i2v"], dit_to_diffusers, dit_from_diffusers),
    "ti2v": (FULL["ti2v"], dit_to_diffusers, dit_from_diffusers),
    "text": (FULL["text"], text_to_transformers, text_from_transformers),
    "vae2.1": (FULL["vae2.1"], partial(vae_to_diffusers, version="2.1"), partial(vae_from_diffusers, version="2.1")),
    "vae2.2": (FULL["vae2.2"], partial(vae_to_diffusers, version="2.2"), partial(vae_from_diffusers, version="2.2")),
}


@pytest.mark.parametrize("part", ROUND_TRIPS)
def test_every_published_name_comes_back_from_diffusers(part):
    shapes, to_diffusers, from_diffusers = ROUND_TRIPS[part]
    names = [to_diffusers(name) for name in shapes]
    assert len(set(names)) == len(shapes)
    same = {name for name, other in zip(shapes, names, strict=True) if name == other}
    assert same == {"patch_embedding.weight", "patch_embedding.bias"} & shapes.keys()
    assert from_diffusers(names) == dict(zip(names, shapes, strict=True))
    assert from_diffusers(names[::-1]) == from_diffusers(names), "whatever their order"


SMALL = {
    "t2v": dit_shapes(dim=24, ffn_dim=28, in_dim=16, out_dim=16, layers=2, text_dim=20, freq_dim=8),
    "text": text_shapes(vocab=20, dim=12, ffn_dim=28, heads=3, layers=2),
    "vae2.1": vae_shapes("2.1", z=4, encoder_dim=4, decoder_dim=4),
    "vae2.2": vae_shapes("2.2", z=4, encoder_dim=4, decoder_dim=8),
}


@pytest.mark.parametrize("part", SMALL)
def test_a_file_comes_back_from_diffusers_to_the_byte(part, tmp_path):
    """Official file, the same tensors under Diffusers' names, and what is read there written under official names."""
    _, to_diffusers, from_diffusers = ROUND_TRIPS[part]
    state = random_state(SMALL[part], dtype=torch.bfloat16)
    official, other, back = (tmp_path / f"{name}.safetensors" for name in ("official", "diffusers", "back"))
    save_file(state, official)
    save_file({to_diffusers(name): tensor for name, tensor in state.items()}, other)
    reader = open_file(other)
    assert reader.names() != state.keys()
    renamed = reader.renamed(from_diffusers(reader.names()))
    save_file({name: renamed.load(name) for name in renamed.names()}, back)
    assert back.read_bytes() == official.read_bytes()


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_vae_names_hold_for_another_number_of_residual_blocks(version):
    with torch.device("meta"):
        module = AutoencoderKLWan(**VAE_SIZES[version], num_res_blocks=1).state_dict().keys()
    renamed = vae_from_diffusers(module, version)
    assert len(set(renamed.values())) == len(module)
    assert all(vae_to_diffusers(new, version, num_res_blocks=1) == old for old, new in renamed.items())
    # One residual block per encoder level and two per decoder level: the first sampler comes after those.
    sampler = "decoder.upsamples.2." if version == "2.1" else "decoder.upsamples.0.upsamples.2."
    assert {name for name in renamed.values() if name.startswith(sampler)} == {
        sampler + rest for rest in ("resample.1.weight", "resample.1.bias", "time_conv.weight", "time_conv.bias")
    }


def test_every_text_name_and_shape_is_that_of_the_transformers_module():
    config = UMT5Config(
        vocab_size=20, d_model=12, d_kv=4, d_ff=28, num_layers=3, num_heads=3, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        module = {name: tuple(tensor.shape) for name, tensor in UMT5EncoderModel(config).state_dict().items()}
    assert "encoder.embed_tokens.weight" in module
    official = text_shapes(vocab=20, dim=12, ffn_dim=28, heads=3, layers=3)
    assert {new: module[old] for old, new in text_from_transformers(module).items()} == official
    del module["encoder.embed_tokens.weight"]
    assert {text_to_transformers(name): shape for name, shape in official.items()} == module


def test_the_embedding_is_found_under_either_of_its_names():
    tied, shared = "encoder.embed_tokens.weight", "shared.weight"
    assert text_from_transformers([tied]) == {tied: "token_embedding.weight"}
    assert text_from_transformers([shared]) == {shared: "token_embedding.weight"}
    assert text_from_transformers([tied, shared]) == {shared: "token_embedding.weight"}


@pytest.mark.parametrize(
    ("official", "diffusers"),
    [
        ("blocks.7.norm3.weight", "blocks.7.norm2.weight"),
        ("blocks.7.modulation", "blocks.7.scale_shift_table"),
        ("head.modulation", "scale_shift_table"),
        ("blocks.39.self_attn.o.bias", "blocks.39.attn1.to_out.0.bias"),
        ("blocks.3.self_attn.q.weight", "blocks.3.attn1.to_q.weight"),
        ("blocks.3.self_attn.k.weight", "blocks.3.attn1.to_k.weight"),
        ("blocks.3.cross_attn.v.bias", "blocks.3.attn2.to_v.bias"),
        ("blocks.0.cross_attn.norm_k.weight", "blocks.0.attn2.norm_k.weight"),
        ("blocks.10.ffn.0.weight", "blocks.10.ffn.net.0.proj.weight"),
        ("blocks.10.ffn.2.weight", "blocks.10.ffn.net.2.weight"),
        ("time_projection.1.bias", "condition_embedder.time_proj.bias"),
        ("head.head.weight", "proj_out.weight"),
    ],
)
def test_dit_names_that_are_easily_confused(official, diffusers):
    assert dit_to_diffusers(official) == diffusers
    assert dit_from_diffusers([diffusers]) == {diffusers: official}


@pytest.mark.parametrize(
    ("version", "official", "diffusers"),
    [
        ("2.1", "decoder.upsamples.4.shortcut.weight", "decoder.up_blocks.1.resnets.0.conv_shortcut.weight"),
        ("2.1", "decoder.upsamples.11.resample.1.bias", "decoder.up_blocks.2.upsamplers.0.resample.1.bias"),
        ("2.1", "decoder.upsamples.14.residual.6.weight", "decoder.up_blocks.3.resnets.2.conv2.weight"),
        ("2.1", "encoder.downsamples.10.residual.3.gamma", "encoder.down_blocks.10.norm2.gamma"),
        (
            "2.2",
            "encoder.downsamples.1.downsamples.2.time_conv.bias",
            "encoder.down_blocks.1.downsampler.time_conv.bias",
        ),
        ("2.2", "decoder.upsamples.0.upsamples.3.resample.1.bias", "decoder.up_blocks.0.upsampler.resample.1.bias"),
        ("2.2", "decoder.upsamples.3.upsamples.2.residual.0.gamma", "decoder.up_blocks.3.resnets.2.norm1.gamma"),
        ("2.1", "encoder.middle.1.to_qkv.bias", "encoder.mid_block.attentions.0.to_qkv.bias"),
        ("2.2", "conv1.weight", "quant_conv.weight"),
    ],
)
def test_vae_names_that_are_easily_confused(version, official, diffusers):
    assert vae_to_diffusers(official, version) == diffusers
    assert vae_from_diffusers([diffusers], version) == {diffusers: official}


def test_official_names_pass_the_inverse_maps_unchanged():
    dit = dit_shapes(dim=4, ffn_dim=4, in_dim=4, out_dim=4, layers=2)
    text = text_shapes(vocab=9, dim=4, ffn_dim=4, heads=2, layers=2)
    assert dit_from_diffusers(dit) == {name: name for name in dit}
    assert text_from_transformers(text) == {name: name for name in text}
    for version in ("2.1", "2.2"):
        vae = vae_shapes(version, z=4, encoder_dim=4, decoder_dim=4)
        assert vae_from_diffusers(vae, version) == {name: name for name in vae}


@pytest.mark.parametrize(
    "name", ["blocks.x.modulation", "extra", "decoder.up_blocks.0.foo.weight", "encoder.block.0.foo"]
)
def test_unknown_names_stay(name):
    assert dit_to_diffusers(name) == text_to_transformers(name) == vae_to_diffusers(name, "2.1") == name
    assert (
        dit_from_diffusers([name])
        == text_from_transformers([name])
        == vae_from_diffusers([name], "2.2")
        == {name: name}
    )
