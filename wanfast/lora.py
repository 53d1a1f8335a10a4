"""LoRA files: what was asked for, and what a file holds for one model, checked before anything is computed.

Opening reads the header and the alphas. `wanfast.adapter` turns opened files into the terms an expert's layers get.
"""

import hashlib
import json
import logging
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

from wanfast.checkpoint.files import TensorRef, read_json
from wanfast.checkpoint.reader import Reader, open_file
from wanfast.checkpoint.safetensors_format import safetensors_metadata
from wanfast.config import ExpertName, ModelConfig
from wanfast.dit.tensors import expected_tensors
from wanfast.errors import CheckpointError, RequestError
from wanfast.lora_names import LoraKey, Part, module_names, other_method, read_key, reason_to_skip

_log = logging.getLogger("wanfast")

Target = Literal["high_noise", "low_noise", "both"]

_FORM = "FILE[:strength][@high|@low|@both]"
_TARGETS: dict[str, Target] = {"high": "high_noise", "low": "low_noise", "both": "both"}
_NAMED = 3  # keys a message lists
_NUMBERS = {"float64": "<d", "float32": "<f", "float16": "<e", "int64": "<q", "int32": "<i"}  # as `struct` reads them


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """One LoRA as asked for."""

    path: str | Path
    strength: float = 1.0  # any finite number; 0 is as good as none
    target: Target | None = None  # experts it goes to; None: as its file name says (high_noise, low_noise), else both
    is_rank_stabilised: bool = False  # scale alpha / sqrt(rank); files written by Diffusers and PEFT say it themselves
    is_merged: bool = False  # added to copies of the weights as these are used, not beside; not to quantised ones


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What became of a file's keys."""

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]  # nothing in the model answers to them
    skipped: Mapping[str, str]  # key -> reason it can be left out


@dataclass(frozen=True, slots=True)
class LayerKeys:
    """Keys of a file that change one layer, and the scale of its product."""

    keys: Mapping[Part, str]
    scale: float  # alpha / rank; 1 where the file states no alpha


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """One file opened for one model."""

    spec: LoraSpec
    reader: Reader
    layers: Mapping[ExpertName, Mapping[str, LayerKeys]]  # by official name of the layer
    report: LoraReport

    @property
    def experts(self) -> tuple[ExpertName, ...]:
        """Experts the file changes."""
        return tuple(self.layers)


def parse_lora(text: str | Path | LoraSpec) -> LoraSpec:
    """Read `FILE[:strength][@high|@low|@both]`; a path or a spec is taken as it is.

    Raises:
        RequestError: there is no such file, or the strength is not a finite number.
    """
    if isinstance(text, LoraSpec):
        spec = text
    elif isinstance(text, Path):
        spec = LoraSpec(text)
    else:
        number = r"[-+]?(?:\d+\.?\d*|\.\d+)"
        match = re.fullmatch(rf"(.+?)(?::({number}))?(?:@({'|'.join(_TARGETS)}))?", text, re.DOTALL)
        if match is None:
            raise RequestError(f"lora: must be {_FORM}, got {text!r}")
        spec = LoraSpec(match[1], float(match[2] or 1), _TARGETS[match[3]] if match[3] else None)
    if not Path(spec.path).expanduser().is_file():
        raise RequestError(f"lora: must be {_FORM} with a file that exists, got {str(spec.path)!r}")
    if not math.isfinite(spec.strength):
        raise RequestError(f"lora: strength must be finite, got {spec.strength}; 1 is what the file was trained at")
    if spec.target not in (None, *_TARGETS.values()):
        raise RequestError(f"lora: target must be {', '.join(_TARGETS.values())}, got {spec.target!r}")
    return replace(spec, path=Path(spec.path).expanduser().absolute())


