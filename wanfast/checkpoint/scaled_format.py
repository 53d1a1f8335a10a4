"""8-bit weights in plain tensor files: which tensor scales which, in the dialects that are about.

    name.scale_weight, name.scale_input, a marker scaled_fp8        ComfyUI: fp8, one scale for a weight
    name.weight_scale, name.input_scale, name.comfy_quant           ComfyUI since late 2025: the same
    name.weight_scale [out, 1]                                      LightX2V: int8 or fp8, one scale per output channel
    name.weight_scale_rotated, name.weight_scale_narrow [out, 1]    wanfast: as 8-bit arithmetic takes them (stored.py)
    name.int8_weight, name.scale [out / 128, in / 128]              TurboDiffusion: int8, one scale per square block
    fp8 weights alone                                               cast without a scale

A scale multiplies. Scales of activations are dropped: activations stay in the dtype the model computes in.

Sources: comfyanonymous/ComfyUI, comfy/ops.py and model_detection.py; ModelTC/LightX2V, tools/convert/quant/quant.py;
thu-ml/TurboDiffusion, turbodiffusion/ops/core.py and rcm/networks/wan2pt2.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wanfast.block_sizes import SCALE_BLOCK, block_counts
from wanfast.checkpoint.files import TensorRef, parse_object, torch_dtype
from wanfast.checkpoint.reader import Reader
from wanfast.checkpoint.safetensors_format import safetensors_metadata
from wanfast.errors import CheckpointError
from wanfast.stored import ScaledWeight

if TYPE_CHECKING:
    from torch import Tensor

    from wanfast.open_file import Where
    from wanfast.stored import Weight

_LOG = logging.getLogger(__name__)

_EIGHT_BITS = ("int8", "float8_e4m3fn", "float8_e5m2")
_MARKER = "scaled_fp8"
_ROTATED, _NARROW = "weight_scale_rotated", "weight_scale_narrow"  # wanfast's own, of 8-bit arithmetic's weights
_WEIGHT_SCALES = ("scale_weight", "weight_scale", _ROTATED, _NARROW)
_DROPPED = ("scale_input", "input_scale")
_QUANT_NOTE = "comfy_quant"  # JSON about one weight
_QUANT_HEADER = "_quantization_metadata"  # the same about all weights, in a file's header
_QUANT_NOTES_READ = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
_QUANT_KEYS_READ = {"format", "full_precision_matrix_mult"}  # any other may change what the numbers mean: "convrot"
_BLOCK_WEIGHT = "int8_weight"
_LINEAR_ATTENTION = ".attn_op.local_attn.proj_l."  # TurboDiffusion's sparse-linear attention
_NOT_MULTIPLIED = ("patch_embedding", "token_embedding", "shared", "embed_tokens", "pos_embedding", "attention_bias")
_EXPANDS_TO = "bfloat16"  # where nobody asks for another dtype
_PATCH_SIZE = (1, 2, 2)


def open_scaled(reader: Reader) -> Reader:
    """Put weights and their scales together.

    Args:
        reader: of one part, by the names in its file; no prefix before them.

    Returns:
        A reader in which every 8-bit matrix is a `ScaledWeight` named `<layer>.weight`, without the scales and markers
        beside it; the given reader where there is nothing of the kind.

    Raises:
        CheckpointError: a scale is missing where one is needed, does not fit its weight, or is of an unknown kind.
    """
    names = reader.names()
    if any(_LINEAR_ATTENTION in name for name in names):
        _LOG.warning("%s was trained with sparse-linear attention; it runs with full attention here", reader.path)
    if not any(reader.ref(name).dtype_name in _EIGHT_BITS or _LINEAR_ATTENTION in name for name in names):
        return reader
    refs = {name: reader.ref(name) for name in names if not _is_dropped(reader, name)}
    is_scaled = _MARKER in names or any(name.rpartition(".")[2] in _WEIGHT_SCALES for name in names)
    for name in sorted(refs):
        layer, _, kind = name.rpartition(".")
        if kind == _BLOCK_WEIGHT:
            scale = _take(refs, reader, f"{layer}.scale", refs[name])
            refs[f"{layer}.weight"] = _scaled_ref(refs.pop(name), scale)
        elif kind == "weight" and refs[name].dtype_name in _EIGHT_BITS:
            refs[name] = _weight_ref(refs, reader, name, is_scaled=is_scaled)
    return Reader(_official_patches(refs), reader.path)


def _is_dropped(reader: Reader, name: str) -> bool:
    """Whether a tensor says nothing about the weights; one about a quantisation nobody here knows is refused."""
    kind = name.rpartition(".")[2]
    if kind == _QUANT_NOTE:
        _check_quant_note(reader, name)
    return name == _MARKER or kind in (*_DROPPED, _QUANT_NOTE) or _LINEAR_ATTENTION in name


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header tells of a quantisation that is not read.

    Raises:
        CheckpointError: naming the layer.
    """
    text = safetensors_metadata(path).get(_QUANT_HEADER)
    if text is None:
        return
    try:
        layers = parse_object(text.encode()).get("layers")
    except (ValueError, RecursionError):
        layers = None
    if not isinstance(layers, dict):
        raise CheckpointError(f"{path}: its {_QUANT_HEADER} cannot be read; download it again")
    for name, note in layers.items():
        _check_note(note, f"{path}: {_QUANT_HEADER} of {name}")


