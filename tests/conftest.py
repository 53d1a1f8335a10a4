"""Where there is no GPU, kernels run in Triton's interpreter, on CPU tensors: the same tests hold the same code."""

import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    # Triton settles its mode when it is imported and when a kernel is decorated: a later switch is half a switch.
    if "triton" in sys.modules:
        raise pytest.UsageError("triton was imported before tests/conftest.py could choose its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.install()

torch.set_num_threads(1)  # test tensors are small: more threads would only wait for each other


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernel tests put their tensors."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Set how many threads torch has; afterwards it has as many as before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
