"""`wanfast generate --prompts FILE`: a clip per line, each on disk when it is done; the same command goes on."""

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from wanfast.batch import Job, Made, generate_batch
from wanfast.command_parts import note, request_for, usual_sources
from wanfast.errors import CheckpointError, MediaError, MemoryBudgetError, NumericsError, RequestError
from wanfast.generation import Inputs
from wanfast.images import load_image
from wanfast.loaded import LoadedModel
from wanfast.locks import lock_file
from wanfast.lora import Lora, describe_lora, parse_lora
from wanfast.pipeline import open_loaded, open_loras_for, plan_for, settings_for, warn_of_preset
from wanfast.plan import Plan, Wish, request_of
from wanfast.progress import Progress
from wanfast.prompt_file import PromptLine, read_prompts
from wanfast.run_state import RunKeeper, RunState, changed_file, mark_files, read_run, resume_file
from wanfast.video import check_writable, encode_video, read_settings

_log = logging.getLogger("wanfast")

_RANDOM_SEED = -1  # as in the reference's generate.py
_OF_ONE_CLIP = (MediaError, RequestError, NumericsError, MemoryBudgetError)  # the others go on


@dataclass(frozen=True, slots=True, kw_only=True)
class _Clip:
    """One line, ready to be made."""

    line: PromptLine
    output: Path
    plan: Plan
    inputs: Inputs
    settings: dict[str, Any]
    is_there: bool  # made by an earlier run of the same command


def make_batch(arguments: argparse.Namespace) -> None:
    """Make the clips of a parsed `generate --prompts` line; print each one's path as it is done.

    Raises:
        RequestError: an argument or a line breaks a rule; nothing has been computed then.
        NumericsError: some clips failed; all others are there.
    """
    if arguments.image is not None:
        raise RequestError("image: must be left out beside --prompts; name it in a .jsonl line")
    lines = read_prompts(arguments.prompts)
    specs = [parse_lora(text) for text in arguments.lora]
    folder = Path(arguments.output or ".").expanduser()
    if not folder.is_dir():
        raise RequestError(f"output: must be a folder with --prompts, got {folder}; make it first")
    model = open_loaded(
        usual_sources(arguments, has_image=any(line.image is not None for line in lines)),
        precision=arguments.precision,
        vram=arguments.vram,
        ram=arguments.ram,
        device=arguments.device,
    )
    loras = open_loras_for(model.model, specs, arguments.preset, merge=arguments.merge_loras)
    with _held(folder):
        _make_clips(arguments, model, lines, folder, loras)