def _check_quant_note(reader: Reader, name: str) -> None:
    stored, note = reader.ref(name), None
    if stored.dtype_name == "uint8" and stored.num_bytes < 4096:
        with suppress(ValueError, RecursionError):
            note = parse_object(stored.first_bytes(stored.num_bytes))
    _check_note(note, reader.where(name))


def _check_note(note: object, where: str) -> None:
    if not isinstance(note, dict) or note.get("format") not in _QUANT_NOTES_READ or note.keys() - _QUANT_KEYS_READ:
        raise CheckpointError(
            f"{where} says the weight is quantised as {note}; wanfast reads {', '.join(_QUANT_NOTES_READ)} only; "
            "use another file of this model"
        )


def _weight_ref(refs: dict[str, TensorRef], reader: Reader, name: str, *, is_scaled: bool) -> TensorRef:
    """The entry of an 8-bit `<layer>.weight`, with its scale if it has one."""
    ref, layer = refs[name], name.removesuffix(".weight")
    found = [f"{layer}.{kind}" for kind in _WEIGHT_SCALES if f"{layer}.{kind}" in refs]
    if len(found) > 1:
        raise CheckpointError(f"{reader.where(name)} has two scales, {' and '.join(found)}; use the original file")
    if not found and (is_scaled or ref.dtype_name == "int8"):
        raise CheckpointError(f"{reader.where(name)} has no scale beside it ({layer}.scale_weight or .weight_scale)")
    if found:
        kind = found[0].rpartition(".")[2]
        _check_own_kind(reader, name, kind)
        return _scaled_ref(ref, _take(refs, reader, found[0], ref), kind=kind)
    is_matrix = len(ref.shape) == 2 and not any(part in layer for part in _NOT_MULTIPLIED)
    return _scaled_ref(ref, None) if is_matrix else ref


def _check_own_kind(reader: Reader, name: str, kind: str) -> None:
    """Refuse a scale of wanfast's own that does not belong to its weight."""
    ref = reader.ref(name)
    is_right = {
        _ROTATED: ref.dtype_name == "int8" and len(ref.shape) == 2 and ref.shape[1] % SCALE_BLOCK == 0,
        _NARROW: ref.dtype_name == "float8_e4m3fn",
    }.get(kind, True)
    if not is_right:
        raise CheckpointError(
            f"{reader.where(name)} is {ref.dtype_name} {list(ref.shape)}, which no {kind} goes with; convert it again"
        )