def open_lora(spec: LoraSpec, config: ModelConfig) -> Lora:
    """Open a LoRA file and find the layer of every key in a model.

    Args:
        spec: from `parse_lora`.
        config: of the model.

    Raises:
        RequestError: the spec names an expert of a model that has only one.
        CheckpointError: the file cannot be read, is no LoRA, fits no layer of the model, or is of another width; the
            message names file and tensor.
    """
    spec = replace(spec, target=_target(spec, config))
    reader = open_file(spec.path)
    shapes = expected_tensors(config.dit)
    names = module_names(shapes)
    for key in sorted(reader.names()):
        if method := other_method(key):
            raise CheckpointError(f"{reader.where(key)} makes this a file of {method}, which wanfast cannot apply")
    read = {key: read_key(key, names) for key in sorted(reader.names())}
    stated = _stated_scaling(Path(spec.path), names)
    grouped, report = _sort_keys(reader, read, _experts_of_keys(spec, read, config))
    layers: dict[ExpertName, dict[str, LayerKeys]] = {}
    for (expert, module), keys in grouped.items():
        shape = shapes.get(f"{module}.weight") or shapes[module]
        _check_shapes(reader, keys, module, shape, config)
        scale = _scale(reader, keys, module, spec, stated) if "down" in keys else 1.0
        layers.setdefault(expert, {})[module] = LayerKeys(keys, scale)
    return Lora(spec, reader, layers, report)


def open_loras(
    loras: Iterable[str | Path | LoraSpec],
    config: ModelConfig,
    experts: Mapping[ExpertName, Reader] = MappingProxyType({}),
    *,
    merge: bool = False,
) -> tuple[Lora, ...]:
    """Open all LoRAs of a generation. Keys that fit nothing are named in a logged warning.

    Args:
        loras: as `parse_lora` takes them.
        config: of the model.
        experts: the model's files, where they are open, to see whether LoRAs can be merged.
        merge: all of them, whatever their specs say.

    Raises:
        RequestError: as `parse_lora` and `open_lora`, or a LoRA is to be merged into quantised weights.
        CheckpointError: as `open_lora`.
    """
    if isinstance(loras, str | Path | LoraSpec):
        raise RequestError(f"loras: must be a list, got {loras!r}; put it in brackets")
    specs = [parse_lora(lora) for lora in loras]
    opened = tuple(open_lora(replace(spec, is_merged=merge or spec.is_merged), config) for spec in specs)
    for lora in opened:
        if lora.spec.is_merged:
            _refuse_quantised(lora, experts)
        if unmatched := lora.report.unmatched:
            _log.warning(
                "%s: %d of %d tensors fit no layer of %s and are ignored: %s",
                *(lora.spec.path, len(unmatched), len(lora.reader.names()), config.name, _listed(unmatched)),
            )
    return opened


def _refuse_quantised(lora: Lora, experts: Mapping[ExpertName, Reader]) -> None:
    """Refuse to merge where the sum would have to be quantised again, which would change the base by itself."""
    for expert in (name for name in lora.layers if name in experts):
        reader = experts[expert]
        products = {f"{layer}.weight" for layer, found in lora.layers[expert].items() if "down" in found.keys}
        for name in sorted(products & reader.names()):
            if (kind := reader.ref(name).stored_as) is not None:
                raise RequestError(
                    f"merge_loras: must be left out for quantised weights, got {reader.path} in {kind}; without it"
                    " LoRAs run beside the weights, or use the model's files in 16 bits"
                )


def describe_lora(lora: Lora) -> str:
    """Say in one line what a LoRA file does."""
    skipped = "".join(
        f", {list(lora.report.skipped.values()).count(reason)} skipped ({reason})"
        for reason in dict.fromkeys(lora.report.skipped.values())
    )
    unmatched = f", {len(lora.report.unmatched)} ignored" if lora.report.unmatched else ""
    return (
        f"LoRA {Path(lora.spec.path).name}: strength {lora.spec.strength:g}, {' and '.join(lora.experts)},"
        f" {len(lora.report.matched)} tensors{unmatched}{skipped}{', merged' if lora.spec.is_merged else ''}"
    )


