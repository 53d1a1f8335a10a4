"""Whether files that weights are used from are still what they were when they were opened."""

from collections.abc import Iterable
from pathlib import Path

from wanfast.checkpoint.reader import Reader
from wanfast.errors import CheckpointError

FileStates = dict[Path, tuple[int, ...]]  # device, inode, bytes, nanoseconds of the last write


def file_states(readers: Iterable[Reader]) -> FileStates:
    """Note which files tensors are in, and what these are like now; what is not in a file is left out."""
    paths = {reader.ref(name).file for reader in readers for name in reader.names()}
    return {path: state for path in sorted(paths) if (state := _state(path)) is not None}


def refuse_written(states: FileStates) -> None:
    """Refuse files that were written to since, or have others in their places, which tensors would be read from next.

    One that is gone is not: who has it open still reads the old bytes, and who has not is told that it is missing.

    Raises:
        CheckpointError: a file is not what it was; the message names it.
    """
    for path, before in states.items():
        if _state(path) not in (before, None):
            raise CheckpointError(f"{path}: cannot be trusted; it was written to while in use; load the model again")


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
