"""Sampling defaults a checkpoint folder may bring along, in a `wanfast.json`: they stand in for the official ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from wanfast.checkpoint.files import read_json
from wanfast.errors import CheckpointError

_LARGEST = {"width": 16_384, "height": 16_384, "num_frames": 100_001, "num_inference_steps": 1000, "fps": 1000}
FILE_NAME = "wanfast.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a checkpoint is best sampled with; None leaves the official default of its task."""

    name: str | None = None
    width: int | None = None  # pixels
    height: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    shift: float | None = None
    guidance: float | None = None  # of a model with one expert
    guidance_high: float | None = None
    guidance_low: float | None = None
    boundary: float | None = None  # sigma, between 0 and 1
    fps: int | None = None
    preset_loras: Mapping[str, tuple[str, ...]] | None = None  # by preset, LoRA files that its steps need


def read_sampling_defaults(folder: Path) -> SamplingDefaults:
    """Read `wanfast.json` from a checkpoint folder; without one, nothing is set.

    Raises:
        CheckpointError: the file cannot be read, or a key or a value in it is not one wanfast knows.
    """
    path = folder / FILE_NAME
    return parse_sampling_defaults(read_json(path), path) if path.exists() else SamplingDefaults()


def parse_sampling_defaults(content: Mapping[str, Any], path: Path) -> SamplingDefaults:
    """Check sampling defaults that stand in a file.

    Raises:
        CheckpointError: a key or a value is not one wanfast knows, or a file beside it that it names is missing.
    """
    known = [field.name for field in fields(SamplingDefaults)]
    for key, value in content.items():
        if key not in known:
            raise CheckpointError(f"{path}: {key}: is not a setting, known are {', '.join(known)}")
        rule = _broken_rule(key, value)
        if rule:
            raise CheckpointError(f"{path}: {key}: must be {rule}, got {value!r}")
    loras = content.get("preset_loras")
    named = None if loras is None else {preset: tuple(files) for preset, files in loras.items()}
    for preset, files in (named or {}).items():
        if gone := [file for file in files if not (path.parent / file).is_file()]:
            raise CheckpointError(f"{path.parent / gone[0]}: is missing, which {path} names for preset {preset}")
    return SamplingDefaults(**{**content, "preset_loras": named})


def _broken_rule(key: str, value: Any) -> str:
    """The rule that a value breaks, or nothing."""
    if key == "name":
        return "" if isinstance(value, str) and value else "a text"
    if key == "preset_loras":
        is_right = isinstance(value, dict) and all(isinstance(files, list) for files in value.values())
        named = [file for files in value.values() for file in files] if is_right else [None]
        return "" if all(isinstance(file, str) and file for file in named) else "lists of files by preset"
    if key in _LARGEST:
        return "" if type(value) is int and 1 <= value <= _LARGEST[key] else f"a whole number from 1 to {_LARGEST[key]}"
    is_number = type(value) in (int, float) and math.isfinite(value)
    if key == "shift":
        return "" if is_number and 0 < value <= 1000 else "a number above 0, at most 1000"
    if key == "boundary":
        return "" if is_number and 0 < value < 1 else "a number between 0 and 1"
    return "" if is_number else "a number"