def file_digest(path: str | Path) -> str:
    """Hash a file's bytes with SHA-256."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _experts_of_keys(
    spec: LoraSpec, read: Mapping[str, LoraKey], config: ModelConfig
) -> dict[Literal[1, 2] | None, tuple[ExpertName, ...]]:
    """Settle which experts the keys of either transformer, or of none, go to."""
    everyone = tuple(expert.name for expert in config.experts)
    if len(everyone) == 1:
        return {None: everyone, 1: everyone, 2: ()}
    chosen = tuple(name for name in everyone if spec.target in (name, "both"))
    if not any(key.transformer == 2 for key in read.values()):
        return {None: chosen, 1: chosen, 2: ()}  # Diffusers writes the low-noise expert's files with this prefix too
    return {None: chosen, 1: tuple({everyone[0]} & {*chosen}), 2: tuple({everyone[1]} & {*chosen})}


def _target(spec: LoraSpec, config: ModelConfig) -> Target:
    """Settle the experts a LoRA is for: as asked, else by file name (high_noise, LowNoise, ..._high), else both."""
    if len(config.experts) == 1:
        if spec.target in ("high_noise", "low_noise"):
            raise RequestError(
                f"lora: must not be for the {spec.target} expert of {config.name}, which has only one; leave @ out"
            )
        return "both"
    if spec.target is not None:
        return spec.target
    match = re.search(r"(?<![a-z])(high|low)(?:[-_ ]?noise|$)", Path(spec.path).stem, re.IGNORECASE)
    return _TARGETS[match[1].lower()] if match else "both"


def _sort_keys(
    reader: Reader,
    read: Mapping[str, LoraKey],
    experts: Mapping[Literal[1, 2] | None, tuple[ExpertName, ...]],
) -> tuple[dict[tuple[ExpertName, str], dict[Part, str]], LoraReport]:
    grouped: dict[tuple[ExpertName, str], dict[Part, str]] = {}
    matched, unmatched, skipped = [], [], {}
    for key, found in read.items():
        if found.module is None or found.part is None:
            reason = reason_to_skip(key)
            skipped.update({key: reason} if reason else {})
            unmatched.extend([] if reason else [key])
            continue
        if not experts[found.transformer]:
            skipped[key] = "for an expert that was not asked for or is not there"
            continue
        matched.append(key)
        for expert in experts[found.transformer]:
            keys = grouped.setdefault((expert, found.module), {})
            if found.part in keys:
                raise CheckpointError(f"{reader.path}: tensors {keys[found.part]} and {key} both mean {found.module}")
            keys[found.part] = key
    if not any(keys.keys() - {"alpha"} for keys in grouped.values()):
        listed = _listed([*unmatched, *skipped, *matched]) or "it is empty"
        raise CheckpointError(f"{reader.path}: no tensor fits a layer of the model ({listed}); is this a LoRA for it?")
    for (expert, module), keys in list(grouped.items()):
        if keys.keys() <= {"alpha"}:  # of a product that is not there
            del grouped[expert, module]
            unmatched += [key for key in keys.values() if key in matched]
            matched = [key for key in matched if key not in keys.values()]
    return grouped, LoraReport(tuple(matched), tuple(unmatched), skipped)


def _check_shapes(
    reader: Reader, keys: Mapping[Part, str], module: str, shape: tuple[int, ...], config: ModelConfig
) -> None:
    """Hold a layer's keys to its shape [out, in, ...]; a factor may be flat or shaped like a convolution."""
    halves = [part for part in ("down", "up") if part in keys]
    if len(halves) == 1 or ("up_bias" in keys and not halves):
        lone = next(key for part, key in keys.items() if part in ("down", "up", "up_bias"))
        raise CheckpointError(f"{reader.where(lone)} has no counterpart; a LoRA needs both factors")
    rank = reader.shape(keys["down"])[0] if halves and reader.shape(keys["down"]) else 0
    inner, outer = math.prod(shape[1:]), shape[0]
    flat: dict[Part, tuple[int, ...]] = {"down": (rank, inner), "up": (outer, rank), "up_bias": (outer,)}
    for part in ("down", "up", "up_bias"):
        if part not in keys:
            continue
        got = reader.shape(keys[part])
        is_right = (got[0], math.prod(got[1:])) == flat[part] if len(got) > 1 else got == flat[part]
        if not is_right or (halves and rank == 0) or len(shape) < 2:
            raise CheckpointError(
                f"{reader.where(keys[part])} has shape {list(got)}, but {module} of {config.name} is {list(shape)} and"
                f" takes {list(flat[part])}; this LoRA is for another model"
            )
    sized: dict[Part, tuple[int, ...]] = {"weight": shape, "bias": shape[:1]}
    for part, want in sized.items():
        if part in keys and reader.shape(keys[part]) != want:
            raise CheckpointError(
                f"{reader.where(keys[part])} has shape {list(reader.shape(keys[part]))}, but {part} of {module} in"
                f" {config.name} is {list(want)}; this LoRA is for another model"
            )


