"""Benchmarks run on every core, with the machine and the versions written into each result."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

torch.set_num_threads(os.cpu_count() or 1)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    import diffusers
    import transformers
    import triton

    machine_info.pop("node", None)
    machine_info |= {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
