"""The files of a report: where they go, and that they appear whole and take nobody's place."""

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from wanfast.errors import MediaError, RequestError
from wanfast.locks import place_file

_JSON, _MARKDOWN = "bench.json", "bench.md"


def choose_targets(folder: str | None, json_file: str | None, markdown: str | None, *, overwrite: bool) -> list[Path]:
    """Settle where the JSON and the Markdown go, and refuse now what could not be written in the end.

    Args:
        folder: for the files that are not named; None is the current one. It is made, but not what it is in.
        json_file: name of the JSON, instead of bench.json in the folder.
        markdown: of the Markdown, instead of bench.md.
        overwrite: whether files of these names may be there.

    Returns:
        Both paths, the JSON's first.

    Raises:
        RequestError: a file is there, or both have one name.
        MediaError: no file can be written there.
    """
    place = Path(folder or ".").expanduser()
    named = [(json_file, place / _JSON), (markdown, place / _MARKDOWN)]
    targets = [usual if given is None else Path(given).expanduser() for given, usual in named]
    if targets[0].absolute() == targets[1].absolute():
        raise RequestError(f"markdown: must be another file than json, got {targets[1]} for both")
    for target in targets:
        if target.exists() and not overwrite:
            raise RequestError(f"output: must not exist yet, got {target}; choose another folder or add --overwrite")
        _check_writable(target, may_make=folder is not None and target.parent == place)
    return targets


def _check_writable(target: Path, *, may_make: bool) -> None:
    place = target.parent
    if may_make and not place.exists():
        place = place.parent
    if not place.is_dir():
        raise MediaError(f"{target}: folder {place} does not exist; create it first")
    if target.is_dir() or not os.access(place, os.W_OK):
        raise MediaError(f"{target}: cannot be written; choose a writable folder")


def write_files(contents: Mapping[Path, str], *, overwrite: bool) -> list[Path]:
    """Write texts, all of them or none; each appears whole.

    Args:
        contents: text by path; a missing folder is made.
        overwrite: whether a file that is there is replaced; else the new one gets a number behind its name.

    Returns:
        Where they are.

    Raises:
        MediaError: one cannot be written.
    """
    parts: dict[Path, Path] = {}
    try:
        for target, text in contents.items():
            target.parent.mkdir(exist_ok=True)
            parts[target] = target.parent / f".{target.name[:60]}.part-{secrets.token_hex(4)}"
            with parts[target].open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        return [place_file(part, target, overwrite=overwrite) for target, part in parts.items()]
    except OSError as error:
        raise MediaError(f"{target}: cannot be written ({error.strerror or error}); choose another folder") from error
    finally:
        for part in parts.values():
            with suppress(OSError):
                part.unlink()
