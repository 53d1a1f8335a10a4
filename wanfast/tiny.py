"""wan-tiny: the model in the box, trained to show coloured shapes that move.

It is a complete checkpoint in the layout of Wan-AI/Wan2.2-T2V-A14B (two experts, VAE, umT5, tokenizer), so it runs
through exactly the code that the 14B models run through. wan_tiny/README.md says what it can do and what it cannot,
examples/wan_tiny how it was made.
"""

from pathlib import Path

from wanfast.errors import CheckpointError

NAME = "wan-tiny"


def tiny_folder() -> Path:
    """Say where the built-in checkpoint is, a folder of the package.

    Raises:
        CheckpointError: it was not installed.
    """
    folder = Path(__file__).parent / "wan_tiny" / "t2v"
    if not (folder / "wanfast.json").is_file():
        raise CheckpointError(f"{folder}: {NAME} is not there; install wanfast again, or name a model")
    return folder
