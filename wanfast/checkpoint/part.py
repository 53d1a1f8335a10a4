"""Opens the tensor files of one part, whatever their format and naming, and says which part it is.

A file is a DiT, a VAE or a umT5 encoder by its tensor names, under the official, Diffusers, transformers or ComfyUI
names; a ComfyUI checkpoint may hold several parts, each under a prefix.

Sources: comfyanonymous/ComfyUI, comfy/model_detection.py and comfy/supported_models.py (prefixes).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wanfast.checkpoint.files import TensorRef
from wanfast.checkpoint.gguf_vocabulary import gguf_vocabulary
from wanfast.checkpoint.names import (
    dit_from_diffusers,
    text_from_llama_cpp,
    text_from_transformers,
    vae_from_diffusers,
    vae_version,
)
from wanfast.checkpoint.reader import Reader, open_file, open_folder
from wanfast.checkpoint.scaled_format import check_header, open_scaled
from wanfast.errors import CheckpointError

PartKind = Literal["dit", "vae", "text"]

KIND_NAMES: dict[PartKind, str] = {"dit": "diffusion transformer", "vae": "VAE", "text": "umT5 text encoder"}

# Official names that only one kind of part has. A shard holds some of them, and no LoRA any.
_KINDS: dict[PartKind, str] = {
    "dit": r"patch_embedding|head\.head|blocks\.\d+\.((self|cross)_attn\.(q|k|v|o|norm_q|norm_k)|ffn\.[02])",
    "vae": r"(encoder|decoder)\.(conv1|head\.[02]|middle\..+|(down|up)samples\..+)",
    "text": r"token_embedding|blocks\.\d+\.(attn\.[qkvo]|pos_embedding\.embedding|ffn\.(gate\.0|fc1|fc2))",
}
_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "first_stage_model.",
    "vae.",
    "text_encoders.umt5xxl.transformer.",
)
_SENTENCEPIECE = "spiece_model"  # the vocabulary as ComfyUI ships it, inside the text encoder


@dataclass(frozen=True, slots=True)
class Part:
    """One part, by official names."""

    kind: PartKind
    reader: Reader
    vocabulary: TensorRef | None = None  # of a text encoder: the bytes of a SentencePiece model


def open_parts(path: str | Path) -> list[Part]:
    """Open the parts that a file holds, or the one checkpoint in a folder; headers only.

    Args:
        path: `.safetensors`, `.safetensors.index.json`, `.gguf`, `.pth`, `.pt`, or a folder with one checkpoint.

    Returns:
        At least one part; tensors under a prefix that belong to none are left out.

    Raises:
        CheckpointError: the path cannot be read, is damaged, or holds no part of a Wan model.
    """
    path = Path(path)
    reader = open_folder(path) if path.is_dir() else open_file(path)
    for file in sorted({reader.file_of(name) for name in reader.names()}):
        if file.suffix == ".safetensors":
            check_header(file)
    groups: dict[str, dict[str, str]] = {}
    for name in reader.names():
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
        groups.setdefault(prefix, {})[name] = name.removeprefix(prefix)
    parts = [part for names in groups.values() if (part := _part(reader.renamed(names))) is not None]
    if not parts:
        raise CheckpointError(
            f"{path}: not a file wanfast knows: it holds no tensor of a Wan diffusion transformer, VAE or umT5 text "
            "encoder"
        )
    return sorted(parts, key=lambda part: list(KIND_NAMES).index(part.kind))


def open_part(path: str | Path, kind: PartKind) -> Part:
    """Open the part of one kind that a file or folder holds.

    Raises:
        CheckpointError: as `open_parts`, or it holds no part of that kind.
    """
    parts = open_parts(path)
    found = [part for part in parts if part.kind == kind]
    if len(found) != 1:
        held = " and ".join(f"a {KIND_NAMES[part.kind]}" for part in parts)
        raise CheckpointError(f"{path}: holds {held}, but a {KIND_NAMES[kind]} is wanted here; name another file")
    return found[0]


def _part(reader: Reader) -> Part | None:
    """Tell what a group of tensors is, and give it its official names; None where it is nothing of Wan's."""
    names = reader.names()
    # The rules of a part touch none of its official names, so each serves both namings.
    namings: tuple[tuple[PartKind, dict[str, str]], ...] = (
        ("dit", dit_from_diffusers(names)),
        ("vae", vae_from_diffusers(names, vae_version(names))),
        ("text", text_from_transformers(names)),
        ("text", text_from_llama_cpp(names)),
    )
    for kind, naming in namings:
        if not _has_kind(kind, naming.values()):
            continue
        own = _vocabulary(reader) if kind == "text" else None
        if own is not None:
            del naming[_SENTENCEPIECE]
        named = open_scaled(reader.renamed(naming))
        return Part(kind, named, own or (_gguf_vocabulary(named) if kind == "text" else None))
    return None


def _gguf_vocabulary(reader: Reader) -> TensorRef | None:
    table = "token_embedding.weight"
    if table not in reader.names() or reader.file_of(table).suffix != ".gguf":
        return None
    return gguf_vocabulary(reader.file_of(table), reader.shape(table)[0])


def _vocabulary(reader: Reader) -> TensorRef | None:
    if _SENTENCEPIECE not in reader.names():
        return None
    ref = reader.ref(_SENTENCEPIECE)
    if ref.dtype_name != "uint8" or len(ref.shape) != 1:
        raise CheckpointError(f"{reader.where(_SENTENCEPIECE)} is not the bytes of a SentencePiece model")
    return ref


def _has_kind(kind: PartKind, names: Iterable[str]) -> bool:
    """Whether any name is one that only this kind of part has."""
    stems = (re.sub(r"\.(weight|bias|gamma|int8_weight)$", "", name) for name in names)
    return any(re.fullmatch(_KINDS[kind], stem) for stem in stems)
