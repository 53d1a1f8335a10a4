"""Holds JSON values to a JSON Schema: the few keywords that `report.schema.json` uses, and no others."""

import json
import math
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}
_KNOWN = {
    *("$schema", "$id", "$defs", "$ref", "title", "description", "type", "enum", "const", "minimum"),
    *("properties", "required", "additionalProperties", "items", "minItems"),
}


@cache
def report_schema() -> dict[str, Any]:
    """Read the schema of a benchmark's report, which is part of the package."""
    schema: dict[str, Any] = json.loads((files("wanfast.bench") / "report.schema.json").read_text("utf-8"))
    return schema


def faults(value: Any, schema: dict[str, Any]) -> list[str]:
    """List what in a value breaks a schema: where it is, and how.

    Args:
        value: as json.loads gives it; anybody may have written it.
        schema: trusted; a keyword that is not known here is an error of its author.

    Raises:
        ValueError: the schema has such a keyword.
    """
    return list(_faults(value, schema, schema, "report"))


def _faults(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str) -> Iterator[str]:
    if unknown := schema.keys() - _KNOWN:
        raise ValueError(f"schema: {', '.join(sorted(unknown))} is not supported")
    if "$ref" in schema:
        yield from _faults(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, at)
        return
    if not _has_type(value, schema.get("type")):
        yield f"{at}: must be {_named(schema['type'])}, got {_short(value)}"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{at}: must be {schema['const']!r}, got {_short(value)}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: must be one of {', '.join(map(str, schema['enum']))}, got {_short(value)}"
    if "minimum" in schema and isinstance(value, int | float) and value < schema["minimum"]:
        yield f"{at}: must be at least {schema['minimum']}, got {_short(value)}"
    if isinstance(value, dict):
        yield from _object_faults(value, schema, root, at)
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{at}: must hold at least {schema['minItems']}, got {len(value)}"
        for index, item in enumerate(value):
            yield from _faults(item, schema.get("items", {}), root, f"{at}[{index}]")


def _object_faults(value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any], at: str) -> Iterator[str]:
    known = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{at}.{name}: is missing"
    others = schema.get("additionalProperties", True)
    for name, item in value.items():
        if name in known:
            yield from _faults(item, known[name], root, f"{at}.{name}")
        elif others is False:
            yield f"{at}.{_short(name)}: is not known"
        elif isinstance(others, dict):
            yield from _faults(item, others, root, f"{at}.{name}")


def _has_type(value: Any, types: str | list[str] | None) -> bool:
    if types is None:
        return True
    if isinstance(value, float) and not math.isfinite(value):
        return False  # which JSON has no word for
    names = [types] if isinstance(types, str) else types
    return any(isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool)) for name in names)


def _named(types: str | list[str]) -> str:
    return types if isinstance(types, str) else " or ".join(types)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
