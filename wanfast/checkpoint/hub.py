"""Checkpoints from the Hugging Face Hub: its cache is used as it is; a download says its size first.

`HF_HUB_OFFLINE`, `HF_HOME` and the other settings of huggingface_hub hold.
"""

import logging
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from wanfast.errors import CheckpointError

ALIASES = {
    "t2v-a14b": "Wan-AI/Wan2.2-T2V-A14B",
    "i2v-a14b": "Wan-AI/Wan2.2-I2V-A14B",
    "ti2v-5b": "Wan-AI/Wan2.2-TI2V-5B",
}
_LOG = logging.getLogger(__name__)
_NEEDED = ["*.json", "*.safetensors", "*.pth", "*.model"]  # no pictures, videos or documents
_MARKS = {"model_index.json", "config.json", "high_noise_model/config.json"}  # of the two layouts
_NOT_NEEDED = ["assets/*", "examples/*", "process_checkpoint/*"]


def repository_of(name: str) -> str | None:
    """The Hub id that a model's name stands for: an alias, or an id `owner/name`; None where it is neither."""
    if name.lower() in ALIASES:
        return ALIASES[name.lower()]
    return name if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) else None


def twins(repository: str) -> list[str]:
    """The repositories that hold the same model in the other layout."""
    return [f"{repository}-Diffusers"] if repository in ALIASES.values() else []


def cached_folder(repository: str) -> Path | None:
    """The folder of a repository in the cache, complete or not; no network is used."""
    try:
        return Path(huggingface_hub.snapshot_download(repository, local_files_only=True))
    except (errors.LocalEntryNotFoundError, ValueError):
        return None


def cached_file(repository: str, name: str) -> Path | None:
    """A file of a repository in the cache; no network is used."""
    found = huggingface_hub.try_to_load_from_cache(repository, name)
    return Path(found) if isinstance(found, str) else None


def download(repository: str) -> Path:
    """Download what is missing of a repository, after a warning that says how much, and how much disk is free.

    Raises:
        CheckpointError: offline, no such repository or not one of a whole model, no connection, or no room on the disk.
    """
    if constants.HF_HUB_OFFLINE:
        folder = cached_folder(repository)
        if folder is not None and not any((folder / mark).exists() for mark in _MARKS):
            raise CheckpointError(
                f"{folder}: is {repository} in the cache, but no folder of a whole model; name its files with --high"
                " and --low, or --model"
            )
        raise CheckpointError(
            f"{repository}: not complete in the cache, and HF_HUB_OFFLINE is set; unset it to download"
        )
    cache = Path(constants.HF_HUB_CACHE)
    try:
        sizes = _missing(repository)
        free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
        told = f"{sum(sizes) / 1e9:.1f} GB in {len(sizes)} files into {cache}, where {free / 1e9:.1f} GB are free"
        if sum(sizes) > free:
            raise CheckpointError(f"{repository}: {told}; free some space, or set HF_HOME to another disk")
        _LOG.warning("downloading %s: %s", repository, told)
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=_NEEDED, ignore_patterns=_NOT_NEEDED))
    except CheckpointError:
        raise
    except Exception as error:  # the HTTP client under huggingface_hub has changed before, and its errors with it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{repository}: cannot be downloaded ({reason}); check the name and the connection"
        ) from None


def _missing(repository: str) -> list[int]:
    """Bytes of each file that is needed and not in the cache; a repository that could not be opened is refused."""
    info = huggingface_hub.HfApi().model_info(repository, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    if not _MARKS & sizes.keys():
        raise CheckpointError(
            f"{repository}: is not in the official or the Diffusers layout; fetch the files you want with "
            f"`hf download {repository} FILE` and name them"
        )
    wanted = [name for name in sizes if _matches(name, _NEEDED) and not _matches(name, _NOT_NEEDED)]
    return [sizes[name] for name in wanted if cached_file(repository, name) is None]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
