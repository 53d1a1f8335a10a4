"""Triton itself, and where it runs."""

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # Triton has no build for macOS: the references serve there, and kernels stay undecorated

    def _leave_uncompiled(kernel: Any = None, **_options: Any) -> Any:
        return _leave_uncompiled if kernel is None else kernel

    triton = SimpleNamespace(jit=_leave_uncompiled)
    tl = SimpleNamespace(constexpr=lambda value: value)
    HAS_TRITON = False
else:
    HAS_TRITON = True

__all__ = ["HAS_TRITON", "on_device_of", "runs_triton", "tl", "triton"]


def runs_triton(x: Tensor) -> bool:
    """Whether operations on `x` launch a Triton kernel; otherwise they run their torch reference."""
    return HAS_TRITON and x.is_cuda


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make x's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
