"""One small random model, and writers of it in every form that people have a model in.

Its numbers are ones that bf16 and fp16 both hold, so that every form without quantisation holds the model itself. Rows
of the blocks' matrices differ in size by up to 4, as those of trained models do: a scale at the wrong row is then seen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from reference import checkpoints
from reference.gguf_files import quantise, write_gguf
from reference.quantised import State, comfy_fp8, comfy_new, is_block_matrix, is_matrix, lightx2v, plain_fp8, turbowan
from reference.single_files import CHANNELS, comfy_text_encoder, write
from reference.tiny import diffusers_pipeline
from torch import Tensor

from wanfast.checkpoint.names import text_to_llama_cpp, text_to_transformers
from wanfast.config import MODELS, VAE_2_1, VAE_2_2, DiTConfig, TextConfig
from wanfast.dit.weights import expected_tensors as dit_tensors
from wanfast.model import open_model
from wanfast.random_weights import byte_tokenizer, random_tensors
from wanfast.text.weights import expected_tensors as text_tensors
from wanfast.vae.weights import expected_tensors as vae_tensors

TEXT = TextConfig(
    vocab_size=400,
    dim=256,
    attention_dim=256,
    ffn_dim=512,
    num_heads=4,
    num_layers=2,
    num_buckets=32,
    max_distance=128,
    eps=1e-6,
)
FP8 = torch.float8_e4m3fn
Sources = dict[str, Path]  # arguments of `wanfast.load`
KindOf = Callable[[str, Tensor], str]  # of a tensor: a key of STEPS; "" where nothing is lost

# Kind of quantisation -> root mean square of its error as a share of the tensor's own, for normal values. A number is
# off by up to half a step, by step / sqrt(12) on average; the step is what the scale covers over the levels there are.
# The largest of 16, 32 and 256 normal values is 2.07, 2.35 and 3.04 sigma, the outermost of 32 are 4.14 sigma apart.
STEPS = {
    "": 0.0,
    "Q8_0": 2.35 / 127 / 12**0.5,
    "Q6_K": 2.07 / 31 / 12**0.5,
    "Q5_K": 4.14 / 31 / 12**0.5,
    "Q5_0": 2.35 / 16 / 12**0.5,
    "Q5_1": 4.14 / 31 / 12**0.5,
    "Q4_K": 4.14 / 15 / 12**0.5,
    "Q4_0": 2.35 / 8 / 12**0.5,
    "Q4_1": 4.14 / 15 / 12**0.5,
    "Q3_K": 2.07 / 3 / 12**0.5,  # of the quantiser here, which leaves the eighth level unused
    "int8 rows": 3.04 / 127 / 12**0.5,
    # 16384 values reach 4 sigma, and rows up to 1.7 times the tensor's root mean square.
    "int8 tiles": 4 * 1.7 / 127 / 12**0.5,
    # Three bits after the point: a step of 1/8 of a value's power of two, which is 0.65 of the value on average.
    "fp8": 1 / 8 * 0.65 / 12**0.5,
}


@dataclass(frozen=True)
class Original:
    """The model, fp32 by official names."""

    task: str
    experts: Mapping[str, State]
    text: State
    vae: State

    @property
    def vae_file(self) -> str:
        return "Wan2.2_VAE.pth" if self.task == "ti2v" else "Wan2.1_VAE.pth"


@dataclass(frozen=True)
class Format:
    """How the model is written, and what is lost."""

    write: Callable[[Original, Path], Sources]
    kind_of: KindOf = lambda name, tensor: ""  # in the experts
    text_kind_of: KindOf = lambda name, tensor: ""  # in the text encoder


def make_original(task: str = "t2v") -> Original:
    """Draw the model of a task."""
    taken, given = CHANNELS[task]
    config = DiTConfig(
        in_channels=taken,
        out_channels=given,
        dim=256,
        ffn_dim=512,
        num_heads=2,
        num_layers=2,
        text_dim=TEXT.dim,
        text_len=512,
        freq_dim=256,
        patch_size=(1, 2, 2),
        eps=1e-6,
    )
    row = next(model for model in MODELS.values() if model.task == task)
    vae = replace(VAE_2_2 if task == "ti2v" else VAE_2_1, encoder_dim=8, decoder_dim=8)
    return Original(
        task=task,
        experts={
            expert.name: _held(_uneven(random_tensors(dit_tensors(config), expert.name))) for expert in row.experts
        },
        text=_held(random_tensors(text_tensors(TEXT), "text")),
        vae=_held(random_tensors(vae_tensors(vae), "vae")),
    )


def _uneven(state: State) -> State:
    """Give every row of the blocks' matrices a size of its own, between a half and double."""
    draw = torch.Generator().manual_seed(1)
    return {
        name: tensor * 2 ** (2 * torch.rand(len(tensor), 1, generator=draw) - 1)
        if is_block_matrix(name, tensor)
        else tensor
        for name, tensor in state.items()
    }


