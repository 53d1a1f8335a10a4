"""Memory that ran out, whoever says so: torch, CUDA and its libraries, Triton, numpy or Python itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from wanfast.errors import MemoryBudgetError

Result = TypeVar("Result")

# What has no type of its own: torch's CPU allocator, CUDA itself, its libraries, Triton.
_SAID = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """What an attempt came to that memory did not suffice for."""

    reason: str  # a line


def attempt(work: Callable[[], Result]) -> Result | OutOfMemory:
    """Do work that memory may not suffice for.

    Returns:
        What it returns, or that memory ran out. What it had allocated is free by then: an error that is being handled,
        or kept, keeps all that was alive where it was raised.

    Raises:
        MemoryBudgetError: the work's own, which has its numbers already; likewise every other error.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return OutOfMemory(next(iter(str(error).splitlines()), "") or type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; one that refuses with numbers does not."""
    if isinstance(error, MemoryBudgetError):
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)
