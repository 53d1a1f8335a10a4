"""LoRA beside weights in every stored form: the base stays as stored, and the sum is that of the expanded base."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf
import pytest
import torch
from reference import loras
from reference.dit import golden_state, small_config
from safetensors.torch import save_file
from tolerance import assert_close
from torch import Tensor

from wanfast.adapter import attach, make_adapter
from wanfast.checkpoint.files import TensorRef, dtype_name
from wanfast.checkpoint.reader import Reader
from wanfast.config import MODELS
from wanfast.dit.model import predict_velocities
from wanfast.dit.weights import load_block, load_outer
from wanfast.linear import expand, linear
from wanfast.lora import LoraSpec, open_lora
from wanfast.residency import map_tensors, to_device
from wanfast.stored import GGUFWeight, ScaledWeight, Weight

CONFIG = small_config("t2v", dim=64, ffn_dim=128, text_dim=32)
MODEL = MODELS["t2v-A14B"]


def _scaled(weight: Tensor, *, dtype: torch.dtype, rows: bool) -> Weight:
    limit = 127.0 if dtype == torch.int8 else 448.0
    scale = (weight.abs().amax(1, keepdim=True) if rows else weight.abs().max()) / limit
    values = weight / scale
    return ScaledWeight((values.round() if dtype == torch.int8 else values).to(dtype), scale, torch.float32)


def _gguf(weight: Tensor, *, kind: str) -> Weight:
    blocks = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    return GGUFWeight(torch.from_numpy(blocks), kind, weight.shape[1], torch.float32)


FORMS: dict[str, Callable[[Tensor], Weight]] = {
    "plain": lambda weight: weight,
    "fp8 with one scale": partial(_scaled, dtype=torch.float8_e4m3fn, rows=False),
    "int8 with a scale per row": partial(_scaled, dtype=torch.int8, rows=True),
    "Q8_0": partial(_gguf, kind="Q8_0"),
    "Q4_0": partial(_gguf, kind="Q4_0"),
}


def reader_of(weights: Mapping[str, Weight]) -> Reader:
    file = Path("memory")
    refs = {
        name: TensorRef(
            file, name, tuple(weight.shape), dtype_name(weight.dtype), partial(lambda kept, _: kept, weight), bytes
        )
        for name, weight in weights.items()
    }
    return Reader(refs, file)


def stored(form: str) -> dict[str, Weight]:
    """The model's weights with every layer of the blocks in a stored form."""
    layers = loras.linear_layers(CONFIG)
    return {
        name: FORMS[form](tensor) if name.removesuffix(".weight") in layers else tensor
        for name, tensor in golden_state(CONFIG).items()
    }


def velocities(reader: Reader, *paths: Path) -> Tensor:
    model = replace(MODEL, dit=CONFIG)
    opened = [open_lora(LoraSpec(path, 0.6), model) for path in paths]
    adapter = make_adapter(opened, "high_noise", CONFIG, torch.float32, torch.device("cpu"))
    blocks = [load_block(reader, CONFIG, index, torch.float32) for index in range(CONFIG.num_layers)]
    kept = [(block.ffn_up.weight, expand(block.ffn_up.weight).clone()) for block in blocks]
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 16, 2, 8, 8, generator=generator)
    context = torch.randn(1, 5, CONFIG.text_dim, generator=generator)
    outer = attach(load_outer(reader, CONFIG, torch.float32), adapter.outer)
    attached = [attach(block, changes) for block, changes in zip(blocks, adapter.blocks, strict=True)]
    for changed, block in zip(attached, blocks, strict=True):
        assert changed.self_attn.q.weight is block.self_attn.q.weight, "the base must stay as it is stored"
    velocity = predict_velocities(latents, 700.0, [context], outer, iter(attached), CONFIG)[0]
    assert all(torch.equal(expand(weight), before) for weight, before in kept)
    return velocity


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    factors = loras.random_factors(loras.linear_layers(CONFIG, blocks_only=False))
    return loras.write_lora(tmp_path / "a.safetensors", factors, alpha=2.0)