def _held(state: State) -> State:
    """Round to bf16, and to zero what fp16 does not hold."""
    rounded = {name: tensor.bfloat16().float() for name, tensor in state.items()}
    return {name: tensor * (tensor.half().float() == tensor) for name, tensor in rounded.items()}


def write_official(original: Original, folder: Path, dtype: torch.dtype, *, shards: int = 1) -> Sources:
    """Official folder: experts as (sharded) safetensors with their index, umT5 in bf16 and the VAE as .pth."""
    byte_tokenizer(TEXT.vocab_size).save(str(folder / "tokenizer.json"))
    model = checkpoints.write_official(
        folder / "model",
        task=original.task,
        experts={name: _cast(state, dtype) for name, state in original.experts.items()},
        vae=original.vae,
        text=_cast(original.text, torch.bfloat16),
        num_heads=2,
        shards=shards,
        tokenizer=folder / "tokenizer.json",
        vae_file=original.vae_file,
    )
    return {"model": model}


def write_diffusers(original: Original, folder: Path) -> Sources:
    """Diffusers folder in bf16, through diffusers' own `save_pretrained`."""
    pipeline = diffusers_pipeline(open_model(write_official(original, folder, torch.float32)["model"]))
    for part in (pipeline.transformer, pipeline.transformer_2, pipeline.text_encoder):
        part.to(torch.bfloat16)
    pipeline.save_pretrained(folder / "diffusers")
    return {"model": folder / "diffusers"}


def write_comfy(original: Original, folder: Path, kind: str) -> Sources:
    """ComfyUI's `models/` folder, every part of it in one kind."""
    models = folder / "models"
    forms: dict[str, Callable[[State], State]] = {
        "fp16": lambda state: _cast(state, torch.float16),
        "bf16": lambda state: _cast(state, torch.bfloat16),
        "fp8_scaled": lambda state: comfy_fp8(state)[0],
        "fp8_new": lambda state: comfy_new(state)[0],
    }
    for name, state in original.experts.items():
        part = "ti2v_5B" if name == "single" else f"{original.task}_{name}_14B"
        write(models / "diffusion_models" / f"wan2.2_{part}_{kind}.safetensors", forms[kind](state))
    half = torch.bfloat16 if kind == "bf16" else torch.float16
    vae = "wan2.2_vae" if original.task == "ti2v" else "wan_2.1_vae"
    write(models / "vae" / f"{vae}.safetensors", _cast(original.vae, half))
    text = {text_to_transformers(name): tensor.to(half) for name, tensor in original.text.items()}
    if kind.startswith("fp8"):
        text = comfy_text_encoder(original.text, None)[0]
    write(models / "text_encoders" / f"umt5_xxl_{kind}.safetensors", text)
    byte_tokenizer(TEXT.vocab_size).save(str(models / "text_encoders" / "tokenizer.json"))
    return {"model": models}


def write_files(
    original: Original, folder: Path, form: Callable[[State], State], *, suffix: str = "safetensors"
) -> Sources:
    """Experts as single files in some form, the other parts as the official ones beside them."""
    sources = _other_parts(original, folder)
    for name, state in original.experts.items():
        path = folder / f"{name}.{suffix}"
        if suffix == "safetensors":
            write(path, form(state))
        else:
            torch.save(form(state), path)
        sources[_flag(name)] = path
    return sources


def write_ggufs(original: Original, folder: Path, kind_of: KindOf, *, is_from_fp16: bool = True) -> Sources:
    """Experts as GGUF; what is not quantised is F16 as in published files, or F32 and BF16 as converted from bf16."""

    def choose(name: str, tensor: Tensor) -> str:
        is_small = tensor.dim() == 1 or tensor.numel() <= 1024 or name.endswith("modulation")
        rest = "F16" if is_from_fp16 else "F32" if is_small else "BF16"
        return kind_of(name, tensor) or ("F32" if tensor.dim() > 4 else rest)

    sources = _other_parts(original, folder)
    for name, state in original.experts.items():
        sources[_flag(name)] = folder / f"{name}.gguf"
        write_gguf(sources[_flag(name)], state, choose, packer=quantise)
    return sources


def write_gguf_text(original: Original, folder: Path, kind_of: KindOf) -> Sources:
    """The official folder, with umT5 as GGUF in its place: llama.cpp's names, norms and position biases in F32."""
    path = folder / "umt5-xxl-encoder.gguf"
    renamed = {text_to_llama_cpp(name): tensor for name, tensor in original.text.items()}
    kinds = {text_to_llama_cpp(name): kind_of(name, tensor) for name, tensor in original.text.items()}
    write_gguf(path, renamed, lambda name, _: kinds[name] or "F32", architecture="t5encoder", packer=quantise)
    return write_official(original, folder, torch.bfloat16) | {"text_encoder": path}


