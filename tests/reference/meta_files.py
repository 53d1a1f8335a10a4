"""Published files at full size without their data: true names, shapes and dtypes in the header, and holes behind it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from reference.checkpoints import Shapes

from wanfast.checkpoint.names import text_to_transformers

Entries = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> dtype as safetensors writes it, shape

_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}
_ORDER = ("F32", "F16", "BF16", "I8", "U8", "F8_E4M3")  # wide dtypes first, so that all are aligned


def write_meta(path: Path, entries: Entries) -> Path:
    """Write a sparse safetensors file laid out as the safetensors library does it."""
    header, end = {}, 0
    for name, (dtype, shape) in sorted(entries.items(), key=lambda item: (_ORDER.index(item[1][0]), item[0])):
        begin, end = end, end + math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def plain(shapes: Shapes, dtype: str) -> Entries:
    """Every tensor in one dtype."""
    return {name: (dtype, shape) for name, shape in shapes.items()}


def fp8_scaled(shapes: Shapes, *, has_input_scales: bool = True) -> Entries:
    """ComfyUI's fp8_scaled."""
    entries: dict[str, tuple[str, tuple[int, ...]]] = {"scaled_fp8": ("F8_E4M3", (0,))}
    for name, shape in shapes.items():
        is_matrix = name.endswith(".weight") and len(shape) == 2 and "embedding.weight" not in name
        is_table = name.endswith("pos_embedding.embedding.weight") or name == "token_embedding.weight"
        entries[name] = ("F8_E4M3" if is_matrix and not is_table else "F16", shape)
        if is_matrix and not is_table:
            layer = name.removesuffix(".weight")
            kinds = ("scale_weight", "scale_input") if has_input_scales else ("scale_weight",)
            entries |= {f"{layer}.{kind}": ("F32", ()) for kind in kinds}
    return entries


def comfy_text_encoder(shapes: Shapes) -> Entries:
    """umT5 in fp8_scaled: transformers' names and the vocabulary inside."""
    entries: dict[str, tuple[str, tuple[int, ...]]] = {"spiece_model": ("U8", (4_548_313,))}
    for name, entry in fp8_scaled(shapes, has_input_scales=False).items():
        layer, _, kind = name.rpartition(".")
        is_scale = kind == "scale_weight"
        other = text_to_transformers(f"{layer}.weight" if is_scale else name)
        entries[other.removesuffix("weight") + kind if is_scale else other] = entry
    return entries


def lightx2v(shapes: Shapes, dtype: str) -> Entries:
    """LightX2V: the matrices of the blocks in 8 bits, with a scale per output channel."""
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        is_matrix = name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2
        entries[name] = (dtype if is_matrix else "BF16", shape)
        if is_matrix:
            entries[name.removesuffix("weight") + "weight_scale"] = ("F32", (shape[0], 1))
    return entries
