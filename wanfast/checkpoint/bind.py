"""Takes tensors out of a reader under a contract: right name, right shape, finite numbers, wanted dtype."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wanfast.checkpoint.reader import Reader
from wanfast.errors import CheckpointError
from wanfast.kernels import gguf_scales
from wanfast.linear import Linear, expand
from wanfast.stored import ScaledWeight, Weight

_NAMED = 3  # tensors a message lists of each kind


def read_tensor(reader: Reader, name: str, shape: Sequence[int], *, dtype: torch.dtype | None = None) -> Tensor:
    """Load one tensor and check it.

    Args:
        reader: where to look.
        name: official name.
        shape: what it must be.
        dtype: cast to this float dtype; None keeps the stored one.

    Returns:
        The tensor on the CPU. Without a cast it may be the reader's own: do not write to it.

    Raises:
        CheckpointError: missing, mis-shaped, not of a float dtype, or with values that are not finite (in `dtype`).
    """
    return _plain(reader, name, _load(reader, name, shape), dtype)


def _plain(reader: Reader, name: str, stored: Weight, dtype: torch.dtype | None) -> Tensor:
    """Give a loaded tensor as plain numbers, checked."""
    if dtype is not None and not isinstance(stored, Tensor):
        stored = replace(stored, dtype=dtype)  # rounded once
    tensor = expand(stored)
    if not tensor.is_floating_point():
        raise CheckpointError(f"{reader.where(name)} is {_short(tensor.dtype)}, expected floating-point weights")
    _check_finite(reader, name, tensor, dtype or tensor.dtype)
    return tensor if dtype is None else tensor.to(dtype)


def read_linear(
    reader: Reader, prefix: str, out_features: int, in_features: int, *, bias: bool = True, dtype: torch.dtype
) -> Linear:
    """Load `prefix.weight` [out, in] and, with `bias`, `prefix.bias` [out], cast to `dtype`.

    Raises:
        CheckpointError: as `read_tensor`.
    """
    stored = _load(reader, f"{prefix}.weight", (out_features, in_features))
    if isinstance(stored, Tensor):
        weight: Weight = _plain(reader, f"{prefix}.weight", stored, dtype)
    else:
        weight = replace(stored, dtype=dtype)  # stays as small as it is stored
        if isinstance(weight, ScaledWeight):
            _check_finite(reader, f"{prefix}.weight", weight.scale, dtype)
        else:
            _check_finite(reader, f"{prefix}.weight", gguf_scales(weight.blocks, weight.kind), torch.float32)
    return Linear(weight, read_tensor(reader, f"{prefix}.bias", (out_features,), dtype=dtype) if bias else None)


def _load(reader: Reader, name: str, shape: Sequence[int]) -> Weight:
    weight = reader.load(name)
    if tuple(weight.shape) != tuple(shape):
        raise CheckpointError(f"{reader.where(name)} has shape {list(weight.shape)}, expected {list(shape)}")
    return weight


def check_names(reader: Reader, expected: Mapping[str, tuple[int, ...]], *, part: str) -> None:
    """Refuse a reader whose tensors are not exactly those expected; no data is loaded.

    Args:
        reader: what is there.
        expected: official name -> shape.
        part: what is being read, for the message: "text encoder".

    Raises:
        CheckpointError: some are missing, unexpected or mis-shaped: the first few of each kind by name, with counts.
    """
    names = reader.names()
    missing = sorted(expected.keys() - names)
    unexpected = sorted(names - expected.keys())
    misshaped = [name for name in sorted(expected.keys() & names) if reader.shape(name) != tuple(expected[name])]
    faults = [
        _listed("missing", missing),
        _listed("unexpected", [_stored(reader, name) for name in unexpected]),
        _listed(
            "mis-shaped",
            [
                f"{_stored(reader, name)} is {list(reader.shape(name))}, expected {list(expected[name])}, "
                f"in {reader.file_of(name).name}"
                for name in misshaped
            ],
        ),
    ]
    found = "; ".join(fault for fault in faults if fault)
    if found:
        raise CheckpointError(f"{reader.path}: not the tensors of the {part}: {found}")


def _check_finite(reader: Reader, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Check the extremes after the cast: it is monotonic, and NaN reaches both."""
    if tensor.numel() == 0:
        return
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # fp8 has no reductions
    extremes = torch.stack(torch.aminmax(wide)).to(dtype).float()
    if bool(extremes.isfinite().all()):
        return
    bad = ~wide.to(dtype).float().isfinite()
    first = bad.nonzero()[0].tolist()
    raise CheckpointError(
        f"{reader.where(name)}: {int(bad.sum())} of {tensor.numel()} values are not finite in {_short(dtype)} "
        f"(first: {wide[tuple(first)].item()} at {first}); download the file again"
    )


def _listed(kind: str, items: list[str]) -> str:
    if not items:
        return ""
    return f"{len(items)} {kind} ({', '.join(items[:_NAMED])}{', ...' if len(items) > _NAMED else ''})"


def _stored(reader: Reader, name: str) -> str:
    stored = reader.ref(name).stored_name
    return name if stored == name else f"{name} (stored as {stored})"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
