"""Says what a checkpoint folder or a tensor file is, from headers alone."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wanfast.checkpoint.layout import open_checkpoint
from wanfast.checkpoint.names import dit_from_diffusers, text_from_transformers, vae_from_diffusers, vae_version
from wanfast.checkpoint.reader import Reader, open_file
from wanfast.checkpoint.variant import dit_channels, num_blocks
from wanfast.errors import CheckpointError

# Official names that only one kind of part has. A shard holds some of them, and no LoRA any.
_KINDS = {
    "dit": r"patch_embedding|head\.head|blocks\.\d+\.((self|cross)_attn\.(q|k|v|o|norm_q|norm_k)|ffn\.[02])",
    "vae": r"(encoder|decoder)\.(conv1|head\.[02]|middle\..+|(down|up)samples\..+)",
    "text": r"token_embedding|blocks\.\d+\.(attn\.[qkvo]|pos_embedding\.embedding|ffn\.(gate\.0|fc1|fc2))",
}
_KIND_NAMES = {"dit": "diffusion transformer", "vae": "VAE", "text": "umT5 text encoder"}
_UNITS = ("B", "kB", "MB", "GB", "TB")


def describe(path: str | Path) -> dict[str, Any]:
    """Describe a checkpoint folder or a single tensor file; reads headers and configs only.

    Args:
        path: a folder in the official or Diffusers layout, or a `.safetensors`, `.safetensors.index.json` or `.pth`
            file; a single shard will do.

    Returns:
        What it is, as JSON-able values: for a folder its layout, task, boundary, defaults and every part under "parts";
        for a file the one part it is or belongs to. A part has its kind, parameters, bytes by dtype, files and sizes.

    Raises:
        CheckpointError: the path is no such thing, or is one that is damaged or incomplete.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return {"path": str(path), "what": "file", "parts": {"file": _describe_file(path)}}
    checkpoint = open_checkpoint(path)
    parts = {str(name): _describe_part("dit", reader) for name, reader in checkpoint.experts.items()}
    parts |= {"text": _describe_part("text", checkpoint.text), "vae": _describe_part("vae", checkpoint.vae)}
    defaults = {
        name: value
        for name in checkpoint.defaults.__slots__
        if (value := getattr(checkpoint.defaults, name)) is not None
    }
    return {
        "path": str(path),
        "what": "checkpoint",
        "layout": checkpoint.layout,
        "task": checkpoint.task,
        "boundary": checkpoint.boundary,
        "defaults": defaults,
        "tokenizer": str(checkpoint.tokenizer),
        "parts": parts,
    }


def format_description(description: dict[str, Any]) -> str:
    """Lay out what `describe` returned for a terminal, one line per part."""
    lines = [description["path"]]
    if description["what"] == "checkpoint":
        facts = {key: description[key] for key in ("task", "layout", "boundary") if description[key] is not None}
        facts |= description["defaults"]
        width = max(map(len, facts))
        lines += [f"  {key:<{width}}  {value}" for key, value in facts.items()]
    rows = [("part", "kind", "tensors", "parameters", "size", "dtypes", "sizes")]
    for name, part in description["parts"].items():
        rows.append(
            (
                name,
                _KIND_NAMES[part["kind"]],
                str(part["num_tensors"]),
                f"{part['num_parameters']:,}",
                _human(part["num_bytes"]),
                " ".join(part["bytes_by_dtype"]),
                " ".join(f"{key}={value}" for key, value in part["sizes"].items()),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(lines)


def _describe_file(path: Path) -> dict[str, Any]:
    reader = open_file(path)
    names = reader.names()
    # No rule touches an official name, so each serves both namings of its part.
    namings = (
        dit_from_diffusers(names),
        vae_from_diffusers(names, vae_version(names)),
        text_from_transformers(names),
    )
    for naming in namings:
        if kind := _kind(naming.values()):
            return _describe_part(kind, reader.renamed(naming))
    raise CheckpointError(
        f"{path}: not a file wanfast knows: it holds no tensor of a Wan diffusion transformer, VAE or umT5 text encoder"
    )


def _describe_part(kind: str, reader: Reader) -> dict[str, Any]:
    refs = [reader.ref(name) for name in sorted(reader.names())]
    by_dtype: Counter[str] = Counter()
    for ref in refs:
        by_dtype[str(ref.dtype).removeprefix("torch.")] += ref.num_bytes
    return {
        "kind": kind,
        "num_tensors": len(refs),
        "num_parameters": sum(math.prod(ref.shape) for ref in refs),
        "num_bytes": sum(by_dtype.values()),
        "bytes_by_dtype": dict(by_dtype.most_common()),
        "files": sorted({str(ref.file) for ref in refs}),
        "sizes": _sizes(kind, reader),
    }


def _kind(names: Iterable[str]) -> str | None:
    """The part whose names these are; None where no name is known."""
    stems = [re.sub(r"\.(weight|bias|gamma)$", "", name) for name in names]
    return next((kind for kind, known in _KINDS.items() if any(re.fullmatch(known, stem) for stem in stems)), None)


def _sizes(kind: str, reader: Reader) -> dict[str, Any]:
    """The sizes that tell variants apart, as far as the file holds the tensors that show them."""
    names = reader.names()
    sizes: dict[str, Any] = {}
    if kind == "vae":
        sizes["version"] = vae_version(names)
        if "conv2.weight" in names:
            sizes["z_dim"] = reader.shape("conv2.weight")[0]
    if kind == "text" and "token_embedding.weight" in names:
        sizes["vocab_size"], sizes["dim"] = reader.shape("token_embedding.weight")
        sizes["num_layers"] = num_blocks(reader)
    if kind == "dit" and "patch_embedding.weight" in names:
        sizes["dim"] = reader.shape("patch_embedding.weight")[0]
        if "head.head.weight" in names:
            sizes["in_channels"], sizes["out_channels"] = dit_channels(reader)
            sizes["num_layers"] = num_blocks(reader)
    return sizes


def _human(num_bytes: float) -> str:
    """Bytes in decimal units, as file sizes are published."""
    power = min(int(math.log(num_bytes, 1000)), len(_UNITS) - 1) if num_bytes >= 1 else 0
    return f"{num_bytes / 1000**power:.{2 if power else 0}f} {_UNITS[power]}"
