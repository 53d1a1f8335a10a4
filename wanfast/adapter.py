"""What LoRA files add to an expert's layers, beside weights that stay as they are.

A product `up @ down` is a low-rank term of its layer, whatever form the weight is stored in. Where it is to be merged,
and for a difference of a whole tensor (a norm, a bias, a modulation, rarely a weight), it is added in fp32 to a copy of
the weight that lives as long as its use and is rounded once.
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models":
W' = W + strength * alpha / rank * up @ down.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from wanfast.checkpoint.bind import read_tensor
from wanfast.config import DiTConfig, ExpertName
from wanfast.linear import Linear, LowRank, expand
from wanfast.lora import LayerKeys, Lora

Weights = TypeVar("Weights")

# Official layer or tensor -> field of BlockWeights; the others have their official name.
_BLOCK_FIELDS = {"ffn.0": "ffn_up", "ffn.2": "ffn_down"}
# Official layer or tensor -> field of OuterWeights.
_OUTER_FIELDS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "text_in",
    "text_embedding.2": "text_out",
    "time_embedding.0": "time_in",
    "time_embedding.2": "time_out",
    "time_projection.1": "time_projection",
    "head.modulation": "head_modulation",
    "head.head": "head",
}
_FP32_FIELDS = {"time_in", "time_out", "time_projection", "head"}


@dataclass(frozen=True, slots=True)
class Change:
    """What one layer, or one tensor of its own, gets."""

    low_rank: tuple[LowRank, ...] = ()
    weight: Tensor | None = None  # fp32, added to the weight, or to the tensor
    bias: Tensor | None = None  # fp32, added to the bias
    merged: tuple[LowRank, ...] = ()  # products added to the weight, factors in the dtype of their file


@dataclass(frozen=True, slots=True)
class Adapter:
    """The changes to one expert, by field of its weights; "self_attn.q" is a field of a field."""

    outer: Mapping[str, Change]
    blocks: tuple[Mapping[str, Change], ...]


def make_adapter(
    loras: Sequence[Lora], expert: ExpertName, config: DiTConfig, dtype: torch.dtype, device: torch.device
) -> Adapter:
    """Read what the LoRAs hold for one expert.

    Args:
        loras: opened for this model; their terms add up.
        expert: of the model.
        config: sizes of the DiT.
        dtype: the blocks compute in.
        device: where the terms are used.

    Raises:
        CheckpointError: a tensor is not finite or cannot be read; the message names file and tensor.
    """
    outer: dict[str, Change] = {}
    blocks: list[dict[str, Change]] = [{} for _ in range(config.num_layers)]
    for lora in loras:
        if lora.spec.strength == 0:
            continue
        for module, layer in lora.layers.get(expert, {}).items():
            changes, field = _place(module, outer, blocks)
            computes_in = torch.float32 if changes is outer and field in _FP32_FIELDS else dtype
            for place, change in _read_changes(lora, layer, field, computes_in, device):
                changes[place] = _sum(changes.get(place, Change()), change)
    return Adapter(outer, tuple(blocks))


def attach(weights: Weights, changes: Mapping[str, Change]) -> Weights:
    """Return the weights of a block, or of what stands around the blocks, with changes; nothing is written to.

    Args:
        weights: `BlockWeights` or `OuterWeights`.
        changes: by field, on the weights' device.
    """
    return _attach(weights, changes)  # type: ignore[no-any-return]


def _attach(weights: Any, changes: Mapping[str, Change]) -> Any:
    updates: dict[str, Any] = {}
    for field in dataclasses.fields(weights):
        value = getattr(weights, field.name)
        if field.name in changes:
            updates[field.name] = _changed(value, changes[field.name])
        inner = {
            name.partition(".")[2]: change for name, change in changes.items() if name.startswith(f"{field.name}.")
        }
        if inner:
            updates[field.name] = _attach(value, inner)
    return replace(weights, **updates) if updates else weights


def _changed(value: Linear | Tensor, change: Change) -> Linear | Tensor:
    if isinstance(value, Tensor):
        return _added(value, change.weight)
    is_kept = change.weight is None and not change.merged
    return Linear(
        weight=value.weight if is_kept else _added(expand(value.weight), change.weight, change.merged),
        bias=value.bias if value.bias is None or change.bias is None else _added(value.bias, change.bias),
        low_rank=value.low_rank + change.low_rank,
    )


def _added(base: Tensor, difference: Tensor | None, products: tuple[LowRank, ...] = ()) -> Tensor:
    """Add in fp32 and round once; the base may be kept for others, so nothing is done in place."""
    if difference is None and not products:
        return base
    total = base.float() if difference is None else base.float() + difference.reshape(base.shape)
    for term in products:
        total = torch.addmm(total, term.up.float(), term.down.float(), alpha=term.scale)
    return total.to(base.dtype)


def _place(module: str, outer: dict[str, Change], blocks: list[dict[str, Change]]) -> tuple[dict[str, Change], str]:
    """Find where a layer's changes go, and the layer's field there."""
    if not module.startswith("blocks."):
        return outer, _OUTER_FIELDS[module]
    _, index, name = module.split(".", 2)
    return blocks[int(index)], _BLOCK_FIELDS.get(name, name)


def _read_changes(
    lora: Lora, layer: LayerKeys, field: str, dtype: torch.dtype, device: torch.device
) -> list[tuple[str, Change]]:
    """Read one layer's tensors from a file: fields and their changes."""
    strength, keys = lora.spec.strength, layer.keys

    def read(key: str, wanted: torch.dtype | None) -> Tensor:
        return read_tensor(lora.reader, key, lora.reader.shape(key), dtype=wanted).to(device)

    weight = strength * read(keys["weight"], torch.float32) if "weight" in keys else None
    bias = strength * read(keys["bias"], torch.float32) if "bias" in keys else None
    if "up_bias" in keys:
        own = strength * layer.scale * read(keys["up_bias"], torch.float32)
        bias = own if bias is None else bias + own
    if field == "norm3":  # the one norm with a bias: its two tensors are fields of their own
        return [("norm3_weight", Change(weight=weight)), ("norm3_bias", Change(weight=bias))]
    if "down" not in keys:
        return [(field, Change((), weight, bias))]
    down, up = (read(keys[part], None if lora.spec.is_merged else dtype).flatten(1) for part in ("down", "up"))
    product = (LowRank(down, up, strength * layer.scale),)
    if lora.spec.is_merged:
        return [(field, Change((), weight, bias, product))]
    return [(field, Change(product, weight, bias))]


def _sum(one: Change, other: Change) -> Change:
    return Change(
        one.low_rank + other.low_rank,
        other.weight if one.weight is None else one.weight if other.weight is None else one.weight + other.weight,
        other.bias if one.bias is None else one.bias if other.bias is None else one.bias + other.bias,
        one.merged + other.merged,
    )
