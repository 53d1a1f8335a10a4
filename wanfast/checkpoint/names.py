"""Tensor names of the official checkpoints and of their Diffusers and transformers conversions, in both directions.

wanfast speaks the official names. A conversion only renames: no shape changes, nothing is transposed. A name that no
rule covers stays as it is, and is refused later as unexpected.

Source: huggingface/diffusers, scripts/convert_wan_to_diffusers.py; module trees of Wan-Video/Wan2.2, wan/modules/;
ggml-org/llama.cpp, gguf-py/gguf/constants.py, the tensors of MODEL_ARCH.T5ENCODER.
"""

import re
from collections.abc import Iterable

from wanfast.config import VAEVersion

_Pairs = tuple[tuple[str, str], ...]  # (official prefix, other prefix)

_DIT_OUTER: _Pairs = (
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("head.modulation", "scale_shift_table"),
    ("head.head.", "proj_out."),
)
_ATTENTION = (("q.", "to_q."), ("k.", "to_k."), ("v.", "to_v."), ("o.", "to_out.0."), ("norm_", "norm_"))
_DIT_BLOCK: _Pairs = (
    ("modulation", "scale_shift_table"),
    *((f"self_attn.{official}", f"attn1.{other}") for official, other in _ATTENTION),
    *((f"cross_attn.{official}", f"attn2.{other}") for official, other in _ATTENTION),
    ("norm3.", "norm2."),  # Diffusers counts the block's norms in another order
    ("ffn.0.", "ffn.net.0.proj."),
    ("ffn.2.", "ffn.net.2."),
)

_VAE_OUTER: _Pairs = (
    ("conv1.", "quant_conv."),
    ("conv2.", "post_quant_conv."),
    *(
        (f"{side}.{official}", f"{side}.{other}")
        for side in ("encoder", "decoder")
        for official, other in (
            ("conv1.", "conv_in."),
            ("head.0.", "norm_out."),
            ("head.2.", "conv_out."),
            ("middle.0.", "mid_block.resnets.0."),
            ("middle.1.", "mid_block.attentions.0."),
            ("middle.2.", "mid_block.resnets.1."),
        )
    ),
)
_VAE_RESIDUAL: _Pairs = (
    ("residual.0.", "norm1."),
    ("residual.2.", "conv1."),
    ("residual.3.", "norm2."),
    ("residual.6.", "conv2."),
    ("shortcut.", "conv_shortcut."),
)

_TEXT_OUTER: _Pairs = (
    ("token_embedding.", "shared."),
    ("norm.", "encoder.final_layer_norm."),
)
_TEXT_BLOCK: _Pairs = (
    ("norm1.", "layer.0.layer_norm."),
    *((f"attn.{letter}.", f"layer.0.SelfAttention.{letter}.") for letter in "qkvo"),
    ("pos_embedding.embedding.", "layer.0.SelfAttention.relative_attention_bias."),
    ("norm2.", "layer.1.layer_norm."),
    ("ffn.gate.0.", "layer.1.DenseReluDense.wi_0."),
    ("ffn.fc1.", "layer.1.DenseReluDense.wi_1."),
    ("ffn.fc2.", "layer.1.DenseReluDense.wo."),
)
_LLAMA_CPP_OUTER: _Pairs = (
    ("token_embedding.", "token_embd."),
    ("norm.", "enc.output_norm."),
)
_LLAMA_CPP_BLOCK: _Pairs = (
    ("norm1.", "attn_norm."),
    *((f"attn.{letter}.", f"attn_{letter}.") for letter in "qkvo"),
    ("pos_embedding.embedding.", "attn_rel_b."),
    ("norm2.", "ffn_norm."),
    ("ffn.gate.0.", "ffn_gate."),
    ("ffn.fc1.", "ffn_up."),
    ("ffn.fc2.", "ffn_down."),
)
_TIED_EMBEDDING = "encoder.embed_tokens.weight"  # transformers' second name of shared.weight


def dit_to_diffusers(name: str) -> str:
    """Official DiT tensor name -> name in WanTransformer3DModel."""
    return _with_blocks(name, "blocks", "blocks", _DIT_BLOCK, _DIT_OUTER)


def dit_from_diffusers(names: Iterable[str]) -> dict[str, str]:
    """Names of a WanTransformer3DModel -> official DiT names, as a map over the given ones."""
    block, outer = _swap(_DIT_BLOCK), _swap(_DIT_OUTER)
    return {name: _with_blocks(name, "blocks", "blocks", block, outer) for name in names}


def vae_to_diffusers(name: str, version: VAEVersion, *, num_res_blocks: int = 2) -> str:
    """Official VAE tensor name -> name in AutoencoderKLWan.

    Args:
        name: official name.
        version: of the VAE: 2.1 numbers the stages of all levels through, 2.2 nests them.
        num_res_blocks: per encoder level; the decoder has one more.
    """
    nested = r"(?:down|up)samples\.(\d+)\." if version == "2.2" else "()"
    match = re.fullmatch(rf"(encoder\.down|decoder\.up)samples\.(\d+)\.{nested}(.+)", name)
    if match is None:
        return _vae_rest(name, _VAE_OUTER, _VAE_RESIDUAL)
    side, level, place, rest = match[1], int(match[2]), match[3], _translate(match[4], _VAE_RESIDUAL)
    if version == "2.1" and side == "encoder.down":
        return f"{side}_blocks.{level}.{rest}"
    resnets = num_res_blocks + (side == "decoder.up")
    level, index = (level, int(place)) if version == "2.2" else divmod(level, resnets + 1)
    if index < resnets:
        return f"{side}_blocks.{level}.resnets.{index}.{rest}"
    return f"{side}_blocks.{level}.{_sampler(side, version)}.{rest}"


