"""Files between processes: held by one at a time, and never put in another's place."""

import os
import sys
from pathlib import Path
from typing import IO


def lock_file(file: IO[bytes]) -> bool:
    """Hold a file until it is closed or the process ends, however it ends.

    Args:
        file: open for writing.

    Returns:
        Whether it is held now; False where another process holds it.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 30)  # past what anybody reads: on Windows a held byte cannot be read by others
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def place_file(part: Path, target: Path, *, overwrite: bool) -> Path:
    """Give a whole file its name, or where that is taken and must not be, the next free one like it.

    Args:
        part: the file, in the target's folder.
        target: its name.
        overwrite: whether a file of that name is replaced.

    Returns:
        The name it has now.

    Raises:
        OSError: the folder cannot be written to.
    """
    if overwrite:
        os.replace(part, target)
        return target
    for number in ("", *(f"-{n}" for n in range(2, 10_000))):
        name = target.with_stem(f"{target.stem}{number}")
        try:
            os.link(part, name)  # which, unlike a rename, never takes a name from a file
        except FileExistsError:
            continue
        except OSError:  # a file system without links
            if name.exists():
                continue
            os.replace(part, name)
            return name
        part.unlink()
        return name
    raise FileExistsError(f"{target}: 10,000 files have its name")
