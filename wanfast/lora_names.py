"""The dialects of LoRA files: which layer a key speaks of, and what its tensor is to that layer.

A key is a prefix, a layer and a part. Trainers differ in all three, and in whether the layer's name has dots or
underscores; none of them transposes or renumbers anything, so a key is understood without looking at its tensor.

Source: key lists of the published Wan LoRAs; huggingface/diffusers, loaders/lora_conversion_utils.py;
ModelTC/LightX2V, tools/extract/lora_extractor.py (`.diff`, `.diff_b`, `.diff_m`).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from wanfast.checkpoint.names import dit_to_diffusers

Part = Literal["down", "up", "up_bias", "alpha", "weight", "bias"]

_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "pipe.dit.",
    "lora_unet__",
    "lora_unet_",
    "lycoris_",
)
_TRANSFORMER = re.compile(r"transformer(_2)?\.")  # Diffusers' names of the experts

_PARTS: tuple[tuple[Part, re.Pattern[str]], ...] = (
    ("down", re.compile(r"(?:\.lora_down|\.lora_A(?:\.[^.]+)?|[._]lora\.down|\.lora_linear_layer\.down)\.weight")),
    ("up", re.compile(r"(?:\.lora_up|\.lora_B(?:\.[^.]+)?|[._]lora\.up|\.lora_linear_layer\.up)\.weight")),
    ("up_bias", re.compile(r"\.lora_B(?:\.[^.]+)?\.bias")),
    ("alpha", re.compile(r"(?:[._]lora)?\.alpha")),
    ("weight", re.compile(r"\.diff")),
    ("bias", re.compile(r"\.diff_b")),
)
_MODULATION = re.compile(r"(?:\.modulation)?\.diff_m")

_OTHER_METHODS = (
    ("DoRA", re.compile(r"dora_scale|lora_magnitude_vector")),
    ("LoHa", re.compile(r"\.hada_")),
    ("LoKr", re.compile(r"\.lokr_")),
    ("LoCon with a middle factor", re.compile(r"\.lora_mid\.")),
    ("OFT", re.compile(r"\.oft_")),
    ("GLoRA", re.compile(r"\.[ab][12]\.weight$")),
    ("a patch that replaces weights", re.compile(r"\.(?:set_weight|reshape_weight)$")),
)
_IMAGE_ATTENTION = re.compile(r"k_img|v_img|img_emb|add_[kv]_proj|norm_added_k|image_embedder")


@dataclass(frozen=True, slots=True)
class LoraKey:
    """What one key of a LoRA file says."""

    module: str | None  # official name of the layer, or of a tensor that belongs to no layer; None: there is none here
    part: Part | None
    transformer: Literal[1, 2] | None  # which of Diffusers' two experts the key names, if it names one


def module_names(tensors: Iterable[str]) -> dict[str, str]:
    """List every spelling of a model's layers.

    Args:
        tensors: official names of the model's tensors.

    Returns:
        Spelling -> official name of the layer (or tensor without a layer): official and Diffusers names, with dots and
        with underscores.
    """
    spellings: dict[str, str] = {}
    for tensor in tensors:
        official = _module(tensor)
        diffusers = _module(dit_to_diffusers(tensor))
        for name in (official, diffusers, diffusers.removesuffix(".0") if ".to_out." in diffusers else diffusers):
            spellings[name] = official
            spellings[name.replace(".", "_")] = official
    return spellings


def _module(tensor: str) -> str:
    return re.sub(r"\.(weight|bias)$", "", tensor)


def read_key(key: str, names: Mapping[str, str]) -> LoraKey:
    """Understand one key.

    Args:
        key: of a LoRA file.
        names: from `module_names`.

    Returns:
        Layer, part and expert; layer or part None where the key fits nothing in the model.
    """
    rest, transformer = _without_prefix(key)
    if match := re.search(rf"{_MODULATION.pattern}$", rest):
        return LoraKey(names.get(f"{rest[: match.start()]}.modulation"), "weight", transformer)
    for part, pattern in _PARTS:
        if match := re.search(rf"(?:{pattern.pattern})$", rest):
            return LoraKey(names.get(rest[: match.start()].replace(".processor.", ".")), part, transformer)
    return LoraKey(None, None, transformer)


def _without_prefix(key: str) -> tuple[str, Literal[1, 2] | None]:
    transformer: Literal[1, 2] | None = None
    while True:
        prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
        if prefix is not None:
            key = key.removeprefix(prefix)
        elif match := _TRANSFORMER.match(key):
            transformer = 2 if match[1] else 1
            key = key[match.end() :]
        else:
            return key, transformer


def other_method(key: str) -> str | None:
    """Name the method a key belongs to if it is not LoRA: applied as LoRA its file would give a wrong video."""
    return next((name for name, pattern in _OTHER_METHODS if pattern.search(key)), None)


def reason_to_skip(key: str) -> str | None:
    """Say why a key may be left out without a loss, or None."""
    return "image attention of Wan 2.1, which Wan 2.2 does not have" if _IMAGE_ATTENTION.search(key) else None
