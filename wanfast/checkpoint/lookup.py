"""Finds the files of a model from what a user names: a folder, a file or two, a name, a Hub id, and parts one by one.

What is found by a name or a place, and not said by the user, is noted in the checkpoint for the user to see.
"""

import logging
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from wanfast.checkpoint import nearby
from wanfast.checkpoint.defaults import SamplingDefaults
from wanfast.checkpoint.files import TensorRef
from wanfast.checkpoint.layout import Checkpoint, Given, dit_settings, open_checkpoint
from wanfast.checkpoint.names import vae_version
from wanfast.checkpoint.part import KIND_NAMES, Part, PartKind, open_part, open_parts
from wanfast.checkpoint.reader import Reader
from wanfast.checkpoint.ready_layout import MANIFEST, open_ready
from wanfast.checkpoint.variant import (
    check_experts_agree,
    check_experts_differ,
    check_parts_fit,
    dit_channels,
    task_by_channels,
)
from wanfast.config import ExpertName, Task
from wanfast.errors import CheckpointError, RequestError
from wanfast.tiny import tiny_files

_LOG = logging.getLogger(__name__)
_FLAGS: dict[ExpertName, str] = {"high_noise": "high", "low_noise": "low"}
_OTHER: dict[ExpertName, ExpertName] = {"high_noise": "low_noise", "low_noise": "high_noise"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What the user named; None is to be found."""

    model: str | Path | None = None  # folder, file, alias or Hub id
    high: str | Path | None = None  # file or folder of the high-noise expert
    low: str | Path | None = None
    vae: str | Path | None = None
    text_encoder: str | Path | None = None
    tokenizer: str | Path | None = None  # tokenizer.json or spiece.model, or a folder that holds one

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not (value is None or isinstance(value, str | os.PathLike)):
                raise RequestError(f"{name}: must be a path or a name, got {value!r}; for example 'Wan2.2-T2V-A14B'")

    @property
    def parts(self) -> dict[str, str]:
        """Absolute paths of the parts that were named one by one."""
        named = {name: getattr(self, name) for name in self.__slots__ if name != "model"}
        return {name: str(Path(path).expanduser().absolute()) for name, path in named.items() if path is not None}


def find_checkpoint(sources: Sources) -> Checkpoint:
    """Open the checkpoint that the sources mean; headers and configs are read, no weights.

    Args:
        sources: `model` is a folder in the official, Diffusers or wanfast's own layout, a ComfyUI folder with
            `diffusion_models/`, one file or the folder of one DiT's shards or blocks (of a pair, the other is found by
            its name), an alias such as `t2v-a14b`, the name of a built-in model, or a Hub id. `high` and `low` name the
            experts' files or folders instead. The other parts are the model's own unless named; for single files they
            are looked for beside them and in ComfyUI's folders.

    Raises:
        RequestError: the sources contradict each other.
        CheckpointError: a part is not found, cannot be read, or does not fit the others.
    """
    asked, sources = sources.model, _of_built_in(sources)
    given = _given(sources)
    model = None if sources.model is None else Path(sources.model).expanduser()
    experts = {name: Path(path).expanduser() for name, path in _named_experts(sources).items()}
    is_one_dit = model is not None and (model.is_file() or _is_dit_folder(model))
    if experts and model is not None and not is_one_dit:
        raise RequestError(f"model: must be one DiT's file or folder, or left out, beside high and low, got {asked}")
    if experts or is_one_dit:
        return _from_files(model, experts, given)
    if model is None:
        raise RequestError("model: must be given, got none; name a folder, a file, or t2v-a14b, i2v-a14b or ti2v-5b")
    if model.is_dir() and nearby.comfy_root(model) in (model, model / "models"):
        return _from_comfy(model, given)
    return _from_folder(model, given) if model.exists() else _from_hub(str(sources.model), given)


def _of_built_in(sources: Sources) -> Sources:
    """Put the files of a built-in model in place of its name; a path that is called like it wants a ./ before it."""
    files = tiny_files(sources.model)
    if files is None:
        return sources
    named = {name: value for name in Sources.__slots__ if (value := getattr(sources, name)) is not None}
    return Sources(**{**files, **named, "model": files["model"]})


def _is_dit_folder(path: Path) -> bool:
    return nearby.is_dit_folder(path) and not (path / MANIFEST).exists()


def _from_folder(folder: Path, given: Given) -> Checkpoint:
    is_ready = (folder / MANIFEST).is_file()
    return open_ready(folder, given) if is_ready else open_checkpoint(folder, given)


def _named_experts(sources: Sources) -> dict[ExpertName, str | Path]:
    named: dict[ExpertName, str | Path | None] = {"high_noise": sources.high, "low_noise": sources.low}
    return {name: path for name, path in named.items() if path is not None}


def _given(sources: Sources) -> Given:
    """Open the parts that were named."""
    vae = None if sources.vae is None else open_part(Path(sources.vae).expanduser(), "vae").reader
    text = None if sources.text_encoder is None else open_part(Path(sources.text_encoder).expanduser(), "text")
    tokenizer: Path | TensorRef | None = None if text is None else text.vocabulary
    if sources.tokenizer is not None:
        tokenizer = Path(sources.tokenizer).expanduser()
    return Given(vae=vae, text=None if text is None else text.reader, tokenizer=tokenizer)


def _from_hub(model: str, given: Given) -> Checkpoint:
    from wanfast.checkpoint import hub  # whose library takes longer to import than what is here to open

    repository = hub.repository_of(model)
    if repository is None:
        return _from_folder(Path(model).expanduser(), given)
    for name in (repository, *hub.twins(repository)):
        folder = hub.cached_folder(name)
        if folder is None:
            continue
        try:
            return _from_folder(folder, given)
        except CheckpointError:  # incomplete: the download says what it adds, and what is still wrong is told after it
            _LOG.info("%s: not complete in the cache", name)
    return _from_folder(hub.download(repository), given)


def _from_comfy(folder: Path, given: Given) -> Checkpoint:
    """Take the one Wan model of a ComfyUI folder; with several, say what there is to choose from."""
    root = nearby.comfy_root(folder)
    assert root is not None
    singles: list[Path] = []
    pairs: dict[tuple[Task, str], dict[ExpertName, Path]] = {}
    for file in nearby.dit_files(root):
        task = _task_of(file)
        if task == "ti2v":
            singles.append(file)
        elif task is not None and (expert := nearby.expert_by_name(file)) is not None:
            pairs.setdefault((task, nearby.pair_key(file)), {})[expert] = file
    whole = [pair for pair in pairs.values() if len(pair) == 2]
    if len(singles) + len(whole) == 1:
        return _from_files(singles[0], {}, given) if singles else _from_files(None, whole[0], given)
    choices = [f"--model {shlex.quote(str(file))}" for file in singles]
    for pair in whole:
        high, low = (shlex.quote(str(pair[name])) for name in ("high_noise", "low_noise"))
        choices.append(f"--high {high} --low {low}")
    found = f"{len(choices)} Wan 2.2 models; name one: {' | '.join(choices)}" if choices else "no whole Wan 2.2 model"
    raise CheckpointError(f"{root}: diffusion_models/ holds {found}")


def _task_of(file: Path) -> Task | None:
    """The task of a DiT's file; None for any other file, or one that cannot be read."""
    try:
        return task_by_channels(open_part(file, "dit").reader)
    except CheckpointError as error:
        _LOG.info("passed over: %s", error)
        return None


