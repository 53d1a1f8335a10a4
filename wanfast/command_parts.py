"""What several commands do alike."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from wanfast.arguments import request_arguments
from wanfast.checkpoint.lookup import Sources
from wanfast.config import MODELS, ModelConfig
from wanfast.errors import RequestError
from wanfast.generation import OnPreview
from wanfast.plan import Plan
from wanfast.presets import apply_preset
from wanfast.preview import PreviewWriter, check_preview
from wanfast.request import Request, parse_size
from wanfast.run_state import FileMark, RunKeeper
from wanfast.tiny import IMAGE_NAME, NAME


def sources_of(arguments: argparse.Namespace) -> Sources:
    """Pick from a parsed line what names the model's files."""
    return Sources(**{name: getattr(arguments, name) for name in Sources.__slots__})


def usual_sources(arguments: argparse.Namespace, *, has_image: bool) -> Sources:
    """The same, or where nothing is named the built-in model, for a picture the one that takes pictures."""
    sources = sources_of(arguments)
    if sources != Sources():
        return sources
    return Sources(model=IMAGE_NAME if has_image else NAME)


def request_for(arguments: argparse.Namespace, config: ModelConfig, image: Image.Image | None) -> Request:
    """Turn a parsed line into a request."""
    if arguments.task is not None and MODELS[arguments.task].task != config.task:
        raise RequestError(
            f"task: must be that of the model, got {arguments.task} for a {config.name} model; leave --task out"
        )
    width, height = parse_size(arguments.size, config) if arguments.size else (None, None)
    asked = request_arguments(arguments)
    image_size = None if image is None else image.size
    request = Request(asked.pop("prompt"), width=width, height=height, image_size=image_size, **asked)
    return apply_preset(request, arguments.preset)


@contextmanager
def kept_on_disk(output: Path, settings: dict[str, Any], plan: Plan, files: Sequence[FileMark]) -> Iterator[RunKeeper]:
    """Keep a run on disk as it goes; when it stops before its clip is there, say how to go on."""
    keeper = RunKeeper(output, settings, files)
    try:
        yield keeper
    except BaseException:
        if (state := keeper.stop()) is not None:
            done = f"after step {state.next_step} of {len(plan.steps)}"
            more = " --overwrite" if output.exists() else ""
            name = shlex.quote(str(keeper.file))
            print(f"wanfast: `wanfast resume {name}{more}` goes on {done}", file=sys.stderr)
        raise
    keeper.finish()


@contextmanager
def previewing(path: str | None, config: ModelConfig, plan: Plan) -> Iterator[OnPreview | None]:
    """Give what keeps the newest preview in a file, or None where no file is named."""
    if path is None:
        yield None
        return
    seconds = config.vae.temporal_stride / plan.fps  # a preview has a picture per latent frame
    with PreviewWriter(check_preview(path), seconds_per_frame=seconds) as writer:
        yield lambda step, frames: writer.update(frames)


def absolute(path: str | None) -> str | None:
    """Make a path absolute, if there is one."""
    return None if path is None else str(Path(path).absolute())


def note(arguments: argparse.Namespace, *lines: str) -> None:
    """Print lines on stderr, unless the user wants it quiet."""
    if not arguments.quiet:
        for line in lines:
            print(line, file=sys.stderr)
