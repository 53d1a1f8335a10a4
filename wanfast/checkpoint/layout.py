"""Finds the parts of a checkpoint folder, in the official or the Diffusers layout, and settles which model they are.

Whatever the layout, the parts are read by official tensor names. The task comes from the folder's own description and
is held against the tensors: weights of another variant are refused here, before anything is loaded.

Sources: Wan-AI/Wan2.2-T2V-A14B, -I2V-A14B, -TI2V-5B and their -Diffusers twins on Hugging Face (file lists, configs).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wanfast.checkpoint.defaults import SamplingDefaults, read_sampling_defaults
from wanfast.checkpoint.files import TensorRef, read_json
from wanfast.checkpoint.names import vae_version
from wanfast.checkpoint.nearby import TENSOR_SUFFIXES
from wanfast.checkpoint.part import Part, PartKind, open_part
from wanfast.checkpoint.reader import Reader
from wanfast.checkpoint.variant import (
    check_experts_agree,
    check_experts_differ,
    check_parts_fit,
    check_sizes,
    check_task,
    num_blocks,
)
from wanfast.config import MODELS, ExpertName, Task, VAEVersion
from wanfast.errors import CheckpointError

Layout = Literal["official", "diffusers", "files", "ready"]
Config = Mapping[str, Any]

_TASKS: tuple[Task, ...] = ("t2v", "i2v", "ti2v")
EXPERTS: dict[Task | None, tuple[ExpertName, ...]] = {
    "t2v": ("high_noise", "low_noise"),
    "i2v": ("high_noise", "low_noise"),
    "ti2v": ("single",),
}
_ABOUT: dict[str, str] = {
    "high_noise": "the high-noise expert",
    "low_noise": "the low-noise expert",
    "single": "the diffusion transformer",
}
_DIFFUSERS_FOLDERS: dict[ExpertName, str] = {
    "high_noise": "transformer",
    "low_noise": "transformer_2",
    "single": "transformer",
}
_HEAD_DIM = 128  # of every published Wan model
_HOW_TO_GET_ONE = "name a folder as published; `hf download Wan-AI/Wan2.2-TI2V-5B --local-dir DIR` fetches one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The open parts of one model. Readers speak official names in every layout."""

    path: Path  # the folder, or the file of the first expert
    layout: Layout
    task: Task
    experts: Mapping[ExpertName, Reader]  # in the order they run
    vae: Reader
    vae_version: VAEVersion
    text: Reader
    tokenizer: Path | TensorRef  # a tokenizer.json or spiece.model, or the bytes of the latter in a tensor file
    boundary: float | None  # sigma; None where the folder does not say
    configs: Mapping[str, Config]  # raw JSON by expert name, "vae", "text", "model_index"; only those that exist
    defaults: SamplingDefaults
    notes: tuple[str, ...] = ()  # what was decided by names and places, for the user to see
    made_from: tuple[str, ...] = ()  # names of the files it was converted from
    written_for: str | None = None  # the precision it was converted for


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Parts that stand in for those of a folder."""

    vae: Reader | None = None
    text: Reader | None = None
    tokenizer: Path | TensorRef | None = None


_NOTHING = Given()


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTSettings:
    """What a DiT's tensors do not tell."""

    num_heads: int
    eps: float
    text_len: int


@dataclass(slots=True)
class _Search:
    """What was found so far, and what is wrong: all of it is reported at once."""

    folder: Path
    given: Given
    configs: dict[str, Config] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def config(self, key: str, file: Path, *, required: bool = True) -> Config:
        """Read and keep a JSON file; an empty object where there is none."""
        if not file.is_file():
            if required:
                self.problems.append(f"{file}: missing")
            return {}
        try:
            self.configs[key] = read_json(file)
        except CheckpointError as error:
            self.problems.append(str(error))
        return self.configs.get(key, {})

    def part(self, path: Path, kind: PartKind, about: str) -> Part | None:
        """Open a part; None, with the problem kept, where that fails."""
        if not path.exists():
            self.problems.append(f"{path}: missing ({about})")
            return None
        try:
            return open_part(path, kind)
        except CheckpointError as error:
            self.problems.append(str(error))
            return None

    def tokenizer(self, folder: Path, text: Part | None) -> Path | TensorRef:
        """The tokenizer that was given, the one in its folder, or the one that the text encoder brings along."""
        if self.given.tokenizer is not None:
            return self.given.tokenizer
        for name in ("tokenizer.json", "spiece.model"):
            if (folder / name).is_file():
                return folder / name
        if text is not None and text.vocabulary is not None:
            return text.vocabulary
        self.problems.append(f"{folder / 'tokenizer.json'}: missing (the tokenizer)")
        return folder

    def refuse(self) -> None:
        """Raise if there was a problem."""
        if len(self.problems) == 1:
            raise CheckpointError(self.problems[0])
        if self.problems:
            raise CheckpointError(f"{self.folder}: {len(self.problems)} problems: " + "; ".join(self.problems))


