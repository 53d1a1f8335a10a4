"""What the names and places of files tell: which expert a file is, where its partner, the VAE and the rest lie.

Both experts have the same tensors: only a file's name, or its folder's, says which one it is.

Sources: file names of Wan-AI, Comfy-Org, QuantStack, bullerwins, Kijai and lightx2v on Hugging Face; ComfyUI's folders.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from wanfast.config import ExpertName

TENSOR_SUFFIXES = (".safetensors", ".gguf", ".pth", ".pt")
_DIT_FOLDERS = ("diffusion_models", "unet", "checkpoints")
_VAE_FOLDERS = ("vae",)
_TEXT_FOLDERS = ("text_encoders", "clip")
_TOKENIZERS = (
    "tokenizer.json",
    "spiece.model",
    "google/umt5-xxl/tokenizer.json",
    "google/umt5-xxl/spiece.model",
    "tokenizer/tokenizer.json",
)
_WORDS = {"high": "low", "low": "high"}
# "high_noise", "HighNoise" and "high noise" are surer than a "high" or "low" alone, as in "low-vram".
_SURE = re.compile(r"(?i)(?<![a-z])(high|low)(?=[ _.-]?noise)")
_LIKELY = re.compile(r"(?i)(?<![a-z])(high|low)(?![a-z])")


def expert_by_name(path: Path) -> ExpertName | None:
    """Which expert a file is, by its name or else its folder's; None where neither says, or says both."""
    match = _expert_word(path.name) or _expert_word(path.parent.name)
    if match is None:
        return None
    return "high_noise" if match[1].lower() == "high" else "low_noise"


def partner_paths(path: Path) -> list[Path]:
    """Where the other expert of a pair lies: the same path with the other word in its name, its folder's or both.

    Of a file these are files, of a folder folders.
    """
    name, folder = _swapped(path.name), _swapped(path.parent.name)
    places = {path.parent / name, path.parent.parent / folder / path.name, path.parent.parent / folder / name}
    return sorted(place for place in places - {path} if place.exists() and place.is_dir() == path.is_dir())


def is_dit_folder(path: Path) -> bool:
    """Whether a path is a folder with the shards or blocks of one DiT, and not of a whole model."""
    marks = ("model_index.json", "transformer", "high_noise_model", "low_noise_model")
    if not path.is_dir() or any((path / mark).exists() for mark in marks) or any(path.glob("*.pth")):
        return False
    if comfy_root(path) in (path, path / "models"):
        return False
    files = [*path.glob("*.safetensors"), *path.glob("*.gguf")]
    is_split = any(path.glob("*.safetensors.index.json")) or any(file.name.startswith("block_") for file in files)
    # The root of the official 5B model has a config too, but is no expert by its name.
    is_free = expert_by_name(path) is not None or not (path / "config.json").exists()
    return is_free and (is_split or len(files) == 1)


def pair_key(path: Path) -> str:
    """What both files of a pair have in common: the path without its high and low."""
    return f"{_without_word(path.parent.name)}/{_without_word(path.name)}"


def comfy_root(path: Path) -> Path | None:
    """The ComfyUI `models/` folder that a path is, holds, or lies in."""
    for folder in (path, path / "models"):
        if any((folder / name).is_dir() for name in ("diffusion_models", "unet")):
            return folder
    inside = next((parent for parent in path.parents if parent.name in _DIT_FOLDERS), None)
    return inside.parent if inside is not None else None


def dit_files(root: Path) -> list[Path]:
    """Tensor files in a ComfyUI `models/` folder that may be diffusion transformers."""
    return sorted({file for name in ("diffusion_models", "unet") for file in _tensor_files(root / name, "wan")})


def vae_files(near: Path) -> list[Path]:
    """Files that are Wan VAEs by their names, near the file of a DiT."""
    return [
        file
        for folder, is_own in _places(near, _VAE_FOLDERS)
        for file in _tensor_files(folder, "wan", is_deep=is_own)
        if is_own or "vae" in file.name.lower()
    ]


def text_encoder_files(near: Path) -> list[Path]:
    """Files that are umT5 encoders by their names, near the file of a DiT."""
    return [file for folder, is_own in _places(near, _TEXT_FOLDERS) for file in _tensor_files(folder, "umt5", is_own)]


def tokenizer_files(near: list[Path]) -> list[Path]:
    """Vocabularies beside the given files, or where the official and Diffusers layouts have them."""
    folders = dict.fromkeys(folder for path in near for folder in (path.parent, path.parent.parent))
    return [folder / name for folder in folders for name in _TOKENIZERS if (folder / name).is_file()]


def _expert_word(name: str) -> re.Match[str] | None:
    for pattern in (_SURE, _LIKELY):
        found = list(pattern.finditer(name))
        if found:
            return found[0] if len({match[1].lower() for match in found}) == 1 else None
    return None


def _swapped(name: str) -> str:
    match = _expert_word(name)
    if match is None:
        return name
    word, other = match[1], _WORDS[match[1].lower()]
    other = other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other
    return name[: match.start()] + other + name[match.end() :]


def _without_word(name: str) -> str:
    match = _expert_word(name)
    return name.lower() if match is None else (name[: match.start()] + name[match.end() :]).lower()


def _places(near: Path, folders: tuple[str, ...]) -> Iterator[tuple[Path, bool]]:
    """Folders to look in, and whether each is for this kind of file alone."""
    root = comfy_root(near)
    if root is not None:
        yield from ((root / name, True) for name in folders)
    yield near.parent, False
    yield near.parent.parent, False


def _tensor_files(folder: Path, word: str, is_deep: bool = True) -> list[Path]:
    files = folder.rglob("*") if is_deep else folder.glob("*")
    return sorted(f for f in files if f.suffix in TENSOR_SUFFIXES and word in f.name.lower() and f.is_file())
