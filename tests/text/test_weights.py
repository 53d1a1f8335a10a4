import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from reference.text import SMALL, official_state, umt5_encoder
from torch import Tensor

from wanfast.checkpoint.bind import check_names
from wanfast.checkpoint.reader import memory_reader
from wanfast.config import UMT5_XXL
from wanfast.errors import CheckpointError
from wanfast.text.weights import TextOuterWeights, embed_tokens, expected_tensors, load_block, load_outer, text_config


@pytest.fixture
def state() -> dict[str, Tensor]:
    return official_state(umt5_encoder(SMALL))


def test_the_full_encoder_has_the_official_tensors() -> None:
    shapes = expected_tensors(UMT5_XXL)
    assert len(shapes) == 242
    assert sum(math.prod(shape) for shape in shapes.values()) == 5_680_910_336
    assert shapes["token_embedding.weight"] == (256_384, 4096)
    assert shapes["blocks.23.ffn.gate.0.weight"] == shapes["blocks.0.ffn.fc1.weight"] == (10_240, 4096)
    assert shapes["blocks.23.ffn.fc2.weight"] == (4096, 10_240)
    assert shapes["blocks.7.pos_embedding.embedding.weight"] == (32, 64)
    assert "blocks.24.norm1.weight" not in shapes


def test_expected_tensors_are_those_of_transformers(state: dict[str, Tensor]) -> None:
    assert expected_tensors(SMALL) == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_sizes_are_read_from_shapes(state: dict[str, Tensor]) -> None:
    config = text_config(memory_reader(state))
    assert config == SMALL
    check_names(memory_reader(state), expected_tensors(config), part="text encoder")
    assert text_config(memory_reader(state), max_distance=64, eps=1e-5).max_distance == 64


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("token_embedding.weight", None, "is missing"),
        ("blocks.0.attn.q.weight", None, "is missing"),
        ("blocks.0.pos_embedding.embedding.weight", None, "is missing"),
        ("token_embedding.weight", (99,), "has shape [99], expected two axes"),
        ("blocks.0.ffn.fc1.weight", (0, 48), "has shape [0, 48], expected two axes, none empty"),
        ("blocks.0.pos_embedding.embedding.weight", (32, 7), "has shape [32, 7], expected a multiple of 4 rows"),
        ("blocks.0.pos_embedding.embedding.weight", (31, 5), "has shape [31, 5], expected a multiple of 4 rows"),
    ],
)
def test_tensors_that_tell_no_size_are_refused_by_name(
    state: dict[str, Tensor], name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    del state[name]
    if shape is not None:
        state[name] = torch.ones(shape)
    with pytest.raises(CheckpointError, match=f"enc.pth: tensor {name} {re.escape(message)}"):
        text_config(memory_reader(state, "enc.pth"))


@pytest.mark.parametrize("name", [name for name in expected_tensors(SMALL) if name.startswith("blocks.1.")])
def test_a_block_refuses_missing_misshaped_and_infinite_tensors_by_name(state: dict[str, Tensor], name: str) -> None:
    original = state.pop(name)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} is missing"):
        load_block(memory_reader(state), SMALL, 1, torch.float32)
    state[name] = torch.ones([size + 1 for size in original.shape])
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} has shape"):
        load_block(memory_reader(state), SMALL, 1, torch.float32)
    state[name] = original.clone().index_fill_(0, torch.tensor([3]), math.nan)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load_block(memory_reader(state), SMALL, 1, torch.float32)


@pytest.mark.parametrize("name", ["token_embedding.weight", "norm.weight"])
def test_outer_weights_refuse_missing_and_misshaped_tensors_by_name(state: dict[str, Tensor], name: str) -> None:
    original = state.pop(name)
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_outer(memory_reader(state), SMALL, torch.float32)
    state[name] = torch.ones([size + 1 for size in original.shape])
    with pytest.raises(CheckpointError, match=name):
        load_outer(memory_reader(state), SMALL, torch.float32)
    state[name] = torch.ones(original.shape, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=name):
        load_outer(memory_reader(state), SMALL, torch.float32)


def test_the_token_table_is_not_cast(state: dict[str, Tensor]) -> None:
    table = state["token_embedding.weight"] = state["token_embedding.weight"].bfloat16()
    outer = load_outer(memory_reader(state), SMALL, torch.float32)
    assert outer.token_rows([7]).dtype == torch.bfloat16
    assert outer.norm.dtype == torch.float32
    rows = embed_tokens(torch.tensor([7, 0, 98, 7]), outer)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, table[[7, 0, 98, 7]].float())


def test_only_the_rows_that_are_used_are_read() -> None:
    endless = torch.ones(64, dtype=torch.bfloat16).expand(2**34, 64)  # 2 TB if anything copied it
    rows = partial(memory_reader({"table": endless}).load_rows, "table")
    outer = TextOuterWeights(token_rows=rows, norm=torch.ones(64), file=Path("enc.pth"))
    assert torch.equal(embed_tokens(torch.tensor([5, 2**34 - 1]), outer), torch.ones(2, 64))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_refused_when_it_is_used(state: dict[str, Tensor], bad: float) -> None:
    state["token_embedding.weight"][17, 5] = bad
    outer = load_outer(memory_reader(state, "enc.pth"), SMALL, torch.bfloat16)
    assert embed_tokens(torch.tensor([16, 18]), outer).isfinite().all()
    with pytest.raises(CheckpointError, match=r"enc\.pth: tensor token_embedding\.weight: row 17 is not finite"):
        embed_tokens(torch.tensor([16, 17, 18]), outer)
