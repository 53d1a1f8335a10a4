"""A block's weights as 8-bit arithmetic takes them: rounded for it once, and matrices that share an input as one.

    int8   a scale per output channel; each 128 input channels rotated by the Hadamard matrix before rounding
    fp8    e4m3, a scale per output channel, numbers within +-28

Weights that a file stores so are used as they are, others are rounded when they are loaded. GGUF blocks stay as small
as they are and are rounded anew for each use.
Source: docs/numerics.md; ModelTC/LightX2V for the recipe of weights that are not rotated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from wanfast import kernels
from wanfast.checkpoint.quantize import as_stored, quantize_rows, rotates
from wanfast.config import DiTConfig
from wanfast.dit.weights import AttentionWeights, BlockWeights
from wanfast.errors import RequestError
from wanfast.kernels import GROUP, QuantizedWeight
from wanfast.linear import Linear, expand
from wanfast.stored import GGUFWeight, ScaledWeight

_GENERATIONS = (8, 9, 12)  # of GPUs, by the first number of the compute capability, that 8-bit kernels are compiled for
DTYPES: Mapping[str, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}  # by precision

LowRank: TypeAlias = tuple[QuantizedWeight, Tensor]  # down [R, in] in 8 bits, up [out, R] with the term's scale in it


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """One product in 8 bits."""

    weight: QuantizedWeight  # [out, in]
    bias: Tensor | None  # [out]
    low_rank: LowRank | None


@dataclass(frozen=True, slots=True)
class PackedBlock:
    """One DiT block in 8 bits; C channels."""

    dtype: torch.dtype  # int8 or float8_e4m3fn
    modulation: Tensor  # [1, 6, C], fp32
    queries_keys: PackedLinear  # [2 C, C], of self-attention
    values: PackedLinear  # [C, C]
    attended: PackedLinear  # [C, C]: what self-attention gives
    norm_q: Tensor  # [C], fp32
    norm_k: Tensor  # [C], fp32
    norm3_weight: Tensor  # [C], fp32
    norm3_bias: Tensor  # [C], fp32
    text_queries: PackedLinear  # [C, C]
    text_attended: PackedLinear  # [C, C]
    cross_attn: AttentionWeights  # for keys and values of the text, which are computed in 16 bits
    ffn_up: PackedLinear
    ffn_down: PackedLinear


def multiplies_e4m3(device: torch.device) -> bool:
    """Whether a device multiplies e4m3: GPUs from Ada on, and the references anywhere else."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def multiplies_8_bit(device: torch.device) -> bool:
    """Whether the kernels are compiled for a device's 8-bit products; the references run anywhere else.

    Data-centre Blackwell (sm_100 to sm_110) multiplies by other instructions, which Triton 3.7 does not compile the
    rotations of int8 to.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in _GENERATIONS


def refuse_unfit(config: DiTConfig, precision: str, device: torch.device) -> None:
    """Refuse a model that no kernel multiplies in 8 bits on a GPU, and a GPU that has no such numbers.

    Raises:
        RequestError: its channels do not come in whole groups, the GPU is of a generation without 8-bit kernels, or the
            precision is fp8 on a GPU before Ada.
    """
    if not multiplies_8_bit(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise RequestError(
            f"precision: {precision} runs on sm_80 to sm_90 and sm_120, {torch.cuda.get_device_name(device)} is"
            f" sm_{major}{minor}; try exact"
        )
    if precision == "fp8" and not multiplies_e4m3(device):
        name = torch.cuda.get_device_name(device)
        raise RequestError(f"precision: fp8 needs a GPU of compute capability 8.9 or more, got {name}; try int8")
    if config.dim % GROUP or config.ffn_dim % GROUP:
        raise RequestError(
            f"precision: fp8 and int8 need channels in multiples of {GROUP} on a GPU, got {config.dim} and"
            f" {config.ffn_dim} in this model; try exact"
        )


def prepare_block(block: BlockWeights, dtype: torch.dtype) -> BlockWeights:
    """Round a block's projections to 8 bits, those that are not stored so already; on whatever device they are.

    Args:
        block: as `load_block` gives it.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.
    """

    def prepared(layer: Linear) -> Linear:
        return replace(layer, weight=_prepared(layer, dtype))

    def attention(weights: AttentionWeights) -> AttentionWeights:
        q, k, v, o = (prepared(layer) for layer in (weights.q, weights.k, weights.v, weights.o))
        return replace(weights, q=q, k=k, v=v, o=o)

    return replace(
        block,
        self_attn=attention(block.self_attn),
        cross_attn=attention(block.cross_attn),
        ffn_up=prepared(block.ffn_up),
        ffn_down=prepared(block.ffn_down),
    )


def pack_block(block: BlockWeights, dtype: torch.dtype) -> PackedBlock:
    """Give a block, with what is attached to it, as 8-bit arithmetic takes it.

    Matrices of a prepared block that lie next to each other in memory, as a slot of the residency holds them, are seen
    as one; others are copied together.

    Args:
        block: on the device; layers that were not prepared, or were changed since, are rounded here.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.
    """
    own, cross = block.self_attn, block.cross_attn
    rotated = _rotated([own.q, own.k, own.v], dtype)

    def alone(layer: Linear) -> PackedLinear:
        return _pack([layer], dtype, _rotated([layer], dtype))

    return PackedBlock(
        dtype=dtype,
        modulation=block.modulation,
        queries_keys=_pack([own.q, own.k], dtype, rotated),
        values=_pack([own.v], dtype, rotated),
        attended=alone(own.o),
        norm_q=own.norm_q,
        norm_k=own.norm_k,
        norm3_weight=block.norm3_weight,
        norm3_bias=block.norm3_bias,
        text_queries=alone(cross.q),
        text_attended=alone(cross.o),
        cross_attn=cross,
        ffn_up=alone(block.ffn_up),
        ffn_down=alone(block.ffn_down),
    )


def _prepared(layer: Linear, dtype: torch.dtype) -> ScaledWeight | GGUFWeight:
    weight = layer.weight
    if isinstance(weight, GGUFWeight) or (isinstance(weight, ScaledWeight) and _is_ready(weight, dtype)):
        return weight
    if isinstance(weight, ScaledWeight) and weight.values.dtype == dtype and _has_row_scales(weight):
        return as_stored(kernels.fit_weight(weight.values, weight.scale), weight.dtype)
    return quantize_rows(expand(weight), dtype)


def _is_ready(weight: ScaledWeight, dtype: torch.dtype) -> bool:
    fits = weight.values.dtype == dtype and _has_row_scales(weight)
    return fits and (dtype == torch.int8 or weight.is_narrow)


def _has_row_scales(weight: ScaledWeight) -> bool:
    return weight.scale.dim() == 0 or tuple(weight.scale.shape) == (weight.shape[0], 1)


def _rotated(layers: Sequence[Linear], dtype: torch.dtype) -> bool:
    """Settle whether layers that share an input are rotated: as they are stored, where all are stored alike."""
    weights = [layer.weight for layer in layers]
    flags = {
        weight.is_rotated
        for weight in weights
        if isinstance(weight, ScaledWeight) and weight.values.dtype == dtype and _has_row_scales(weight)
    }
    return flags.pop() if len(flags) == 1 else rotates(dtype, weights[0].shape[1])


def _pack(layers: Sequence[Linear], dtype: torch.dtype, rotated: bool) -> PackedLinear:
    """Put layers that share an input below each other."""
    rows = [_rows(layer, dtype, rotated) for layer in layers]
    values, scale = _joined([weight.values for weight in rows]), _joined([weight.scale for weight in rows])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = _joined(biases) if len(biases) == len(layers) else None
    return PackedLinear(QuantizedWeight(values, scale, rotated), bias, _pack_low_rank(layers, dtype, rotated))


def _rows(layer: Linear, dtype: torch.dtype, rotated: bool) -> QuantizedWeight:
    if isinstance(layer.weight, Tensor):  # it was not prepared, or a LoRA was merged into it
        return kernels.quantize_weight(layer.weight, dtype, rotated=rotated)
    weight = _prepared(layer, dtype)
    if isinstance(weight, GGUFWeight):
        return kernels.requantize_gguf(
            weight.blocks, weight.kind, in_features=weight.in_features, dtype=dtype, rotated=rotated
        )
    if weight.is_rotated != rotated:  # only where a file mixes formats
        weight = quantize_rows(expand(weight), dtype, is_rotated=rotated)
    scale = weight.scale.expand(weight.shape[0], 1).reshape(-1)
    return QuantizedWeight(weight.values, scale.contiguous(), rotated)


def _pack_low_rank(layers: Sequence[Linear], dtype: torch.dtype, rotated: bool) -> LowRank | None:
    """Put the low-rank terms of all layers into one, whose up matrix has each term's rows where its layer's are."""
    terms = [(index, term) for index, layer in enumerate(layers) for term in layer.low_rank]
    if not terms:
        return None
    down = torch.cat([term.down for _, term in terms])
    heights = [layer.weight.shape[0] for layer in layers]
    up = down.new_zeros(sum(heights), len(down))
    column = 0
    for index, term in terms:
        top, rank = sum(heights[:index]), len(term.down)
        up[top : top + heights[index], column : column + rank] = term.scale * term.up
        column += rank
    return kernels.quantize_weight(down, dtype, rotated=rotated), up


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """See contiguous tensors that follow each other in memory as one; copy them together where they do not."""
    first = parts[0]
    if len(parts) == 1:
        return first.contiguous()
    ends = [part.storage_offset() + part.numel() for part in parts[:-1]]
    begins = [part.storage_offset() for part in parts[1:]]
    storages = {part.untyped_storage().data_ptr() for part in parts}
    if len(storages) > 1 or ends != begins or not all(part.is_contiguous() for part in parts):
        return torch.cat(list(parts))
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())
