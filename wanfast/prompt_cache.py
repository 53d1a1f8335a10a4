"""Encoded prompts on disk: an 11 GB encoder is read once per prompt and machine, and never for the negative prompt.

An entry is named by a hash of everything that its numbers depend on: the encoder's files as they are now, its sizes,
the token ids, where and in which dtype it computes. No prompt is written down. The cache only ever saves time: what
cannot be read or written is as if it were not there.
"""

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from wanfast.checkpoint.reader import Reader
from wanfast.config import TextConfig
from wanfast.version import __version__

MIN_ENCODER_BYTES = 100_000_000  # a smaller encoder is faster than a file
MAX_CACHE_BYTES = 1_000_000_000

_NAME = "context"


def cache_folder() -> Path:
    """Where encoded prompts are kept: `$XDG_CACHE_HOME/wanfast/prompts`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wanfast" / "prompts"


def context_file(
    encoder: Reader, config: TextConfig, ids: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Path | None:
    """Name the entry of one encoded prompt.

    Args:
        encoder: the text encoder's tensors.
        config: its sizes.
        ids: the prompt's tokens.
        dtype: it computes in.
        device: it computes on.

    Returns:
        A path, whether it is there or not; None where nothing is cached: the encoder is small, or not in files.
    """
    refs = [encoder.ref(name) for name in encoder.names()]
    if sum(ref.num_bytes for ref in refs) < MIN_ENCODER_BYTES:
        return None
    try:
        stats = {str(file.absolute()): file.stat() for file in sorted({ref.file for ref in refs})}
    except OSError:
        return None
    known = {
        "wanfast": __version__,
        "torch": torch.__version__,
        "files": {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()},
        "config": asdict(config),
        "ids": ids,
        "dtype": str(dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"{digest}.safetensors"


def read_context(file: Path | None, num_tokens: int, config: TextConfig, dtype: torch.dtype) -> Tensor | None:
    """Read an encoded prompt [num_tokens, C] of a dtype; None where there is none, or it is not that."""
    if file is None:
        return None
    try:
        context = safetensors.torch.load_file(file)[_NAME]
        os.utime(file)  # used last
    except (OSError, KeyError, ValueError, safetensors.SafetensorError):
        return None
    is_right = context.dtype == dtype and tuple(context.shape) == (num_tokens, config.dim)
    return context if is_right and bool(torch.isfinite(context).all()) else None


def write_context(file: Path, context: Tensor) -> None:
    """Keep an encoded prompt [T, C]; those used longest ago make room for it."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        data = safetensors.torch.save({_NAME: context.contiguous().cpu()})
        handle, part = tempfile.mkstemp(dir=file.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            Path(part).replace(file)
        except OSError:
            Path(part).unlink(missing_ok=True)
            raise
        _make_room(file)


def _make_room(kept: Path) -> None:
    entries = [(path.stat(), path) for path in kept.parent.glob("*.safetensors") if path != kept]
    total = kept.stat().st_size + sum(stat.st_size for stat, _ in entries)
    for stat, path in sorted(entries, key=lambda entry: entry[0].st_mtime_ns):
        if total <= MAX_CACHE_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= stat.st_size
