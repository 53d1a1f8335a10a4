"""wanfast's own folder of a model, which `wanfast convert` writes: a packed file per part, and JSON that says the rest.

Its files:
    wanfast-model.json       task, precision, boundary, what tensors do not tell, sampling defaults
    high_noise.safetensors   low_noise.safetensors   or single.safetensors
    text_encoder.safetensors   vae.safetensors   tokenizer.json
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from wanfast.checkpoint.defaults import parse_sampling_defaults
from wanfast.checkpoint.files import read_json
from wanfast.checkpoint.layout import EXPERTS, Checkpoint, Given
from wanfast.checkpoint.names import vae_version
from wanfast.checkpoint.part import open_part
from wanfast.checkpoint.variant import check_experts_agree, check_experts_differ, check_parts_fit, check_task
from wanfast.config import ExpertName, ModelConfig, Task
from wanfast.errors import CheckpointError

MANIFEST = "wanfast-model.json"
TEXT_ENCODER, VAE, TOKENIZER = "text_encoder.safetensors", "vae.safetensors", "tokenizer.json"

_VERSION = 1
_KEYS = {"version", "task", "precision", "boundary", "made_from", "dit", "text", "vae", "defaults"}
_DIT_KEYS: dict[str, type] = {"num_heads": int, "eps": float, "text_len": int}
_TEXT_KEYS: dict[str, type] = {"relative_attention_max_distance": int, "layer_norm_epsilon": float}
_LARGEST: dict[type, float] = {int: 65_536, float: 1.0}
_VAE_KEYS = ("latents_mean", "latents_std")


def expert_file(expert: ExpertName) -> str:
    """Name an expert's file in the folder."""
    return f"{expert}.safetensors"


def write_manifest(
    folder: Path,
    config: ModelConfig,
    precision: str,
    *,
    made_from: Sequence[str],
    preset_loras: Mapping[str, Sequence[str]],
) -> None:
    """Write `wanfast-model.json`: all of a model's numbers that its tensors do not tell, and its files' names."""
    guidance = {expert.name: expert.guidance for expert in config.experts}
    defaults = {
        "name": config.name,
        "width": config.width,
        "height": config.height,
        "num_frames": config.num_frames,
        "num_inference_steps": config.num_inference_steps,
        "shift": config.shift,
        "fps": config.fps,
        "guidance": guidance.get("single"),
        "guidance_high": guidance.get("high_noise"),
        "guidance_low": guidance.get("low_noise"),
        "preset_loras": {preset: list(files) for preset, files in preset_loras.items()} or None,
    }
    content = {
        "version": _VERSION,
        "task": config.task,
        "precision": precision,
        "boundary": config.boundary,
        "made_from": list(made_from),
        "dit": {key: getattr(config.dit, key) for key in _DIT_KEYS},
        "text": {
            "relative_attention_max_distance": config.text.max_distance,
            "layer_norm_epsilon": config.text.eps,
        },
        "vae": {key: list(getattr(config.vae, key)) for key in _VAE_KEYS},
        "defaults": {key: value for key, value in defaults.items() if value is not None},
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))


def open_ready(folder: Path, given: Given) -> Checkpoint:
    """Open a folder that `wanfast convert` wrote: headers and the manifest are read, no weights.

    Args:
        folder: that holds `wanfast-model.json`.
        given: parts to use in place of the folder's.

    Raises:
        CheckpointError: a file is missing or damaged, the manifest says what cannot be, or the parts do not fit.
    """
    source = folder / MANIFEST
    content = read_json(source)
    if type(content.get("version")) is not int or content["version"] != _VERSION:
        raise CheckpointError(
            f"{source}: is of version {content.get('version')!r}, and this wanfast reads {_VERSION}; convert it again"
        )
    if content.keys() != _KEYS or not all(isinstance(content[key], dict) for key in ("dit", "text", "vae", "defaults")):
        raise CheckpointError(f"{source}: must hold {', '.join(sorted(_KEYS))}; convert the model again")
    task: Task | None = next((known for known in get_args(Task) if known == content["task"]), None)
    if task is None:
        raise CheckpointError(f"{source}: task: must be t2v, i2v or ti2v, got {content['task']!r}")
    _check_numbers(source, content)
    experts = {name: open_part(folder / expert_file(name), "dit").reader for name in EXPERTS[task]}
    for reader in experts.values():
        check_task(reader, task, source)
    check_experts_agree(list(experts.values()))
    check_experts_differ(list(experts.values()))
    vae = given.vae or open_part(folder / VAE, "vae").reader
    text = given.text or open_part(folder / TEXT_ENCODER, "text").reader
    check_parts_fit(next(iter(experts.values())), vae, text)
    configs: dict[str, Mapping[str, Any]] = {name: content["dit"] for name in experts}
    return Checkpoint(
        path=folder,
        layout="ready",
        task=task,
        experts=experts,
        vae=vae,
        vae_version=vae_version(vae.names()),
        text=text,
        tokenizer=given.tokenizer or folder / TOKENIZER,
        boundary=content["boundary"],
        configs=configs
        | ({} if given.vae is not None else {"vae": content["vae"]})
        | ({} if given.text is not None else {"text": content["text"]}),
        defaults=parse_sampling_defaults(content["defaults"], source),
        made_from=tuple(content["made_from"]),
        written_for=content["precision"],
    )


def _check_numbers(source: Path, content: Mapping[str, Any]) -> None:
    """Refuse what could only come from an edit: later code believes these."""
    if content["precision"] not in ("exact", "fp8", "int8"):
        raise CheckpointError(f"{source}: precision: must be exact, fp8 or int8, got {content['precision']!r}")
    names = content["made_from"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{source}: made_from: must be a list of names, got {names!r}")
    boundary, has_two = content["boundary"], len(EXPERTS[content["task"]]) == 2
    if not (boundary is None or (_is_number(boundary) and 0 < boundary < 1)) or (boundary is None) == has_two:
        rule = "between 0 and 1" if has_two else "null"
        raise CheckpointError(f"{source}: boundary: must be {rule} for {content['task']}, got {boundary!r}")
    for section, keys in (("dit", _DIT_KEYS), ("text", _TEXT_KEYS)):
        for key, kind in keys.items():
            value = content[section].get(key)
            if not (type(value) is int or (kind is float and _is_number(value))) or not 0 < value <= _LARGEST[kind]:
                rule = f"a number above 0, at most {_LARGEST[kind]}"
                raise CheckpointError(f"{source}: {section}.{key}: must be {rule}, got {value!r}")
    for key in _VAE_KEYS:
        values = content["vae"].get(key)
        if not isinstance(values, list) or not all(_is_number(value) for value in values):
            raise CheckpointError(f"{source}: vae.{key}: must be a list of numbers, got {values!r}")
    if not all(value > 0 for value in content["vae"]["latents_std"]):
        raise CheckpointError(f"{source}: vae.latents_std: must be above 0, got {content['vae']['latents_std']!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
