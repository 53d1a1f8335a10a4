"""What each command does, once its line is parsed; `inspect` has a module of its own."""

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from wanfast.batch_command import make_batch
from wanfast.checkpoint.lookup import Sources
from wanfast.command_parts import absolute, kept_on_disk, note, previewing, request_for, sources_of, usual_sources
from wanfast.convert import convert_model
from wanfast.doctor import diagnose, findings_to_dict, format_findings, probe
from wanfast.errors import RequestError
from wanfast.generation import Inputs, generate_frames
from wanfast.images import load_image
from wanfast.loaded import LoadedModel
from wanfast.lora import LoraSpec, Target, describe_lora, file_digest, open_loras, parse_lora
from wanfast.model import open_model
from wanfast.pipeline import open_loaded, open_loras_for, plan_for, settings_for, warn_of_preset
from wanfast.plan import Plan
from wanfast.plan_command import show_plan
from wanfast.preview import check_preview
from wanfast.progress import Progress
from wanfast.run_state import StoredRun, changed_file, mark_files, read_run, resume_file
from wanfast.settings import Recorded, RecordedLora, image_digest, read_recorded
from wanfast.video import check_writable, read_settings, write_video


def _generate(arguments: argparse.Namespace) -> None:
    if arguments.prompts is not None:
        make_batch(arguments)
        return
    _check_output(arguments)
    if arguments.preview is not None:
        check_preview(arguments.preview)
    image = load_image(arguments.image) if arguments.image else None
    specs = [parse_lora(text) for text in arguments.lora]  # before a model is looked for, which may take a download
    if arguments.task is not None and sources_of(arguments) == Sources():
        raise RequestError(f"model: must be given with --task, got none; add --model {arguments.task.lower()}")
    model = open_loaded(
        usual_sources(arguments, has_image=image is not None),
        precision=arguments.precision,
        vram=arguments.vram,
        ram=arguments.ram,
        device=arguments.device,
    )
    loras = open_loras_for(model.model, specs, arguments.preset, merge=arguments.merge_loras)
    plan = plan_for(model, request_for(arguments, model.config, image), loras)
    note(arguments, *arguments.notes, *model.notes, *map(describe_lora, loras))
    warn_of_preset(model, plan, loras)
    _make(arguments, model, plan, Inputs(image=image, loras=loras), absolute(arguments.image))


def _plan(arguments: argparse.Namespace) -> None:
    _check_output(arguments)
    show_plan(arguments)


def _convert(arguments: argparse.Namespace) -> None:
    sources, started = sources_of(arguments), time.perf_counter()
    if sources == Sources():
        raise RequestError("model: must be given, got none; for example --model Wan2.2-T2V-A14B")
    model = open_model(sources)
    note(arguments, *model.notes)
    output = arguments.output or f"{model.config.name}-{arguments.precision}"
    with Progress(is_shown=not arguments.quiet, unit="B") as progress:
        folder = convert_model(model, output, arguments.precision, on_progress=progress.update)
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    seconds = round(time.perf_counter() - started, 3)
    print(json.dumps({"path": str(folder), "bytes": num_bytes, "seconds": seconds}) if arguments.json else folder)


def _doctor(arguments: argparse.Namespace) -> None:
    machine = probe()
    findings = diagnose(machine)
    print(json.dumps(findings_to_dict(machine, findings), indent=2) if arguments.json else format_findings(findings))


def _bench(arguments: argparse.Namespace) -> None:
    from wanfast.bench.command import bench  # the other commands do without it

    bench(arguments)


def _verify(arguments: argparse.Namespace) -> None:
    from wanfast.verify import verify  # likewise

    verify(arguments)


def _rerun(arguments: argparse.Namespace) -> None:
    recorded = read_recorded(read_settings(arguments.clip), arguments.clip)
    arguments.output = arguments.output or str(Path(arguments.clip).with_suffix("")) + "-rerun.mp4"
    _check_output(arguments)
    _repeat(arguments, recorded)


def _resume(arguments: argparse.Namespace) -> None:
    run = read_run(arguments.run)
    recorded = read_recorded(run.settings, arguments.run)
    arguments.output = arguments.output or run.output
    is_its_own = resume_file(Path(arguments.output)).resolve() == Path(arguments.run).resolve()
    _check_output(arguments, is_going_on=is_its_own)
    _repeat(arguments, recorded, run)
    Path(arguments.run).unlink(missing_ok=True)


