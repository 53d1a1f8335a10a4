"""Importing the kernels: under which name, and on a machine that has no Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wanfast.kernels._launch import runs_triton

ROOT = Path(__file__).parents[2]

# Stands for a machine without Triton, and without the rest of wanfast, which kernels must not need.
WITHOUT_TRITON = """
import importlib.util, sys
sys.modules["triton"] = None
spec = importlib.util.spec_from_file_location(
    "wanfast.kernels", "kernels/__init__.py", submodule_search_locations=["kernels"]
)
sys.modules["wanfast.kernels"] = kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
import torch
ones = torch.ones(1, 2, 4)
print(kernels.rms_norm(ones, torch.ones(4), eps=0.0).sum().item())
print(kernels.layer_norm(ones, torch.ones(4), torch.ones(4), eps=1.0).sum().item())
print(kernels.layer_norm_modulate(ones, ones[:, :1], ones[:, :1], eps=1.0).sum().item())
print(kernels.gated_residual(ones, ones, ones).sum().item())
"""


def _python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


# transformers imports a package called `kernels` to ask its version; in the repository root that is this folder.
UNDER_ANOTHER_NAME = """
import sys, kernels
print(getattr(kernels, "__version__", "none"), kernels.__file__ is not None, "torch" in sys.modules)
kernels.rms_norm
"""


def test_under_another_name_the_package_is_empty_and_says_so():
    result = _python(UNDER_ANOTHER_NAME)
    assert result.stdout.split() == ["none", "True", "False"]
    assert "AttributeError: rms_norm: this package is wanfast.kernels; import it by that name" in result.stderr


def test_the_references_work_without_triton_and_without_the_engine():
    result = _python(WITHOUT_TRITON)
    assert result.stdout.split() == ["8.0", "8.0", "8.0", "16.0"], result.stderr


def test_cpu_tensors_run_the_reference():
    assert not runs_triton(torch.zeros(1))


@pytest.mark.gpu
def test_cuda_tensors_run_triton():
    assert runs_triton(torch.zeros(1, device="cuda"))
