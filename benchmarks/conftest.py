"""Benchmarks run on every core, with the machine and the versions written into each result."""

import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

torch.set_num_threads(os.cpu_count() or 1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread's clock tells all of its work, as long as there is no other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info |= {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        **{name: _version(name) for name in ("torch", "triton", "diffusers", "transformers")},
    }


def _version(name: str) -> str | None:
    """Of a distribution; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