def _take(refs: dict[str, TensorRef], reader: Reader, name: str, weight: TensorRef) -> TensorRef:
    """Take a scale out of the entries, its shape brought to the form of `ScaledWeight`."""
    if name not in refs:
        raise CheckpointError(
            f"{weight.file}: tensor {weight.stored_name} has no scale {name}; download the file again"
        )
    scale, rows = refs.pop(name), weight.shape[0] if len(weight.shape) == 2 else 0
    if not rows or not scale.dtype_name.startswith(("float", "bfloat")):
        raise CheckpointError(f"{reader.where(name)} is no scale of a matrix; use the original file")
    forms: dict[tuple[int, ...], tuple[int, ...]] = {(): (), (1,): (), (1, 1): (), (rows,): (rows, 1)}
    forms |= {(rows, 1): (rows, 1), block_counts(weight.shape): block_counts(weight.shape)}
    if scale.shape not in forms:
        raise CheckpointError(
            f"{reader.where(name)} has shape {list(scale.shape)}, which scales no weight of shape "
            f"{list(weight.shape)}: expected [], [{rows}, 1] or {list(block_counts(weight.shape))}"
        )
    return replace(scale, shape=forms[scale.shape])


def _scaled_ref(weight: TensorRef, scale: TensorRef | None, *, kind: str = "") -> TensorRef:
    scale_bytes = 0 if scale is None else scale.num_bytes
    by_rows = weight.rows is not None and (scale is None or scale.shape in ((), (weight.shape[0], 1)))
    return replace(
        weight,
        dtype_name=_EXPANDS_TO,
        load=partial(_load_scaled, weight, scale, kind),
        rows=partial(_load_rows, weight, scale, kind) if by_rows else None,
        stored_as=weight.dtype_name,
        stored_bytes=weight.num_bytes + scale_bytes,
        is_ready=kind in (_ROTATED, _NARROW),
    )


def _load_scaled(weight: TensorRef, scale: TensorRef | None, kind: str, where: Where) -> Weight:
    return _as_scaled(weight.load(where), _load_scales(scale, where), kind)


def _load_rows(weight: TensorRef, scale: TensorRef | None, kind: str, rows: Sequence[int]) -> Weight:
    assert weight.rows is not None, "a plain tensor of two axes"
    scales = _load_scales(scale, "cpu")
    return _as_scaled(weight.rows(rows), scales[list(rows)] if scales.dim() else scales, kind)


def _load_scales(scale: TensorRef | None, where: Where) -> Tensor:
    import torch

    if scale is None:
        return torch.ones((), device=where)
    scales = scale.load(where)
    assert isinstance(scales, torch.Tensor)
    return scales.to(torch.float32).reshape(scale.shape)


def _as_scaled(values: Weight, scales: Tensor, kind: str) -> ScaledWeight:
    import torch

    assert isinstance(values, torch.Tensor)
    return ScaledWeight(
        values.contiguous(),
        scales.contiguous(),
        torch_dtype(_EXPANDS_TO),
        is_rotated=kind == _ROTATED,
        is_narrow=kind == _NARROW,
    )


def _official_patches(refs: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """Give a patch embedding that is stored as a matrix, its columns in the order of a convolution's, its five axes."""
    ref = refs.get("patch_embedding.weight")
    patch = math.prod(_PATCH_SIZE)
    if ref is None or len(ref.shape) != 2 or ref.shape[1] % patch:
        return refs
    shape = (ref.shape[0], ref.shape[1] // patch, *_PATCH_SIZE)

    def load(where: Where) -> Weight:
        import torch

        weight = ref.load(where)
        assert isinstance(weight, torch.Tensor)
        return weight.reshape(shape)

    return refs | {"patch_embedding.weight": replace(ref, shape=shape, load=load, rows=None)}