def open_checkpoint(path: str | Path, given: Given = _NOTHING) -> Checkpoint:
    """Open a checkpoint folder: headers and configs are read, no weights.

    Args:
        path: a folder in the official layout (`high_noise_model/`, `low_noise_model/` or the 5B's DiT in the root,
            `models_t5_umt5-xxl-enc-bf16.pth`, `Wan2.1_VAE.pth` or `Wan2.2_VAE.pth`, `google/umt5-xxl/`), or in the
            Diffusers layout (`model_index.json`, `transformer/`, `transformer_2/`, `vae/`, `text_encoder/`,
            `tokenizer/`). A part may be stored in any format that a file of its own may have.
        given: parts to use in place of the folder's, which then need not be there.

    Raises:
        CheckpointError: there is no such folder, parts are missing or damaged (all are listed), the parts do not belong
            together, or they are not the variant the folder says they are.
    """
    folder = Path(path).expanduser()
    _refuse_non_folder(folder)
    search = _Search(folder, given)
    checkpoint = _open_diffusers(search) if _is_diffusers(folder) else _open_official(search)
    for name, reader in checkpoint.experts.items():
        if checkpoint.layout == "official":
            source = _official_config(folder, name)
            check_task(reader, checkpoint.task, source)
            check_sizes(reader, checkpoint.configs[name], source)
        else:  # a converted config may hold stray sizes: only its tensors are believed
            check_task(reader, checkpoint.task, folder / "model_index.json")
    check_experts_agree(list(checkpoint.experts.values()))
    check_experts_differ(list(checkpoint.experts.values()))
    settings = {name: dit_settings(checkpoint, name) for name in checkpoint.experts}
    if len(set(settings.values())) > 1:
        told = ", ".join(f"{name}: {value}" for name, value in settings.items())
        raise CheckpointError(f"{folder}: the experts' config.json differ ({told}); use one model's")
    check_parts_fit(next(iter(checkpoint.experts.values())), checkpoint.vae, checkpoint.text)
    return checkpoint


def dit_settings(checkpoint: Checkpoint, expert: ExpertName) -> DiTSettings:
    """Read from an expert's config what its tensors do not tell.

    Raises:
        CheckpointError: a value is missing or impossible.
    """
    config, reader = checkpoint.configs.get(expert, {}), checkpoint.experts[expert]
    if checkpoint.layout == "files":
        return _usual_settings(reader)
    source = _config_file(checkpoint, expert)

    def number(key: str, kind: type, default: float | None = None) -> Any:
        value = config.get(key, default)
        is_right = type(value) is int or (kind is float and type(value) is float)
        if not is_right or not 0 < value < math.inf:
            raise CheckpointError(
                f"{source}: {key}: must be a number above 0, got {value!r}; use the config that belongs to the weights"
            )
        return kind(value)

    eps = number("eps", float, 1e-6)
    if checkpoint.layout in ("official", "ready"):
        return DiTSettings(num_heads=number("num_heads", int), eps=eps, text_len=number("text_len", int, 512))
    num_heads, head_dim = number("num_attention_heads", int), number("attention_head_dim", int)
    dim = reader.shape("patch_embedding.weight")[0]
    if num_heads * head_dim != dim:
        raise CheckpointError(
            f"{source}: num_attention_heads x attention_head_dim is {num_heads} x {head_dim}, but "
            f"{reader.where('patch_embedding.weight')} is {dim} wide; use the config that belongs to the weights"
        )
    return DiTSettings(num_heads=num_heads, eps=eps, text_len=512)


