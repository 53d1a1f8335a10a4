"""Says what a checkpoint folder or a tensor file is, from headers alone."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from wanfast.checkpoint import nearby
from wanfast.checkpoint.layout import Checkpoint
from wanfast.checkpoint.lookup import Sources, find_checkpoint
from wanfast.checkpoint.names import vae_version
from wanfast.checkpoint.part import KIND_NAMES, PartKind, open_parts
from wanfast.checkpoint.reader import Reader
from wanfast.checkpoint.variant import dit_channels, num_blocks, task_by_channels
from wanfast.errors import CheckpointError
from wanfast.tiny import tiny_files

_UNITS = ("B", "kB", "MB", "GB", "TB")


def describe(path: str | Path) -> dict[str, Any]:
    """Describe a checkpoint folder or a single tensor file; reads headers and configs only.

    Args:
        path: a folder in the official, Diffusers or ComfyUI's layout, or a `.safetensors`, `.safetensors.index.json`,
            `.gguf` or `.pth` file; a single shard will do.

    Returns:
        What it is, as JSON-able values: for a folder its layout, task, boundary, defaults and every part under "parts";
        for a file the parts it holds or belongs to. A part has its kind, parameters, bytes by dtype or quantisation,
        files and sizes; a DiT also its task, and its expert as far as names tell.

    Raises:
        CheckpointError: the path is no such thing, or is one that is damaged or incomplete.
    """
    if tiny_files(path) is not None:
        return _describe_checkpoint(path, find_checkpoint(Sources(model=path)))
    path = Path(path).expanduser()
    if path.is_file() or nearby.is_dit_folder(path):
        return {"path": str(path), "what": "file", "parts": _describe_file(path)}
    if not path.exists():  # a name that could be downloaded is not looked up
        raise CheckpointError(f"{path}: no such folder or file")
    return _describe_checkpoint(path, find_checkpoint(Sources(model=path)))


def _describe_checkpoint(path: str | Path, checkpoint: Checkpoint) -> dict[str, Any]:
    parts = {str(name): _describe_part("dit", reader, expert=name) for name, reader in checkpoint.experts.items()}
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
        "tokenizer": str(checkpoint.tokenizer if isinstance(checkpoint.tokenizer, Path) else checkpoint.tokenizer.file),
        "notes": list(checkpoint.notes),
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
                _kind_name(part),
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


def _kind_name(part: dict[str, Any]) -> str:
    known = [str(part[key]) for key in ("task", "expert") if part.get(key)]
    return KIND_NAMES[part["kind"]] + (f" ({' '.join(known)})" if known else "")


def _describe_file(path: Path) -> dict[str, dict[str, Any]]:
    parts = open_parts(path)
    expert = nearby.expert_by_name(path)
    described = [_describe_part(part.kind, part.reader, expert=expert) for part in parts]
    if len(parts) == 1:
        return {"file": described[0]}
    return {part.kind: description for part, description in zip(parts, described, strict=True)}


def _describe_part(kind: PartKind, reader: Reader, *, expert: str | None = None) -> dict[str, Any]:
    refs = [reader.ref(name) for name in sorted(reader.names())]
    by_dtype: Counter[str] = Counter()
    for ref in refs:
        by_dtype[ref.stored_as or ref.dtype_name] += ref.num_bytes
    return {
        "kind": kind,
        **({"expert": expert, "task": _task(reader)} if kind == "dit" else {}),
        "num_tensors": len(refs),
        "num_parameters": sum(math.prod(ref.shape) for ref in refs),
        "num_bytes": sum(by_dtype.values()),
        "bytes_by_dtype": dict(by_dtype.most_common()),
        "files": sorted({str(ref.file) for ref in refs}),
        "sizes": _sizes(kind, reader),
    }


def _task(reader: Reader) -> str | None:
    """The task of a DiT; None for a shard that does not show it, or for no Wan 2.2 model's."""
    if not {"patch_embedding.weight", "head.head.weight"} <= reader.names():
        return None
    try:
        return task_by_channels(reader)
    except CheckpointError:
        return None


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