def _scale(
    reader: Reader, keys: Mapping[Part, str], module: str, spec: LoraSpec, stated: "tuple[dict[str, float], bool]"
) -> float:
    """Settle alpha / rank, or alpha / sqrt(rank) where the file or the spec says that it is rank-stabilised."""
    alphas, is_stabilised = stated
    rank = reader.shape(keys["down"])[0]
    alpha = alphas.get(module, alphas.get(""))
    if "alpha" in keys:
        ref = reader.ref(keys["alpha"])
        if math.prod(ref.shape) != 1 or not math.isfinite(alpha := _number(ref)):
            raise CheckpointError(f"{reader.where(keys['alpha'])} must be one finite number, as an alpha is")
    if alpha is None:
        return 1.0
    return alpha / math.sqrt(rank) if is_stabilised or spec.is_rank_stabilised else alpha / rank


def _number(ref: TensorRef) -> float:
    """The only number of a tensor; torch is imported for a dtype that no published file has."""
    if ref.dtype_name == "bfloat16":
        return float(struct.unpack("<f", bytes(2) + ref.first_bytes(2))[0])  # the upper half of fp32
    if ref.dtype_name in _NUMBERS:
        return float(struct.unpack(_NUMBERS[ref.dtype_name], ref.first_bytes(ref.num_bytes))[0])
    return float(cast("Any", ref.load("cpu")).item())


def _stated_scaling(path: Path, names: Mapping[str, str]) -> tuple[dict[str, float], bool]:
    """Read what Diffusers (in the header) or PEFT (in a file beside) says of alpha: by layer, "" for the others."""
    config: dict[str, Any] = {}
    beside = path.parent / "adapter_config.json"
    if path.suffix == ".safetensors":
        text = safetensors_metadata(path).get("lora_adapter_metadata", "{}")
        try:
            found = json.loads(text)
            config = {re.sub(r"^transformer(_2)?\.", "", key): value for key, value in found.items()}
        except (ValueError, AttributeError, RecursionError):
            raise CheckpointError(f"{path}: its lora_adapter_metadata is not a JSON object; write it again") from None
    if not config and path.name.startswith("adapter_model.") and beside.is_file():
        config = read_json(beside)
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise CheckpointError(f"{path}: its settings give an alpha_pattern that is not a JSON object; write it again")
    alphas: dict[str, float] = {}
    for name, alpha in {"": config.get("lora_alpha"), **pattern}.items():
        is_number = isinstance(alpha, int | float) and math.isfinite(alpha)
        if name not in ("", *names) or not (alpha is None or is_number):
            raise CheckpointError(
                f"{path}: its settings give {name or 'lora_alpha'} the alpha {alpha!r}; "
                "wanfast reads one number for all layers, and one for each layer named in full"
            )
        if alpha is not None:
            alphas[names.get(name, "")] = float(alpha)
    return alphas, bool(config.get("use_rslora"))


def _listed(keys: "list[str] | tuple[str, ...]") -> str:
    return ", ".join(keys[:_NAMED]) + (", ..." if len(keys) > _NAMED else "")