def _usual_settings(reader: Reader) -> DiTSettings:
    """What every published Wan model has, for a file that comes without a config."""
    dim = reader.shape("patch_embedding.weight")[0]
    if dim % _HEAD_DIM:
        raise CheckpointError(
            f"{reader.where('patch_embedding.weight')} is {dim} wide, not a multiple of the {_HEAD_DIM} channels of a "
            "Wan model's head; a folder with a config.json can say otherwise"
        )
    for model in MODELS.values():
        if model.dit.dim == dim and num_blocks(reader) != model.dit.num_layers:
            raise CheckpointError(
                f"{reader.path}: has the tensors of {num_blocks(reader)} blocks, but the {model.dit.num_layers} of "
                f"{model.name} are blocks.0 to blocks.{model.dit.num_layers - 1}; download what is missing"
            )
    return DiTSettings(num_heads=dim // _HEAD_DIM, eps=1e-6, text_len=512)


def _refuse_non_folder(folder: Path) -> None:
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder; {_HOW_TO_GET_ONE}, wan-tiny and its siblings are built in")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; {_HOW_TO_GET_ONE}")
    try:
        is_empty = not any(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None
    if is_empty:
        raise CheckpointError(f"{folder}: is an empty folder; {_HOW_TO_GET_ONE}")
    marks = ("model_index.json", "transformer", "high_noise_model", "low_noise_model", "config.json")
    if not any((folder / mark).exists() for mark in marks) and not any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder}: holds neither the official layout (high_noise_model/ and low_noise_model/, or config.json and "
            f"the DiT) nor the Diffusers layout (model_index.json, transformer/); {_HOW_TO_GET_ONE}"
        )


def _is_diffusers(folder: Path) -> bool:
    return (folder / "model_index.json").exists() or (folder / "transformer").is_dir()


def _official_expert_folder(folder: Path, expert: ExpertName) -> Path:
    return folder if expert == "single" else folder / f"{expert}_model"


def _official_config(folder: Path, expert: ExpertName) -> Path:
    """The expert's own config; one in the root serves both, as LightX2V's users have it."""
    own = _official_expert_folder(folder, expert) / "config.json"
    return folder / "config.json" if not own.exists() and (folder / "config.json").is_file() else own


def _config_file(checkpoint: Checkpoint, expert: ExpertName) -> Path:
    if checkpoint.layout == "ready":
        return checkpoint.path / "wanfast-model.json"
    if checkpoint.layout == "official":
        return _official_config(checkpoint.path, expert)
    return checkpoint.path / _DIFFUSERS_FOLDERS[expert] / "config.json"


def _open_official(search: _Search) -> Checkpoint:
    folder, given = search.folder, search.given
    has_two = any((folder / name).is_dir() for name in ("high_noise_model", "low_noise_model"))
    names = EXPERTS["t2v" if has_two else "ti2v"]
    experts: dict[ExpertName, Part | None] = {}
    for name in names:
        place = _official_expert_folder(folder, name)
        experts[name] = search.part(place, "dit", _ABOUT[name])
        if place.is_dir():
            search.config(name, _official_config(folder, name))
    task = _official_task(search, names)
    text, vae = _given_parts(given)
    text = text or search.part(_official_text_file(folder), "text", "the text encoder")
    vae = vae or search.part(_official_vae_file(folder, has_two), "vae", "the VAE")
    tokenizer = search.tokenizer(folder / "google" / "umt5-xxl", text)
    return _assemble(search, "official", task, experts, vae, text, tokenizer, None)


def _given_parts(given: Given) -> tuple[Part | None, Part | None]:
    """Text encoder and VAE, as parts."""
    text = None if given.text is None else Part("text", given.text)
    return text, None if given.vae is None else Part("vae", given.vae)