@pytest.mark.parametrize("form", list(FORMS))
def test_lora_on_a_stored_base_equals_lora_on_the_expanded_one(form: str, lora: Path) -> None:
    weights = stored(form)
    plain = {name: expand(weight) for name, weight in weights.items()}
    factors = loras.random_factors(loras.linear_layers(CONFIG, blocks_only=False))
    got = velocities(reader_of(weights), lora)
    assert_close(got=got, want=velocities(reader_of(plain), lora), op="dit_fp32")
    assert_close(got=got, want=velocities(reader_of(loras.merged(plain, factors, 0.3))), op="dit_fp32")
    without = velocities(reader_of(weights))
    assert (got - without).abs().max() > 0.01 * got.abs().max()


@pytest.mark.parametrize("form", list(FORMS))
def test_differences_on_a_stored_base(form: str, tmp_path: Path) -> None:
    weights = stored(form)
    name = "blocks.1.ffn.0"
    more = {
        "weight": 0.1 * torch.randn(128, 64, generator=torch.Generator().manual_seed(4)),
        "bias": 0.1 * torch.randn(128, generator=torch.Generator().manual_seed(5)),
    }
    path = tmp_path / "d.safetensors"
    save_file({f"{name}.diff": more["weight"], f"{name}.diff_b": more["bias"]}, path)
    changed = {key: expand(weight) for key, weight in weights.items()}
    for part, difference in more.items():
        changed[f"{name}.{part}"] = changed[f"{name}.{part}"] + 0.6 * difference
    got = velocities(reader_of(weights), path)
    assert_close(got=got, want=velocities(reader_of(changed)), op="dit_fp32")
    assert (got - velocities(reader_of(weights))).abs().max() > 1e-3 * got.abs().max()


def test_terms_have_the_dtype_their_layer_computes_in(lora: Path) -> None:
    opened = open_lora(LoraSpec(lora), replace(MODEL, dit=CONFIG))
    adapter = make_adapter([opened, opened], "low_noise", CONFIG, torch.bfloat16, torch.device("cpu"))
    assert {term.up.dtype for change in adapter.blocks[0].values() for term in change.low_rank} == {torch.bfloat16}
    dtypes = {field: change.low_rank[0].down.dtype for field, change in adapter.outer.items()}
    outer = load_outer(reader_of(stored("plain")), CONFIG, torch.bfloat16)
    assert dtypes == {field: getattr(outer, field).weight.dtype for field in dtypes}
    assert all(len(change.low_rank) == 2 for change in adapter.outer.values())


def test_terms_go_to_the_device(lora: Path) -> None:
    """On the meta device, which every machine has: an operation between two devices would fail."""
    meta = torch.device("meta")
    more = {
        "head.head.diff": torch.ones(64, 64),
        "blocks.0.norm3.diff": torch.ones(64),
        "blocks.0.diff_m": torch.ones(1, 6, 64),
    }
    loras.write_lora(lora, loras.random_factors(loras.linear_layers(CONFIG, blocks_only=False)), more=more)
    opened = open_lora(LoraSpec(lora), replace(MODEL, dit=CONFIG))
    adapter = make_adapter([opened], "low_noise", CONFIG, torch.bfloat16, meta)
    reader = reader_of(stored("plain"))
    block = attach(to_device(load_block(reader, CONFIG, 0, torch.bfloat16), meta), adapter.blocks[0])
    outer = attach(to_device(load_outer(reader, CONFIG, torch.bfloat16), meta), adapter.outer)
    seen: list[torch.device] = []
    for weights in (block, outer):
        map_tensors(weights, lambda tensor: seen.append(tensor.device) or tensor)
    assert set(seen) == {meta}
    assert outer.head.weight.dtype == torch.float32
    assert linear(torch.zeros(1, 64, device=meta), block.self_attn.q).dtype == torch.bfloat16
