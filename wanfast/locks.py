"""Files that one process holds at a time."""

import sys
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