def _repeat(arguments: argparse.Namespace, recorded: Recorded, run: StoredRun | None = None) -> None:
    """Make a clip from recorded settings, from its start or from where it was stopped."""
    image, image_path = None, arguments.image or recorded.image_path
    if recorded.image_sha256 is not None:
        if image_path is None:
            raise RequestError(
                "image: must be given, as the clip was made from a picture without a file; add --image FILE"
            )
        image = load_image(image_path)
        if image_digest(image) != recorded.image_sha256 or image.size != recorded.request.image_size:
            raise RequestError(f"image: must be the picture the clip was made from, got {image_path}, which differs")
    sources = Sources(model=recorded.model_path, **recorded.model_files)
    if sources == Sources() and arguments.model is None:
        raise RequestError(
            f"model: must be given, as the clip was made by a {recorded.model} of random weights that is no longer"
            f" built in; add --model FOLDER, or make another clip"
        )
    if arguments.model is not None:
        sources = Sources(model=arguments.model)
    model = open_loaded(
        sources, precision=recorded.precision, vram=arguments.vram, ram=arguments.ram, device=arguments.device
    )
    if model.config.name != recorded.model:
        raise RequestError(f"model: must be {recorded.model}, which the clip was made with, got {model.config.name}")
    if run is not None and (changed := changed_file(run.files, mark_files(model.model.readers))) is not None:
        raise RequestError(f"model: must be as it was when the run was begun, got {changed}, which has changed since")
    files = [*arguments.lora, *(str(file) for files in model.model.preset_loras.values() for file in files)]
    loras = open_loras(_specs_again(recorded.loras, files), model.config, model.model.experts)
    plan = plan_for(model, recorded.request, loras)
    inputs = Inputs(image=image, loras=loras, state=None if run is None else run.state)
    _make(arguments, model, plan, inputs, None if image is None else absolute(image_path))


def _specs_again(recorded: Sequence[RecordedLora], given: Sequence[str]) -> list[LoraSpec]:
    """Find a clip's LoRA files, where they were or among those given, by their contents."""
    given_by_digest = {file_digest(path): path for path in given if Path(path).is_file()}
    specs = []
    for lora in recorded:
        path = given_by_digest.get(lora.sha256, lora.path)
        if not Path(path).is_file() or file_digest(path) != lora.sha256:
            raise RequestError(
                f"lora: must be the file the clip was made with, {lora.path} is gone or differs; add --lora FILE"
            )
        target = cast("Target | None", lora.target)
        specs.append(LoraSpec(path, lora.strength, target, lora.is_rank_stabilised, lora.is_merged))
    return specs


def _make(
    arguments: argparse.Namespace, model: LoadedModel, plan: Plan, inputs: Inputs, image_path: str | None
) -> None:
    """Generate, encode and write one video; say where it is."""
    path = Path(arguments.output or _default_name(plan))
    check_writable(path)
    note(arguments, _headline(plan))
    settings = settings_for(model, plan, inputs, image_path)
    files = mark_files(model.model.readers)
    started = time.perf_counter()
    with (
        Progress(is_shown=not arguments.quiet) as progress,
        kept_on_disk(path, settings, plan, files) as keeper,
        previewing(arguments.preview, model.config, plan) as on_preview,
    ):
        chunks = generate_frames(
            model, plan, inputs, on_state=keeper.update, on_progress=progress.update, on_preview=on_preview
        )
        path = write_video(path, chunks, fps=plan.fps, settings=settings, overwrite=arguments.overwrite)
        seconds = progress.seconds()
    seconds["total"] = time.perf_counter() - started
    if arguments.json:
        rounded = {stage: round(value, 3) for stage, value in seconds.items()}
        print(
            json.dumps(
                {"path": str(path), "seed": plan.seed, "seconds": rounded, "settings": settings}, ensure_ascii=False
            )
        )
    else:
        print(path)


def _check_output(arguments: argparse.Namespace, *, is_going_on: bool = False) -> None:
    """Refuse an output that could not be written, or that is there, before anything is loaded."""
    if arguments.output is None:
        return
    arguments.output = os.path.expanduser(arguments.output)
    check_writable(arguments.output)
    if Path(arguments.output).exists() and not arguments.overwrite:
        raise RequestError(
            f"output: must not exist yet, got {arguments.output}; choose another name or add --overwrite"
        )
    unfinished = resume_file(Path(arguments.output))
    if os.path.exists(unfinished) and not arguments.overwrite and not is_going_on:
        raise RequestError(
            f"output: must not have a stopped run beside it, got {unfinished}; `wanfast resume` it, choose another"
            " name, or add --overwrite"
        )


def _default_name(plan: Plan) -> str:
    """Name the clip after model, prompt and seed; an existing file keeps its name and the new one gets a number."""
    words = re.sub(r"[^\w]+", "-", plan.prompt or "video").strip("-")[:50]
    stem = f"{plan.model}-{words}-{plan.seed}"
    names = (f"{stem}{number}.mp4" for number in ("", *(f"-{n}" for n in range(2, 10_000))))
    return next(name for name in names if not (Path(name).exists() or resume_file(Path(name)).exists()))


def _headline(plan: Plan) -> str:
    frames = "1 frame" if plan.num_frames == 1 else f"{plan.num_frames} frames"
    experts = " + ".join(f"{count} {name}" for name, count in plan.steps_per_expert.items())
    return (
        f"{plan.model}: {plan.width}x{plan.height}, {frames}, {experts} steps, seed {plan.seed},"
        f" {plan.precision} on {plan.device}"
    )


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "generate": _generate,
    "plan": _plan,
    "convert": _convert,
    "rerun": _rerun,
    "resume": _resume,
    "doctor": _doctor,
    "bench": _bench,
    "verify": _verify,
}