def _from_files(model: Path | None, named: dict[ExpertName, Path], given: Given) -> Checkpoint:
    """Put a model together from files; those that were not named are found beside them."""
    notes: list[str] = []
    first = next(iter([model, *named.values()] if model is not None else named.values()))
    assert first is not None
    parts = open_parts(first)
    dit = next((part.reader for part in parts if part.kind == "dit"), None)
    if dit is None:
        raise CheckpointError(
            f"{first}: holds a {KIND_NAMES[parts[0].kind]}, not a diffusion transformer; name that file"
        )
    task = task_by_channels(dit)
    if task == "ti2v":
        if named:
            raise RequestError(f"{_FLAGS[next(iter(named))]}: must be left out for a model with one DiT; use model")
        experts: dict[ExpertName, Reader] = {"single": dit}
    else:
        paths = _both_experts(model, dict(named), notes)
        experts = {name: dit if path == first else open_part(path, "dit").reader for name, path in paths.items()}
    check_experts_agree(list(experts.values()))
    check_experts_differ(list(experts.values()))
    inside = {part.kind: part for part in parts}
    z_dim, width = dit_channels(dit)[1], dit.shape("text_embedding.0.weight")[-1]
    vae = given.vae or _found("vae", first, inside, lambda vae: vae.shape("conv2.weight")[0] == z_dim, notes).reader
    text = (
        Part("text", given.text)
        if given.text is not None
        else _found("text", first, inside, lambda text: text.shape("token_embedding.weight")[-1] == width, notes)
    )
    check_parts_fit(dit, vae, text.reader)
    checkpoint = Checkpoint(
        path=first,
        layout="files",
        task=task,
        experts=experts,
        vae=vae,
        vae_version=vae_version(vae.names()),
        text=text.reader,
        tokenizer=given.tokenizer or text.vocabulary or _tokenizer(first, text.reader, notes),
        boundary=None,
        configs={},
        defaults=SamplingDefaults(),
    )
    for name in experts:
        dit_settings(checkpoint, name)
    return replace(checkpoint, notes=tuple(notes))