def _official_task(search: _Search, names: tuple[ExpertName, ...]) -> Task | None:
    """The model_type of the experts' configs; problems go into the search."""
    task: Task | None = None
    for name in names:
        if name not in search.configs:
            continue
        source = _official_config(search.folder, name)
        said = search.configs[name].get("model_type")
        found = next((known for known in _TASKS if known == said), None)
        if found is None:
            search.problems.append(f"{source}: model_type is {said!r}; wanfast runs {', '.join(_TASKS)}")
        elif EXPERTS[found] != names:
            layout = (
                "two experts in high_noise_model/ and low_noise_model/" if len(names) == 1 else "one DiT in the root"
            )
            search.problems.append(
                f"{source}: model_type is {said!r}, which has {layout}; the folder holds another model"
            )
        elif task is not None and found != task:
            search.problems.append(
                f"{source}: model_type is {said!r}, but the other expert's is {task!r}; use one model's"
            )
        task = task or found
    return task


def _official_text_file(folder: Path) -> Path:
    usual = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    others = [file for file in folder.glob("*t5*") if file.suffix in TENSOR_SUFFIXES]
    return usual if usual.exists() or len(others) != 1 else others[0]


def _official_vae_file(folder: Path, has_two_experts: bool) -> Path:
    """The VAE of the model's kind, or the only one that is there; whether it fits is told by its tensors."""
    order = ("Wan2.1_VAE", "Wan2.2_VAE") if has_two_experts else ("Wan2.2_VAE", "Wan2.1_VAE")
    files = [folder / f"{name}{suffix}" for name in order for suffix in (".pth", ".safetensors")]
    return next((file for file in files if file.exists()), files[0])


def _open_diffusers(search: _Search) -> Checkpoint:
    folder, given = search.folder, search.given
    task, boundary = _described_by(search, search.config("model_index", folder / "model_index.json"))
    experts: dict[ExpertName, Part | None] = {}
    for name in EXPERTS[task or "ti2v"]:
        place = folder / _DIFFUSERS_FOLDERS[name]
        experts[name] = search.part(place, "dit", _ABOUT[name])
        if place.is_dir():
            search.config(name, place / "config.json")
    text, vae = _given_parts(given)
    if vae is None:
        vae = search.part(folder / "vae", "vae", "the VAE")
        search.config("vae", folder / "vae" / "config.json", required=(folder / "vae").is_dir())
    if text is None:
        text = search.part(folder / "text_encoder", "text", "the text encoder")
        search.config("text", folder / "text_encoder" / "config.json", required=False)
    tokenizer = search.tokenizer(folder / "tokenizer", text)
    return _assemble(search, "diffusers", task, experts, vae, text, tokenizer, boundary)


def _described_by(search: _Search, index: Config) -> tuple[Task | None, float | None]:
    """Task and boundary from a model_index.json; problems go into the search."""
    source = search.folder / "model_index.json"
    if not index:
        return None, None
    boundary = index.get("boundary_ratio")
    if boundary is not None and not (type(boundary) is float and 0 < boundary < 1):
        search.problems.append(f"{source}: boundary_ratio must be null or between 0 and 1, got {boundary!r}")
        boundary = None
    pipeline = index.get("_class_name")
    tasks: dict[Any, Task] = {"WanPipeline": "t2v", "WanImageToVideoPipeline": "i2v"}
    if not isinstance(pipeline, str) or pipeline not in tasks:
        search.problems.append(f"{source}: _class_name is {pipeline!r}; wanfast runs {', '.join(tasks)}")
        return None, boundary
    return ("ti2v" if index.get("expand_timesteps") is True else tasks[pipeline]), boundary


def _assemble(
    search: _Search,
    layout: Layout,
    task: Task | None,
    experts: Mapping[ExpertName, Part | None],
    vae: Part | None,
    text: Part | None,
    tokenizer: Path | TensorRef,
    boundary: float | None,
) -> Checkpoint:
    """Make the checkpoint of what was found, or raise all that is wrong with it."""
    search.refuse()
    found = {name: part.reader for name, part in experts.items() if part is not None}
    assert task is not None and vae is not None and text is not None and len(found) == len(experts)
    return Checkpoint(
        path=search.folder,
        layout=layout,
        task=task,
        experts=found,
        vae=vae.reader,
        vae_version=vae_version(vae.reader.names()),
        text=text.reader,
        tokenizer=tokenizer,
        boundary=boundary,
        configs=search.configs,
        defaults=read_sampling_defaults(search.folder),
    )
