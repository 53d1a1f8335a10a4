"""wan-tiny: the models in the box, trained to show coloured shapes that move.

They are checkpoints in the layouts of the published ones (two experts, VAE, umT5, tokenizer), so they run through
exactly the code that the 14B models run through. wan_tiny/README.md says what they can do and what they cannot,
examples/wan_tiny how they were made.
"""

from pathlib import Path

from wanfast.errors import CheckpointError

NAME = "wan-tiny"
IMAGE_NAME = "wan-tiny-i2v"

_TEXT = {"text_encoder": "t2v/models_t5_umt5-xxl-enc-bf16.pth", "tokenizer": "t2v/google/umt5-xxl"}
_FILES = {
    NAME: {"model": "t2v"},
    IMAGE_NAME: {"model": "i2v", "vae": "t2v/Wan2.1_VAE.pth", **_TEXT},
    "wan-tiny-ti2v": {"model": "ti2v", **_TEXT},
}


def tiny_files(name: object) -> dict[str, Path] | None:
    """Say where the files of a built-in model are.

    Args:
        name: of a model, built in or not, in any case; a `Path` is none.

    Returns:
        Folders and files in the package, by names of `Sources`; None where the name is of no built-in model.

    Raises:
        CheckpointError: it was not installed.
    """
    if not isinstance(name, str) or name.lower() not in _FILES:
        return None
    name = name.lower()
    root = Path(__file__).parent / "wan_tiny"
    files = {kind: root / path for kind, path in _FILES[name].items()}
    if not (files["model"] / "wanfast.json").is_file():
        raise CheckpointError(f"{files['model']}: {name} is not there; install wanfast again, or name another model")
    return files


def tiny_folder() -> Path:
    """Say where wan-tiny is, a folder of the package.

    Raises:
        CheckpointError: it was not installed.
    """
    files = tiny_files(NAME)
    assert files is not None
    return files["model"]
