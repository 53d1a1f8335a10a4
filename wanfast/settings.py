"""What a clip says of itself: the settings embedded in the file, and the way back from them to the same video."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from wanfast.errors import MediaError, RequestError
from wanfast.plan import Plan, request_of
from wanfast.request import Request

FORMAT = 1  # of the embedded object; raised when a reader of the old one would misread the new one


@dataclass(frozen=True, slots=True)
class RecordedLora:
    """One LoRA as it was used."""

    path: str
    sha256: str  # of the file
    strength: float
    target: str | None
    is_rank_stabilised: bool


@dataclass(frozen=True, slots=True)
class Recorded:
    """Settings read back from a clip."""

    request: Request
    model: str  # name, such as t2v-A14B
    model_path: str | None  # None is the built-in tiny model, unless there are files
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
        model_path: folder of the model; None is the built-in tiny one.
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

    Args:
        settings: as `settings_of` made them, read from the clip; trusted no further than their types.
        clip: file name for messages.

    Raises:
        MediaError: the settings are of another format or damaged.
        RequestError: the clip was made from latents or text encodings it does not hold.
    """
    if settings.get("format") != FORMAT:
        raise MediaError(
            f"{clip}: its settings have format {settings.get('format')!r}, this wanfast reads format {FORMAT}"
        )
    if not settings.get("is_repeatable", False):
        raise RequestError(
            f"clip: must come from prompts and a seed alone, got {clip}, made from latents or encodings of its own"
        )
    known = {field.name for field in fields(Request)}
    asked = settings.get("request")
    if not isinstance(asked, dict) or not set(asked) <= known:
        raise MediaError(f"{clip}: its settings are damaged: request must hold only {', '.join(sorted(known))}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in asked.items()}
    image = settings.get("image") or {}
    return Recorded(
        request=Request(values.pop("prompt", None), **values),
        model=str(settings.get("model")),
        model_path=settings.get("model_path"),
        model_files=_recorded_files(settings.get("model_files", {}), clip),
        precision=str(settings.get("precision")),
        image_path=image.get("path"),
        image_sha256=image.get("sha256"),
        loras=_recorded_loras(settings.get("loras", []), clip),
    )


def _recorded_files(entries: Any, clip: str | Path) -> dict[str, str]:
    known = ("high", "low", "vae", "text_encoder", "tokenizer")
    is_map = isinstance(entries, dict)
    if not is_map or not all(key in known and isinstance(path, str) for key, path in entries.items()):
        raise MediaError(f"{clip}: its settings are damaged: model_files must hold only paths of {', '.join(known)}")
    return dict(entries)


def _recorded_loras(entries: Any, clip: str | Path) -> tuple[RecordedLora, ...]:
    types = {"path": str, "sha256": str, "strength": int | float, "target": str | None, "is_rank_stabilised": bool}
    is_list = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    if not is_list or not all(
        entry.keys() == types.keys() and all(isinstance(entry[key], kind) for key, kind in types.items())
        for entry in entries
    ):
        raise MediaError(f"{clip}: its settings are damaged: each of loras must hold {', '.join(types)}")
    return tuple(RecordedLora(**entry) for entry in entries)
