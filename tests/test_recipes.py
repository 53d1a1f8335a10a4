"""The recipes that speeds are calibrated with are what they are called: attention and a product."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from published import PUBLISHED
from recipe_runs import prepare
from recipes import tutorial_attention


@pytest.mark.parametrize("figure", PUBLISHED, ids=lambda figure: figure.case.kernel)
def test_a_recipe_computes_what_it_should(figure, device):
    size = 128 if figure.case.kernel.startswith("matmul") else 256
    run = prepare(figure.case, device, tokens=size, heads=2)
    got, want = run.launch().double(), run.reference()
    assert torch.isfinite(got).all()
    values = figure.case.arguments.get("v_ptr", "fp16")
    most = 0.06 if values == "fp8e4nv" else 0.02  # roundings to 3 or 10 bits, and int8 logits
    assert torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want) < most


def test_the_tutorials_attention(device):
    q, k, v = (torch.randn(2, 128, 64, device=device, dtype=torch.float16) for _ in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(tutorial_attention(q, k, v).float(), want, atol=2e-3, rtol=2e-3)