def vae_from_diffusers(names: Iterable[str], version: VAEVersion) -> dict[str, str]:
    """Names of an AutoencoderKLWan -> official VAE names, as a map over the given ones."""
    names = list(names)
    places = (re.match(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.", name) for name in names)
    num_res_blocks = max((int(place[1]) for place in places if place), default=2)
    return {name: _vae_from_diffusers(name, version, num_res_blocks) for name in names}


def text_to_transformers(name: str) -> str:
    """Official umT5 encoder tensor name -> name in UMT5EncoderModel."""
    return _with_blocks(name, "blocks", "encoder.block", _TEXT_BLOCK, _TEXT_OUTER)


def text_from_transformers(names: Iterable[str]) -> dict[str, str]:
    """Names of a UMT5EncoderModel -> official names, as a map over the given ones.

    The embedding may be stored under both of its names; the second copy is left out.
    """
    names = set(names)
    if "shared.weight" in names:
        names.discard(_TIED_EMBEDDING)
    block, outer = _swap(_TEXT_BLOCK), (*_swap(_TEXT_OUTER), (_TIED_EMBEDDING, "token_embedding.weight"))
    return {name: _with_blocks(name, "encoder.block", "blocks", block, outer) for name in names}


def text_to_llama_cpp(name: str) -> str:
    """Official umT5 encoder tensor name -> name in llama.cpp's GGUF files."""
    return _with_blocks(name, "blocks", "enc.blk", _LLAMA_CPP_BLOCK, _LLAMA_CPP_OUTER)


def text_from_llama_cpp(names: Iterable[str]) -> dict[str, str]:
    """Names of a umT5 encoder in llama.cpp's GGUF files -> official names, as a map over the given ones."""
    block, outer = _swap(_LLAMA_CPP_BLOCK), _swap(_LLAMA_CPP_OUTER)
    return {name: _with_blocks(name, "enc.blk", "blocks", block, outer) for name in names}


def gguf_to_official(names: Iterable[str]) -> dict[str, str]:
    """Names in a GGUF file -> official names, as a map over the given ones: a DiT's need a prefix taken off at most."""
    names = list(names)
    if any(name.startswith("enc.blk.") for name in names):
        return text_from_llama_cpp(names)
    return {name: name.removeprefix("model.").removeprefix("diffusion_model.") for name in names}


def vae_version(names: Iterable[str]) -> VAEVersion:
    """Tell the VAE version from the tensor names of either layout."""
    nested = re.compile(r"encoder\.(downsamples\.\d+\.downsamples|down_blocks\.\d+\.resnets)\.")
    return "2.2" if any(nested.match(name) for name in names) else "2.1"


def _swap(pairs: _Pairs) -> _Pairs:
    return tuple((other, official) for official, other in pairs)


def _translate(name: str, pairs: _Pairs) -> str:
    for old, new in pairs:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _with_blocks(name: str, stem: str, new_stem: str, block: _Pairs, outer: _Pairs) -> str:
    """Translate `stem.N.rest` by the block's rules and any other name by the outer ones."""
    match = re.fullmatch(rf"{re.escape(stem)}\.(\d+)\.(.+)", name)
    if match is None:
        return _translate(name, outer)
    inner = _translate(match[2], block)
    return name if stem != new_stem and inner == match[2] else f"{new_stem}.{match[1]}.{inner}"


def _sampler(side: str, version: VAEVersion) -> str:
    """What Diffusers calls the stage that changes a level's size."""
    return f"{side.split('.')[1]}sampler" + ("s.0" if version == "2.1" else "")


def _vae_rest(name: str, outer: _Pairs, residual: _Pairs) -> str:
    """Translate a VAE name outside the levels; inside the middle the residual rules hold too."""
    for old, new in outer:
        if name.startswith(old):
            return new + _translate(name[len(old) :], residual)
    return name


def _vae_from_diffusers(name: str, version: VAEVersion, num_res_blocks: int) -> str:
    residual = _swap(_VAE_RESIDUAL)
    match = re.fullmatch(r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(.+)", name)
    if match is None:
        return _vae_rest(name, _swap(_VAE_OUTER), residual)
    side, level, inner = match[1], int(match[2]), match[3]
    way = side.split(".")[1]
    if version == "2.1" and way == "down":
        return f"{side}samples.{level}.{_translate(inner, residual)}"
    resnets = num_res_blocks + (way == "up")
    stage = re.fullmatch(rf"(?:resnets\.(\d+)|{re.escape(_sampler(side, version))})\.(.+)", inner)
    if stage is None:
        return name
    index = resnets if stage[1] is None else int(stage[1])
    place = f"{level}.{way}samples.{index}" if version == "2.2" else str(level * (resnets + 1) + index)
    return f"{side}samples.{place}.{_translate(stage[2], residual)}"