def in_blocks(kind: str, *, v: tuple[str, ...] = (), ffn_down: str | None = None) -> KindOf:
    """Matrices of the blocks in one kind, but attention's values, in order, and the second of the FFN in others."""

    def choose(name: str, tensor: Tensor) -> str:
        if not is_block_matrix(name, tensor):
            return ""
        if name.endswith("ffn.2.weight") and ffn_down is not None:
            return ffn_down
        if name.endswith(".v.weight") and v:
            place = 2 * int(name.split(".")[1]) + ("cross_attn" in name)
            return v[min(place, len(v) - 1)]
        return kind

    return choose


def in_matrices(kind: str) -> KindOf:
    """Every matrix, inside the blocks and outside."""
    return lambda name, tensor: kind if is_matrix(name, tensor) else ""


def in_wide(kind: str) -> KindOf:
    """Everything with more than one axis."""
    return lambda name, tensor: kind if tensor.dim() > 1 else ""


def _gguf(kind: str, *, v: tuple[str, ...] = (), ffn_down: str | None = None) -> Format:
    kind_of = in_blocks(kind, v=v, ffn_down=ffn_down)
    return Format(lambda original, folder: write_ggufs(original, folder, kind_of), kind_of)


def _gguf_text(kind: str) -> Format:
    def kind_of(name: str, tensor: Tensor) -> str:
        return kind if tensor.dim() == 2 and "pos_embedding" not in name else ""

    return Format(lambda original, folder: write_gguf_text(original, folder, kind_of), text_kind_of=kind_of)


def _files(form: Callable[[State], tuple[State, State]], kind_of: KindOf, suffix: str = "safetensors") -> Format:
    return Format(lambda o, folder: write_files(o, folder, lambda state: form(state)[0], suffix=suffix), kind_of)


LOSSLESS = {
    "official bf16": Format(lambda original, folder: write_official(original, folder, torch.bfloat16)),
    "official fp32 shards": Format(lambda original, folder: write_official(original, folder, torch.float32, shards=3)),
    "Diffusers bf16": Format(write_diffusers),
    "ComfyUI fp16": Format(lambda original, folder: write_comfy(original, folder, "fp16")),
    "ComfyUI bf16": Format(lambda original, folder: write_comfy(original, folder, "bf16")),
    "GGUF F16": Format(lambda original, folder: write_ggufs(original, folder, lambda name, tensor: "")),
    "GGUF BF16": Format(
        lambda original, folder: write_ggufs(original, folder, lambda name, tensor: "", is_from_fp16=False)
    ),
}
# Mixes as published: wider kinds for attention's values and the second matrix of the FFN.
QUANTISED = {
    "ComfyUI fp8_scaled": Format(
        lambda original, folder: write_comfy(original, folder, "fp8_scaled"), in_matrices("fp8"), in_matrices("fp8")
    ),
    "ComfyUI fp8, newer": Format(
        lambda original, folder: write_comfy(original, folder, "fp8_new"), in_matrices("fp8"), in_matrices("fp8")
    ),
    "LightX2V int8": _files(lambda state: lightx2v(state, torch.int8), in_blocks("int8 rows")),
    "LightX2V fp8": _files(lambda state: lightx2v(state, FP8), in_blocks("fp8")),
    "TurboWan": _files(turbowan, in_blocks("int8 tiles"), "pth"),
    "plain fp8": _files(plain_fp8, in_wide("fp8")),
    "GGUF Q8_0": _gguf("Q8_0"),
    "GGUF Q6_K": _gguf("Q6_K"),
    "GGUF Q5_K_M": _gguf("Q5_K", v=("Q6_K",), ffn_down="Q6_K"),
    "GGUF Q5_0": _gguf("Q5_0", ffn_down="Q5_1"),
    "GGUF Q4_K_M": _gguf("Q4_K", v=("Q6_K",), ffn_down="Q6_K"),
    "GGUF Q4_0": _gguf("Q4_0", ffn_down="Q4_1"),
    "GGUF Q3_K_M": _gguf("Q3_K", v=("Q5_K", "Q5_K", "Q4_K"), ffn_down="Q4_K"),
    "umT5 GGUF Q8_0": _gguf_text("Q8_0"),
    "umT5 GGUF Q5_K": _gguf_text("Q5_K"),
    "umT5 GGUF Q3_K": _gguf_text("Q3_K"),
}


def _other_parts(original: Original, folder: Path) -> Sources:
    torch.save(original.vae, folder / original.vae_file)
    torch.save(_cast(original.text, torch.bfloat16), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    byte_tokenizer(TEXT.vocab_size).save(str(folder / "tokenizer.json"))
    return {
        "vae": folder / original.vae_file,
        "text_encoder": folder / "models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer": folder / "tokenizer.json",
    }


def _flag(expert: str) -> str:
    return {"high_noise": "high", "low_noise": "low", "single": "model"}[expert]


def _cast(state: State, dtype: torch.dtype) -> State:
    return {name: tensor.to(dtype) for name, tensor in state.items()}