def _both_experts(model: Path | None, paths: dict[ExpertName, Path], notes: list[str]) -> dict[ExpertName, Path]:
    """The files of both experts, high noise first: those named, and what their names lead to."""
    if model is not None:
        expert = nearby.expert_by_name(model)
        if expert is None and len(paths) == 1:
            expert = _OTHER[next(iter(paths))]
        if expert is None:
            raise RequestError(
                f"model: must have high or low in its name, as it is one of two experts, got {model}; "
                "use high and low to say which file is which"
            )
        if expert in paths:
            raise RequestError(f"model: is the {_about(expert)} by its name, got {model} and {paths[expert]}; name one")
        paths[expert] = model
        notes.append(f"{_about(expert)}: {model}")
    if len(paths) == 1:
        ((expert, path),) = paths.items()
        missing = _OTHER[expert]
        partners = nearby.partner_paths(path)
        if len(partners) != 1:
            found = f"{len(partners)} files could be" if partners else "no file beside it is named like"
            raise CheckpointError(
                f"{path}: is the {_about(expert)}, and {found} the {_about(missing)}; name it with --{_FLAGS[missing]}"
            )
        paths[missing] = partners[0]
        notes.append(f"{_about(missing)}: {partners[0]} (by its name)")
    _check_two(paths["high_noise"], paths["low_noise"])
    return {"high_noise": paths["high_noise"], "low_noise": paths["low_noise"]}


def _check_two(high: Path, low: Path) -> None:
    """Refuse one expert twice; where names contradict what was said, what was said holds, with a warning."""
    if high.resolve() == low.resolve():
        raise RequestError(f"low: must be another file than high, got {low} for both")
    by_name = nearby.expert_by_name(high), nearby.expert_by_name(low)
    if by_name[0] is not None and by_name[0] == by_name[1]:
        raise RequestError(
            f"low: must be the other expert, got {high} and {low}, both {_about(by_name[0])} by their names"
        )
    if by_name[0] == "low_noise" or by_name[1] == "high_noise":
        _LOG.warning("high is %s and low is %s, which their names contradict; they run as said", high, low)


def _about(expert: ExpertName) -> str:
    return f"{_FLAGS[expert]}-noise expert"


def _found(
    kind: PartKind, near: Path, inside: dict[PartKind, Part], fits: Callable[[Reader], bool], notes: list[str]
) -> Part:
    """The part of one kind: inside the DiT's file, or of the files near it the most exact one that fits."""
    if kind in inside:
        return inside[kind]
    candidates: dict[Path, Part] = {}
    for file in nearby.vae_files(near) if kind == "vae" else nearby.text_encoder_files(near):
        try:
            part = open_part(file, kind)
            if fits(part.reader):
                candidates.setdefault(file, part)
        except CheckpointError as error:
            _LOG.info("passed over: %s", error)
    flag = "vae" if kind == "vae" else "text-encoder"
    if not candidates:
        raise CheckpointError(f"{near}: no {KIND_NAMES[kind]} that fits it lies near it; name one with --{flag}")
    file = max(candidates, key=lambda file: _num_bytes(candidates[file].reader))
    others = f" (of {len(candidates)} that fit, the largest)" if len(candidates) > 1 else ""
    notes.append(f"{KIND_NAMES[kind]}: {file}{others}")
    return candidates[file]


def _num_bytes(reader: Reader) -> int:
    return sum(reader.ref(name).num_bytes for name in reader.names())


def _cached_tokenizer() -> Path | None:
    from wanfast.checkpoint import hub

    return hub.cached_file("google/umt5-xxl", "tokenizer.json")


def _tokenizer(dit: Path, text: Reader, notes: list[str]) -> Path:
    files = nearby.tokenizer_files([text.path, dit])
    file = files[0] if files else _cached_tokenizer()
    if file is None:
        raise CheckpointError(
            f"{text.path}: no tokenizer in it or near it; name the tokenizer.json of google/umt5-xxl with --tokenizer"
        )
    notes.append(f"tokenizer: {file}")
    return file
