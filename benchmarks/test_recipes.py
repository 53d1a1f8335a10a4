"""The recipes that the computed speeds were calibrated with, measured: on an RTX 4090, beside what was computed.

On other GPUs their speed says how the tiles compare; with DISABLE_MMA_V3=1 Triton gives Hopper the instructions of Ada.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from gpu_timing import calls_of, run_calls
from published import PUBLISHED, Published
from pytest_benchmark.fixture import BenchmarkFixture
from recipe_runs import prepare

COMPUTED = json.loads((Path(__file__).parent / "computed.json").read_text())["published"]
TOKENS, HEADS, SIDE = 16_384, 32, 8192
AS_ON_ADA = os.environ.get("DISABLE_MMA_V3", "0") == "1"


def _name(figure: Published) -> str:
    return figure.case.kernel.replace(" ", "-") + ("-as-on-ada" if AS_ON_ADA else "")


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; tests/test_recipes.py checks the results"
)
@pytest.mark.parametrize("figure", PUBLISHED, ids=_name)
@torch.inference_mode()
def test_recipe(benchmark: BenchmarkFixture, figure: Published) -> None:
    device = torch.device("cuda")
    if AS_ON_ADA and torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("only Hopper has instructions of its own that this leaves out")
    size = SIDE if figure.case.kernel.startswith("matmul") else TOKENS
    run = prepare(figure.case, device, tokens=size, heads=HEADS)
    calls = calls_of(run.launch, device)
    benchmark.pedantic(run_calls, args=(run.launch, calls, device), rounds=7)
    tflops = run.operations * calls / benchmark.stats.stats.median / 1e12
    benchmark.extra_info |= {"calls_per_round": calls, "tflops": round(tflops, 1)}
    if figure.gpu in torch.cuda.get_device_name():
        computed = next(row["computed"] for row in COMPUTED if row["name"] == figure.case.kernel)
        benchmark.extra_info |= {"computed_tflops": computed, "measured_over_computed": round(tflops / computed, 3)}
