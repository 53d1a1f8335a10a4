"""What a clip says of itself: the settings embedded in the file, and the way back from them to the same video."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, get_args

from PIL import Image

from wanfast.config import SolverName
from wanfast.errors import MediaError, RequestError
from wanfast.plan import Plan, Precision, request_of
from wanfast.request import Request

FORMAT = 1  # of the embedded object; raised when a reader of the old one would misread the new one


# What a recorded value must be: the check, and the words for it.
Rule: TypeAlias = tuple[Callable[[Any], bool], str]


@dataclass(frozen=True, slots=True)
class RecordedLora:
    """One LoRA as it was used."""

    path: str
    sha256: str  # of the file
    strength: float
    target: str | None
    is_rank_stabilised: bool
    is_merged: bool


@dataclass(frozen=True, slots=True)
class Recorded:
    """Settings read back from a clip."""

    request: Request
    model: str  # name, such as t2v-A14B
    model_path: str | None  # or the name of a built-in model; None is wan-tiny, unless there are files
    model_files: dict[str, str]  # of parts named one by one, by the names of `wanfast.load`'s arguments
    precision: str
    image_path: str | None
    image_sha256: str | None
    loras: tuple[RecordedLora, ...]


def image_digest(image: Image.Image) -> str:
    """Hash a picture's pixels, so that another picture under the same name is noticed."""
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()


def settings_of(
    plan: Plan,
    *,
    version: str,
    model_path: str | None,
    image: Image.Image | None = None,
    image_path: str | None = None,
    is_repeatable: bool = True,
    model_files: Mapping[str, str] = MappingProxyType({}),
    loras: Sequence[RecordedLora] = (),
) -> dict[str, Any]:
    """Gather what repeats a plan's video, as JSON-able values.

    Args:
        plan: of the video.
        version: of wanfast.
        model_path: folder of the model, or its name if it is built in; None for files alone.
        image: the conditioning picture, if there was one.
        image_path: where it came from, if from a file.
        is_repeatable: whether prompts and seed are all the video came from (no latents or encodings of the caller's).
        model_files: parts of the model that were named one by one.
        loras: in the order they were given.
    """
    return {
        "wanfast": version,
        "format": FORMAT,
        "model": plan.model,
        "model_path": model_path,
        "model_files": dict(model_files),
        "precision": plan.precision,
        "is_repeatable": is_repeatable,
        "image": None if image is None else {"path": image_path, "sha256": image_digest(image)},
        "loras": [asdict(lora) for lora in loras],
        "request": asdict(request_of(plan)),
    }


def read_recorded(settings: dict[str, Any], clip: str | Path) -> Recorded:
    """Turn the settings embedded in a clip back into a request.

    Every field that `settings_of` writes must be there and have its type: a default in place of one that was lost
    would make another video without a word. Only what came later may be missing: a clip without it is older. Whether a
    value suits the model is checked as it is for a user's.

    Args:
        settings: as `settings_of` made them, read from the clip; anybody may have written them.
        clip: file name for messages.

    Raises:
        MediaError: the settings are of another format or damaged.
        RequestError: the clip was made from latents or text encodings it does not hold.
    """
    recorded_format = settings.get("format")
    if type(recorded_format) is not int or recorded_format != FORMAT:
        raise MediaError(
            f"{clip}: its settings have format {_short(recorded_format)}, this wanfast reads format {FORMAT}"
        )
    _check_fields(settings, _SETTINGS_RULES, "settings", clip)
    if not settings["is_repeatable"]:
        raise RequestError(
            f"clip: must come from prompts and a seed alone, got {clip}, made from latents or encodings of its own"
        )
    image, asked = settings["image"], settings["request"]
    if image is not None:
        _check_fields(image, _IMAGE_RULES, "image", clip)
    for lora in settings["loras"]:
        _check_fields(lora, _LORA_RULES, "loras", clip)
    _check_fields(asked, _REQUEST_RULES, "request", clip)
    _check_request(asked, has_image=image is not None, clip=clip)
    size = asked["image_size"]
    return Recorded(
        request=Request(**asked | {"image_size": None if size is None else tuple(size)}),
        model=settings["model"],
        model_path=settings["model_path"],
        model_files=dict(settings["model_files"]),
        precision=settings["precision"],
        image_path=None if image is None else image["path"],
        image_sha256=None if image is None else image["sha256"],
        loras=tuple(RecordedLora(**lora) for lora in settings["loras"]),
    )


