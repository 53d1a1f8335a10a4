"""The table of docs/memory.md is what the plan computes today."""

import re
from pathlib import Path

import pytest

from wanfast.budget import _decode_items, _step_items, make_budget
from wanfast.config import MODELS
from wanfast.dit.chunking import CHUNKINGS
from wanfast.model import vae_parameters
from wanfast.plan import make_plan
from wanfast.request import Request
from wanfast.weight_sizes import parse_stored, weight_sizes

PAGE = (Path(__file__).parents[1] / "docs" / "memory.md").read_text()
ROW = MODELS["t2v-A14B"]
STORED = {"int8": ("int8", "int8"), "exact, 8 bits": ("exact", "int8"), "exact, bf16": ("exact", "bf16")}


def computed(kind: str, width: int, height: int) -> list[float]:
    """GB of steps with an expert's blocks, with two slots, with two and cut finest; of decoding whole and in strips."""
    precision, stored = STORED[kind]
    request = Request("a cat", width=width, height=height, num_frames=81, seed=0)
    plan = make_plan(ROW, request, precision=precision, device="cuda", vae_parameters=vae_parameters(ROW.vae))  # type: ignore[arg-type]
    sizes = weight_sizes(ROW, precision, parse_stored(stored))  # type: ignore[arg-type]
    budget = make_budget(ROW, plan, sizes, vram=10**12)
    steps = next(stage for stage in budget.stages if stage.name.startswith("steps"))
    fixed = steps.total - budget.num_slots * sizes.slot
    finest = sum(_step_items(ROW, plan, CHUNKINGS[-1], sizes).values()) - sum(
        _step_items(ROW, plan, CHUNKINGS[0], sizes).values()
    )
    decodes = [sum(_decode_items(ROW, plan, sizes, n).values()) for n in (1, 8)]
    amounts = [fixed + 40 * sizes.slot, fixed + 2 * sizes.slot, fixed + 2 * sizes.slot + finest, *decodes]
    return [round(amount / 1e9, 1) for amount in amounts]


@pytest.mark.parametrize("size", [(1280, 720), (832, 480)], ids=str)
@pytest.mark.parametrize("kind", STORED)
def test_a_row_is_what_is_computed(kind: str, size: tuple[int, int]) -> None:
    (row,) = re.findall(rf"^\| {kind} \| {size[0]}x{size[1]} \|(.*)\|$", PAGE, re.MULTILINE)
    assert [float(cell) for cell in row.split("|")] == computed(kind, *size)


def test_what_decodes_beside_blocks_is_what_is_computed() -> None:
    for size in ((1280, 720), (832, 480)):
        _, _, _, decode, _ = computed("int8", *size)
        assert f"+ {decode} GB at {size[0]}x{size[1]}" in PAGE
