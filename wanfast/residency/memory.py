"""Amounts of memory: as text, of weights, and what is free on a device and in the host."""

import ctypes
import dataclasses
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from wanfast.errors import RequestError

Block = TypeVar("Block")

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_WRITTEN = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}


def parse_bytes(argument: str, text: str | int) -> int:
    """Read an amount of memory such as "24GB", "16GiB" or a plain number of bytes.

    Args:
        argument: name of the argument, for the error message.
        text: digits with an optional unit B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024).

    Returns:
        Bytes, > 0.

    Raises:
        RequestError: not an amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(text), flags=re.IGNORECASE)
    known = match is not None and match[2].upper() in _UNITS and len(match[1]) < 30
    amount = round(float(match[1]) * _UNITS[match[2].upper()]) if match is not None and known else 0
    if amount <= 0:
        raise RequestError(f"{argument}: must be an amount of memory, got {text!r}; for example 24GB or 16GiB")
    return amount


def gigabytes(size: int) -> str:
    """Write an amount of memory as people read it: gigabytes for all that is of weight beside a model."""
    if size < 1000:
        return f"{size} bytes"
    for limit, unit in ((10**6, "kB"), (10**7, "MB"), (10**12, "GB"), (10**15, "TB")):
        if size < limit:
            return f"{size / _WRITTEN[unit]:.2f} {unit}"
    return f"{size / _WRITTEN['PB']:,.2f} PB"


def map_tensors(weights: Block, change: Callable[[Tensor], Tensor]) -> Block:
    """Apply `change` to every tensor of a (nested) dataclass of weights and return the changed copy."""
    return map_leaves(weights, Tensor, lambda _, tensor: change(tensor))  # type: ignore[no-any-return]


def map_leaves(value: Any, kind: type[Any], change: Callable[[str, Any], Any], name: str = "") -> Any:
    """Replace everything of one kind in a (nested) dataclass or tuple.

    Args:
        value: dataclass, tuple or leaf.
        kind: of the leaves that change; all others stay.
        change: gets a leaf's name, "self_attn.q.weight", and the leaf.
        name: of `value` itself.
    """
    if isinstance(value, kind):
        return change(name, value)
    if isinstance(value, tuple):
        return tuple(map_leaves(item, kind, change, f"{name}.{i}") for i, item in enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        below = f"{name}." if name else ""
        return dataclasses.replace(
            value, **{field: map_leaves(item, kind, change, below + field) for field, item in fields.items()}
        )
    return value


def weight_bytes(weights: object) -> int:
    """Bytes of all tensors of a (nested) dataclass of weights."""
    return sum(tensor.nbytes for _, tensor in named_tensors(weights))


def named_tensors(weights: object) -> list[tuple[str, Tensor]]:
    """All tensors of a (nested) dataclass of weights and their names, such as "self_attn.q.weight", in order."""
    found: list[tuple[str, Tensor]] = []

    def take(name: str, tensor: Tensor) -> Tensor:
        found.append((name, tensor))
        return tensor

    map_leaves(weights, Tensor, take)
    return found


def to_device(weights: Block, device: torch.device) -> Block:
    """Copy a dataclass of weights to `device`; tensors already there are shared, not copied."""
    return map_tensors(weights, lambda tensor: tensor.to(device, non_blocking=True))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on `device`: free VRAM, or free memory of the host."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return free_host_memory()


def free_host_memory(root: Path = Path("/")) -> int:
    """Bytes this process can still take: what the kernel calls available, less where a container allows less.

    Args:
        root: where /proc and /sys are.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: the system does not tell
        return sys.maxsize
    return min([free, *_cgroup_rooms(root)])


def give_back_freed() -> None:
    """Give the system what was freed and the C library holds for its next use.

    glibc does so with tensors of less than 32 MiB, for each thread by itself: blocks that come and go, loaded by one
    thread and let go by another, would take several times what they have. Source: man7.org, mallopt(3), malloc_trim(3).
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # which other C libraries lack


# Of a cgroup of version 2 and 1: limit, usage, and the line of memory.stat with pages that can be dropped.
_CGROUP_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _cgroup_rooms(root: Path) -> list[int]:
    """What is left in every control group this process is in that has a limit.

    Source: kernel.org, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    rooms: list[int] = []
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return rooms
    for membership in memberships:
        number, controllers, path = membership.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        version = 2 if number == "0" else 1
        top = root / "sys/fs/cgroup" if version == 2 else root / "sys/fs/cgroup/memory"
        # In a container the group's own folder is the top; elsewhere a group above may have the limit.
        folder = top / path.strip("/")
        for group in [folder, *folder.parents]:
            rooms += _cgroup_room(group, *_CGROUP_FILES[version])
            if group == top:
                break
    return rooms


def _cgroup_room(group: Path, limit_file: str, usage_file: str, droppable: str) -> list[int]:
    try:
        limit, usage = ((group / file).read_text().strip() for file in (limit_file, usage_file))
        lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return [] if limit == "max" else [max(0, int(limit) - int(usage) + int(lines.get(droppable, 0)))]
    except (OSError, ValueError):
        return []
