"""A file of prompts: one clip per line, as plain text or as JSON objects.

A `.jsonl` line is a prompt as a JSON string, or an object with a prompt and what differs from the command line:
`{"prompt": "a red ball", "seed": 3, "image": "ball.png", "output": "ball.mp4"}`. In any other file a line is a prompt;
empty lines and lines that begin with # are left out.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanfast.errors import RequestError

# Argument of a request -> type of its value.
_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "negative_prompt": (str,),
    "size": (str,),
    "num_frames": (int,),
    "num_inference_steps": (int,),
    "guidance": (int, float),
    "guidance_high": (int, float),
    "guidance_low": (int, float),
    "shift": (int, float),
    "solver": (str,),
    "seed": (int,),
    "fps": (int,),
    "attention_density": (int, float),
}
_KINDS = {(str,): "text", (int,): "a whole number", (int, float): "a number"}
_TEXTS = ("prompt", "image", "output")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLine:
    """One clip to make."""

    number: int  # of the line in the file, from 1
    prompt: str
    image: str | None = None  # path as written; a relative one is relative to the file
    output: str | None = None  # name of the clip
    arguments: dict[str, Any] = field(default_factory=dict)  # of the request


def read_prompts(path: str | Path) -> list[PromptLine]:
    """Read a file of prompts, UTF-8.

    Raises:
        RequestError: it cannot be read, holds no prompt, or a line is not as above; the message names the line.
    """
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"prompts: must be a text file in UTF-8, got {path} ({error})") from None
    is_json = file.suffix.lower() == ".jsonl"
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    found = [
        _parse(file, number, line) if is_json else PromptLine(number=number, prompt=line)
        for number, line in numbered
        if line and (is_json or not line.startswith("#"))
    ]
    if not found:
        raise RequestError(f"prompts: must hold a prompt on at least one line, got {path}, which holds none")
    outputs = [line.output for line in found if line.output is not None]
    twice = next((name for name in outputs if outputs.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"prompts: must name each output once, got {twice} on several lines of {path}")
    return found


def _parse(file: Path, number: int, line: str) -> PromptLine:
    where = f"prompts: {file}, line {number}"
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f'{where}: must be JSON ({error}); for example {{"prompt": "a red ball"}}') from None
    if isinstance(content, str):
        content = {"prompt": content}
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
        raise RequestError(f'{where}: must be text or an object with a prompt, such as {{"prompt": "a red ball"}}')
    for name, value in content.items():
        kinds = (str,) if name in _TEXTS else _ARGUMENTS.get(name)
        if kinds is None:
            raise RequestError(f"{where}: {name}: is no argument; there are {', '.join([*_TEXTS, *_ARGUMENTS])}")
        if type(value) not in kinds or value == "":
            raise RequestError(f"{where}: {name}: must be {_KINDS[kinds]}, got {value!r}")
    output = content.get("output")
    if output is not None and (Path(output).name != output or not output.lower().endswith(".mp4")):
        raise RequestError(f"{where}: output: must be a file name that ends in .mp4, got {output!r}")
    return PromptLine(
        number=number,
        prompt=content["prompt"],
        image=content.get("image"),
        output=output,
        arguments={name: value for name, value in content.items() if name in _ARGUMENTS},
    )
