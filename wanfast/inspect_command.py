"""`wanfast inspect`: what a checkpoint, a tensor file or a clip is, in less time than torch takes to import.

What is imported here needs no torch: headers are enough. Only a `.pth` file takes torch, whose unpickler reads even its
names, and a clip takes the video library.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from wanfast.checkpoint.inspect import describe, format_description
from wanfast.lora_summary import lora_summary


def inspect(arguments: argparse.Namespace) -> None:
    """Print what `arguments.path` is, as JSON with `arguments.json`.

    Raises:
        CheckpointError: it is no checkpoint and no tensor file, or is one that is damaged or incomplete.
        MediaError: it is a clip that cannot be read.
    """
    facts, is_table = _facts(arguments.path)
    if arguments.json:
        print(json.dumps(facts, ensure_ascii=False, indent=2))
    else:
        print(format_description(facts) if is_table else _format_facts(facts))


def _facts(named: str) -> tuple[dict[str, Any], bool]:
    """What is known of a path or a built-in model, and whether that is a table of parts."""
    path = Path(named)
    if path.suffix.lower() == ".mp4":
        from wanfast.video import probe_video

        return probe_video(path), False
    lora = lora_summary(path)
    return (describe(named), True) if lora is None else (lora, False)


def _format_facts(facts: dict[str, Any]) -> str:
    width = max(map(len, facts)) + 2
    return "\n".join(
        f"{key:<{width}}{json.dumps(value, ensure_ascii=False, indent=2) if isinstance(value, dict) else value}"
        for key, value in facts.items()
    )
