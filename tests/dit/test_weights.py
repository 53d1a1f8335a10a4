"""Sizes from shapes, the full list of tensors, and refusal by name."""

import math
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from reference.dit import diffusers_dit, golden_state, official_state, small_config
from torch import Tensor

from wanfast.checkpoint.bind import check_names
from wanfast.checkpoint.reader import memory_reader
from wanfast.config import MODELS
from wanfast.dit.weights import BlockWeights, OuterWeights, dit_config, expected_tensors, load_block, load_outer
from wanfast.errors import CheckpointError

STATE = golden_state(small_config("i2v"))


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [
        ("t2v-A14B", 1095, 14_288_491_584),
        ("i2v-A14B", 1095, 14_288_901_184),
        ("ti2v-5B", 825, 4_999_787_712),
    ],
)
def test_expected_tensors_count_those_of_the_published_checkpoints(model: str, tensors: int, parameters: int) -> None:
    expected = expected_tensors(MODELS[model].dit)
    assert len(expected) == tensors
    assert sum(math.prod(shape) for shape in expected.values()) == parameters


@pytest.mark.parametrize("model", MODELS)
def test_dit_config_reads_every_size_of_the_published_models_from_shapes(model: str) -> None:
    want = MODELS[model].dit
    shapes = {name: torch.empty(shape, device="meta") for name, shape in expected_tensors(want).items()}
    assert dit_config(memory_reader(shapes)) == want


def test_dit_config_takes_the_heads_of_a_small_model() -> None:
    assert dit_config(memory_reader(STATE), num_heads=2, text_len=16) == small_config("i2v")


@pytest.mark.parametrize("task", ["t2v", "i2v", "ti2v"])
def test_expected_tensors_are_those_of_diffusers(task: str) -> None:
    config = small_config(task)
    state = official_state(diffusers_dit(config))
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected_tensors(config)


def _without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in STATE.items() if key != name}


@pytest.mark.parametrize(
    "name",
    [
        "patch_embedding.weight",
        "text_embedding.0.weight",
        "time_embedding.0.weight",
        "head.head.weight",
        "blocks.0.ffn.0.weight",
    ],
)
def test_dit_config_names_a_tensor_it_misses(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"memory: tensor {name} is missing"):
        dit_config(memory_reader(_without(name)), num_heads=2)


def test_dit_config_names_a_tensor_with_other_axes() -> None:
    state = STATE | {"patch_embedding.weight": STATE["patch_embedding.weight"].flatten(1)}
    with pytest.raises(CheckpointError, match=r"patch_embedding.weight must have 5 axes, got shape \(48, 144\)"):
        dit_config(memory_reader(state), num_heads=2)


@pytest.mark.parametrize(
    ("num_heads", "message"),
    [
        (None, "48 output channels, which heads of 128"),
        (5, "num_heads = 5"),
        (16, "num_heads = 16"),
        (0, "num_heads = 0"),
    ],
)
def test_dit_config_refuses_heads_that_do_not_split_the_width(num_heads: int | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        dit_config(memory_reader(STATE), num_heads=num_heads)


def test_a_missing_block_is_named() -> None:
    state = {name: tensor for name, tensor in STATE.items() if not name.startswith("blocks.0.") or "ffn" in name}
    reader = memory_reader(state)
    config = dit_config(reader, num_heads=2)
    with pytest.raises(CheckpointError, match=r"23 missing \(blocks\.0\."):
        check_names(reader, expected_tensors(config), part="DiT")


@pytest.mark.parametrize("name", sorted(name for name in STATE if not name.startswith("blocks.1.")))
@pytest.mark.parametrize("fault", ["missing", "mis-shaped", "not finite"])
def test_every_tensor_is_checked_by_name(name: str, fault: str) -> None:
    state = dict(STATE)
    if fault == "missing":
        del state[name]
    elif fault == "mis-shaped":
        state[name] = torch.cat([state[name], state[name]], dim=-1)
    else:
        state[name] = torch.full_like(state[name], torch.nan)
    reader, config = memory_reader(state), small_config("i2v")
    with pytest.raises(CheckpointError) as raised:
        load_outer(reader, config, torch.bfloat16)
        load_block(reader, config, 0, torch.bfloat16)
    assert name in str(raised.value)


def _tensors(weights: Any, path: str = "") -> dict[str, Tensor]:
    if not is_dataclass(weights):
        return {path.strip("."): weights} if isinstance(weights, Tensor) else {}
    return {
        name: tensor
        for field in fields(weights)
        for name, tensor in _tensors(getattr(weights, field.name), f"{path}.{field.name}").items()
    }


def _dtypes(weights: BlockWeights | OuterWeights) -> dict[torch.dtype, set[str]]:
    by_dtype: dict[torch.dtype, set[str]] = {}
    for name, tensor in _tensors(weights).items():
        by_dtype.setdefault(tensor.dtype, set()).add(name.removesuffix(".weight").removesuffix(".bias"))
    return by_dtype


def test_projections_are_cast_and_everything_else_is_fp32() -> None:
    reader, config = memory_reader({name: tensor.double() for name, tensor in STATE.items()}), small_config("i2v")
    attention = {f"{name}_attn.{letter}" for name in ("self", "cross") for letter in "qkvo"}
    norms = {f"{name}_attn.norm_{letter}" for name in ("self", "cross") for letter in "qk"}
    assert _dtypes(load_block(reader, config, 1, torch.bfloat16)) == {
        torch.bfloat16: attention | {"ffn_up", "ffn_down"},
        torch.float32: norms | {"modulation", "norm3_weight", "norm3_bias"},
    }
    assert _dtypes(load_outer(reader, config, torch.bfloat16)) == {
        torch.bfloat16: {"patch_embedding", "text_in", "text_out"},
        torch.float32: {"time_in", "time_out", "time_projection", "head_modulation", "head"},
    }
    assert set(_dtypes(load_block(reader, config, 1, torch.float32))) == {torch.float32}
    assert set(_dtypes(load_outer(reader, config, torch.float32))) == {torch.float32}
