"""Where weights are: blocks kept on the device as far as a budget allows, the rest brought there for each use.

A model asks for its blocks in order and never knows where they came from: offloading lives behind `Residency.blocks`.
"""

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from wanfast.config import ExpertName
from wanfast.errors import RequestError

Block = TypeVar("Block")

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


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
    amount = round(float(match[1]) * _UNITS[match[2].upper()]) if match and match[2].upper() in _UNITS else 0
    if amount <= 0:
        raise RequestError(f"{argument}: must be an amount of memory, got {text!r}; for example 24GB or 16GiB")
    return amount


def map_tensors(weights: Block, change: Callable[[Tensor], Tensor]) -> Block:
    """Apply `change` to every tensor of a (nested) dataclass of weights and return the changed copy."""
    return _map(weights, change)  # type: ignore[no-any-return]


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{field.name: _map(getattr(value, field.name), change) for field in dataclasses.fields(value)}
        )
    return value


def weight_bytes(weights: object) -> int:
    """Bytes of all tensors of a (nested) dataclass of weights."""
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    _map(weights, count)
    return total


def to_device(weights: Block, device: torch.device) -> Block:
    """Copy a dataclass of weights to `device`; tensors already there are shared, not copied."""
    return map_tensors(weights, lambda tensor: tensor.to(device, non_blocking=True))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on `device`: free VRAM, or the host memory the kernel calls available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: the system pages weights out by itself, they are mapped files
        return sys.maxsize


class Residency(Generic[Block]):
    """The blocks of a model's experts on one device.

    One expert at a time lives on the device: as many of its first blocks as fit the budget stay there between passes,
    the others are loaded anew in each pass. Asking for another expert first lets the current one go.
    """

    def __init__(
        self, load: Callable[[ExpertName, int], Block], num_blocks: int, device: torch.device, budget: int | None = None
    ) -> None:
        """Nothing is loaded yet.

        Args:
            load: gives block `index` of expert `name` on the host, in the dtype it computes in.
            num_blocks: of each expert.
            device: where blocks are used.
            budget: bytes of the device that blocks may keep; None is what is free, less a fifth for activations.
        """
        self._load = load
        self._num_blocks = num_blocks
        self._device = device
        self._budget = budget
        self._expert: ExpertName | None = None
        self._kept: list[Block] = []
        self._room = 0

    def blocks(self, expert: ExpertName) -> Iterator[Block]:
        """Yield the expert's blocks in order, each on the device while it is used."""
        if expert != self._expert:
            self.release()
            self._expert = expert
            self._room = self._budget if self._budget is not None else free_memory(self._device) * 4 // 5
        for index in range(self._num_blocks):
            if index < len(self._kept):
                yield self._kept[index]
                continue
            block = to_device(self._load(expert, index), self._device)
            # Blocks are kept in order without gaps, so the index is all there is to look up.
            if index == len(self._kept) and (size := weight_bytes(block)) <= self._room:
                self._kept.append(block)
                self._room -= size
            yield block

    def release(self) -> None:
        """Let every block go; their memory is free for whatever comes next."""
        self._kept = []
        self._expert = None