def _check_fields(values: Any, rules: Mapping[str, Rule], what: str, clip: str | Path) -> None:
    """Hold an object to its rules: the same fields, each of its type; newer settings alone may hold more."""
    if not isinstance(values, dict) or (values.keys() - rules.keys() and what != "settings"):
        raise MediaError(f"{clip}: its settings are damaged: {what} must hold {', '.join(rules)}, got {_short(values)}")
    for name, (is_right, expected) in rules.items():
        full = name if what == "settings" else f"{what}.{name}"
        if name not in values:
            if name in _LATER:
                continue
            raise MediaError(f"{clip}: its settings are damaged: {full} is missing")
        if not is_right(values[name]):
            raise MediaError(f"{clip}: its settings are damaged: {full} must be {expected}, got {_short(values[name])}")


def _check_request(asked: dict[str, Any], *, has_image: bool, clip: str | Path) -> None:
    """Hold the fields of a request to each other."""
    if has_image != (asked["image_size"] is not None):
        raise MediaError(f"{clip}: its settings are damaged: image and image_size must be there both or neither")
    if asked["prompt"] is None and not has_image:
        raise MediaError(f"{clip}: its settings are damaged: prompt must be text where there is no image, got None")
    given = [asked[name] is not None for name in ("guidance", "guidance_high", "guidance_low")]
    if given not in ([True, False, False], [False, True, True]):
        raise MediaError(
            f"{clip}: its settings are damaged: guidance, or guidance_high and guidance_low, must be numbers"
        )


def _is_integer(value: Any) -> bool:
    return type(value) is int  # a bool is none


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST  # NaN is not


def _is_path(value: Any) -> bool:
    """Tell whether a value can name a file at all: no NUL, no character without an encoding."""
    try:
        return isinstance(value, str) and value != "" and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_integer, value))


def _is_files(value: Any) -> bool:
    is_map = isinstance(value, dict) and value.keys() <= set(_PARTS)
    return is_map and all(map(_is_path, value.values()))


def _or_none(rule: Rule) -> Rule:
    is_right, expected = rule
    return lambda value: value is None or is_right(value), f"{expected}, or null"


def _one_of(*choices: str) -> Rule:
    return lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}"


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_PARTS = ("high", "low", "vae", "text_encoder", "tokenizer")
_LARGEST = 1e300
_TEXT: Rule = (lambda value: isinstance(value, str), "text")
_INTEGER: Rule = (_is_integer, "an integer")
_NUMBER: Rule = (_is_number, "a finite number")
_FLAG: Rule = (lambda value: isinstance(value, bool), "true or false")
_PATH: Rule = (_is_path, "the name of a file or folder")

_SETTINGS_RULES: dict[str, Rule] = {
    "wanfast": _TEXT,
    "model": _TEXT,
    "model_path": _or_none(_PATH),
    "model_files": (_is_files, f"paths of {', '.join(_PARTS)}"),
    "precision": _one_of(*get_args(Precision)),
    "is_repeatable": _FLAG,
    "image": (lambda value: value is None or isinstance(value, dict), "an object, or null"),
    "loras": (lambda value: isinstance(value, list), "a list"),
    "request": (lambda value: isinstance(value, dict), "an object"),
}
_IMAGE_RULES: dict[str, Rule] = {"path": _or_none(_PATH), "sha256": _TEXT}
_LORA_RULES: dict[str, Rule] = {
    "path": _PATH,
    "sha256": _TEXT,
    "strength": _NUMBER,
    "target": _or_none(_one_of("high_noise", "low_noise", "both")),
    "is_rank_stabilised": _FLAG,
    "is_merged": _FLAG,
}
_LATER = ("attention_density",)  # in clips from before it, attention is dense
_REQUEST_RULES: dict[str, Rule] = {
    "prompt": _or_none(_TEXT),
    "negative_prompt": _TEXT,
    "image_size": _or_none((_is_size, "a list of two integers")),
    "width": _INTEGER,
    "height": _INTEGER,
    "num_frames": _INTEGER,
    "num_inference_steps": _INTEGER,
    "guidance": _or_none(_NUMBER),
    "guidance_high": _or_none(_NUMBER),
    "guidance_low": _or_none(_NUMBER),
    "shift": _NUMBER,
    "solver": _one_of(*get_args(SolverName)),
    "seed": (lambda value: _is_integer(value) and value >= 0, "an integer from 0"),
    "fps": _INTEGER,
    "attention_density": _NUMBER,
}