def _make_clips(
    arguments: argparse.Namespace,
    model: LoadedModel,
    lines: Sequence[PromptLine],
    folder: Path,
    loras: tuple[Lora, ...],
) -> None:
    names = [line.output or _name(line) for line in lines]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        numbers = [line.number for line, name in zip(lines, names, strict=True) if name == twice]
        raise RequestError(
            f"prompts: must give each clip a name of its own, got {twice} for lines {numbers[0]} and {numbers[1]} of"
            f" {arguments.prompts}"
        )
    clips: list[_Clip] = []
    results: list[dict[str, Any]] = []
    for line, name in zip(lines, names, strict=True):
        try:
            clips.append(_prepare(arguments, model, line, folder, loras))
        except MemoryBudgetError as error:
            _log.warning("line %d: %s; the others are made", line.number, error)
            results.append({"line": line.number, "path": str(folder / name), "seed": None, "error": str(error)})
    note(arguments, *arguments.notes, *model.notes, *map(describe_lora, loras))
    if clips:
        warn_of_preset(model, clips[0].plan, loras)
    missing = [clip for clip in clips if not clip.is_there]
    note(arguments, f"{len(lines)} clips, {len(clips) - len(missing)} of them there already")
    results += [_result(clip) for clip in clips if clip.is_there]
    results += _make(arguments, model, missing)
    results.sort(key=lambda result: result["line"])
    if arguments.json:
        print(json.dumps(results, ensure_ascii=False))
    failed = [result for result in results if result["error"] is not None]
    if failed:
        listed = "; ".join(f"line {result['line']}: {result['error']}" for result in failed)
        raise NumericsError(f"{len(failed)} of {len(lines)} clips failed: {listed}")


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep another batch out of the folder: it would make the same clips."""
    path = folder / ".wanfast-batch.lock"
    try:
        file = path.open("a+b")
    except OSError as error:
        raise MediaError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from None
    with file:
        if not lock_file(file):
            raise RequestError(f"output: must be another folder while a batch is writing there, got {folder}")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _prepare(
    arguments: argparse.Namespace, model: LoadedModel, line: PromptLine, folder: Path, loras: tuple[Lora, ...]
) -> _Clip:
    """Settle one line, and find what an earlier run of the same command has left of it."""
    try:
        image_path = None if line.image is None else Path(arguments.prompts).absolute().parent / line.image
        image = None if image_path is None else load_image(image_path)
        asked = argparse.Namespace(**vars(arguments) | line.arguments | {"prompt": line.prompt})
        plan = plan_for(model, request_for(asked, model.config, image), loras)
        output = folder / (line.output or _name(line))
        check_writable(output)
        inputs = Inputs(image=image, loras=loras)
        settings = settings_for(model, plan, inputs, None if image_path is None else str(image_path))
        if arguments.overwrite or not (output.exists() or resume_file(output).exists()):
            return _Clip(line=line, output=output, plan=plan, inputs=inputs, settings=settings, is_there=False)
        run = None if output.exists() else read_run(resume_file(output))
        earlier = read_settings(output) if run is None else run.settings
        if run is not None and (changed := changed_file(run.files, mark_files(model.model.readers))) is not None:
            raise RequestError(
                f"model: must be as it was when {output.name} was begun, got {changed}, which has changed since; add"
                " --overwrite"
            )
    except (RequestError, MediaError, CheckpointError) as error:
        raise type(error)(f"{arguments.prompts}, line {line.number}: {error}") from None
    if _may_be(earlier.get("precision"), model.wish):
        settings = settings | {"precision": earlier["precision"]}  # settled when it was begun, by the memory of then
    if not _is_same(earlier, settings, is_seed_given=asked.seed not in (None, _RANDOM_SEED)):
        raise RequestError(
            f"output: must not hold other clips of these names, got {output}; choose another folder or add --overwrite"
        )
    plan = replace(plan, seed=earlier["request"]["seed"])
    return _Clip(
        line=line,
        output=output,
        plan=plan if run is None else plan_for(model, request_of(plan), loras, begun_in=earlier["precision"]),
        inputs=replace(inputs, state=None if run is None else run.state),
        settings=earlier,
        is_there=run is None,
    )


def _may_be(precision: Any, wish: Wish) -> bool:
    """Whether a clip that was begun in a precision may go on in it: where memory settles which it is."""
    return wish.may_round and precision in (wish.precision, "int8")


def _is_same(earlier: dict[str, Any], settings: dict[str, Any], *, is_seed_given: bool) -> bool:
    """Whether a clip was made as this one would be; a seed that was not asked for may be any.

    A LoRA and a picture are what they hold, wherever they are: those in the package are elsewhere in each environment.
    """

    def plain(values: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in values.items() if key != "wanfast"}
        if isinstance(kept.get("loras"), list):
            kept["loras"] = [_without_path(lora) for lora in kept["loras"]]
        kept["image"] = _without_path(kept.get("image"))
        request = {"attention_density": 1.0, **(kept.get("request") or {})}  # which earlier clips do not state
        if not is_seed_given:
            request.pop("seed", None)
        as_read: dict[str, Any] = json.loads(json.dumps(kept | {"request": request}))  # tuples as lists
        return as_read

    return plain(earlier) == plain(settings)


def _without_path(recorded: Any) -> Any:
    return {**recorded, "path": None} if isinstance(recorded, dict) else recorded


def _make(arguments: argparse.Namespace, model: LoadedModel, clips: Sequence[_Clip]) -> list[dict[str, Any]]:
    files = mark_files(model.model.readers)
    keepers = [RunKeeper(clip.output, clip.settings, files) for clip in clips]
    jobs = [
        Job(plan=clip.plan, inputs=clip.inputs, on_state=keeper.update)
        for clip, keeper in zip(clips, keepers, strict=True)
    ]
    results: list[dict[str, Any]] = []
    # A file is finished in a thread of its own, while the next clip is decoded. On the way out it is waited for.
    with (
        _stopped(keepers, arguments),
        Progress(is_shown=not arguments.quiet) as progress,
        ThreadPoolExecutor(1, "wanfast-clips") as finishing,
    ):

        def tell(index: int) -> Any:
            name = clips[index].output.name
            return lambda stage, done, total: progress.update(stage, done, total, about=name)

        before: Future[dict[str, Any]] | None = None
        for made in generate_batch(model, jobs, tell):
            finish = _encode(clips[made.index], made, overwrite=arguments.overwrite)
            if before is not None:
                results.append(before.result())  # one file waits at most
            before = finishing.submit(partial(_finish, arguments, clips[made.index], keepers[made.index], finish))
        if before is not None:
            results.append(before.result())
    return results


def _encode(clip: _Clip, made: Made, *, overwrite: bool) -> Callable[[], Path] | Exception:
    """Decode a clip's frames into its file; a failure is its own, the others go on."""
    if made.frames is None:
        return made.error or NumericsError("no frames were made")
    try:
        return encode_video(clip.output, made.frames, fps=clip.plan.fps, settings=clip.settings, overwrite=overwrite)
    except _OF_ONE_CLIP as error:
        return error


def _finish(
    arguments: argparse.Namespace, clip: _Clip, keeper: RunKeeper, finish: Callable[[], Path] | Exception
) -> dict[str, Any]:
    """Complete a clip's file and say where it is."""
    if isinstance(finish, Exception):
        return _result(clip, finish)
    try:
        clip = replace(clip, output=finish())
    except _OF_ONE_CLIP as error:
        return _result(clip, error)
    keeper.finish()
    if not arguments.json:
        print(clip.output, flush=True)
    return _result(clip)


@contextmanager
def _stopped(keepers: Sequence[RunKeeper], arguments: argparse.Namespace) -> Iterator[None]:
    """When the batch is stopped, keep what was begun, and say how to go on."""
    try:
        yield
    except BaseException:
        kept: list[RunState] = [state for keeper in keepers if (state := keeper.stop()) is not None]
        how = "begins anew with --overwrite, and goes on without it" if arguments.overwrite else "goes on"
        print(f"wanfast: the same command {how}; {len(kept)} clips are begun", file=sys.stderr)
        raise


def _result(clip: _Clip, error: Exception | None = None) -> dict[str, Any]:
    told = None if error is None else " ".join(str(error).splitlines())
    return {"line": clip.line.number, "path": str(clip.output), "seed": clip.plan.seed, "error": told}


def _name(line: PromptLine) -> str:
    """Name a clip after its line, the same in every run."""
    words = re.sub(r"[^\w]+", "-", line.prompt).strip("-")[:50]
    return f"{line.number:04d}-{words or 'video'}.mp4"
