"""Which bytes of which file a tensor is a mapping of, where somebody else mapped it.

Such a tensor costs no memory, and can be read from its file instead: a read that fails is an error with a name, where a
mapped page that cannot be read kills the process.
Source: man7.org, proc_pid_maps(5).
"""

import os
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True, slots=True)
class FileRange:
    """Some bytes of a file."""

    path: Path
    inode: tuple[int, int]  # device, number
    offset: int


class MappedFiles:
    """The files this process has mapped; empty where the system does not tell."""

    def __init__(self, maps: Path = Path("/proc/self/maps")) -> None:
        """Read them; what is mapped later is not known."""
        self._starts: list[int] = []
        self._maps: list[tuple[int, int, str, tuple[int, int]]] = []
        try:
            lines = maps.read_text(errors="surrogateescape").splitlines()
        except OSError:
            return
        for line in lines:
            addresses, _, offset, device, inode, *path = line.split(maxsplit=5)
            if not path or not path[0].startswith("/"):
                continue
            start, end = (int(address, 16) for address in addresses.split("-"))
            major, minor = (int(number, 16) for number in device.split(":"))
            self._starts.append(start)
            self._maps.append((end, int(offset, 16), path[0], (os.makedev(major, minor), int(inode))))

    def find(self, data: Tensor) -> FileRange | None:
        """Find the file a contiguous tensor is a mapping of; None if it is memory of its own."""
        address = data.data_ptr()
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        end, offset, path, inode = self._maps[index]
        if address + data.nbytes > end:
            return None
        return FileRange(Path(path), inode, offset + address - self._starts[index])
