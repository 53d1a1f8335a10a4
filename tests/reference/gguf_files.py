"""GGUF files of small models, written by gguf's own writer, and what gguf makes of the numbers in them."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from reference.k_quants import quantise_k
from torch import Tensor

KIND = gguf.GGMLQuantizationType
MATRIX_KINDS = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "F16", "BF16", "F32")

# gguf does not quantise to these; where their fp16 scales stand, and the scale that gives values near 1.
_SCALES = {
    "Q2_K": {80: 1 / 11, 82: 1.5 / 11},
    "Q3_K": {108: 1 / 32},
    "Q4_K": {0: 1 / 230, 2: 7.5 / 230},
    "Q5_K": {0: 1 / 480, 2: 15.5 / 480},
    "Q6_K": {208: 1 / 1000},
}


def pack(values: Tensor, kind: str) -> np.ndarray:
    """Quantise [..., in] to uint8 [..., bytes]; a kind that gguf cannot write gets random numbers of the same size."""
    if kind not in _SCALES:
        return gguf.quants.quantize(values.float().numpy(), KIND[kind]).view(np.uint8)
    elements, num_bytes = gguf.GGML_QUANT_SIZES[KIND[kind]]
    drawn = np.random.default_rng(values.numel()).integers(0, 256, (values.numel() // elements, num_bytes), np.uint8)
    for place, scale in _SCALES[kind].items():
        size = np.float16(scale * values.std().item())
        drawn[:, place : place + 2] = np.frombuffer(size.tobytes(), np.uint8)
    return drawn.reshape(*values.shape[:-1], -1)


def quantise(values: Tensor, kind: str) -> np.ndarray:
    """Quantise as `pack`, but to numbers that stand for the values in every kind but Q2_K."""
    return quantise_k(values, kind) if kind in _SCALES else pack(values, kind)


def unpack(packed: np.ndarray, kind: str) -> Tensor:
    """What gguf makes of the bytes, fp32."""
    return torch.from_numpy(gguf.quants.dequantize(packed, KIND[kind]).copy())


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    kind_of: Callable[[str, Tensor], str],
    *,
    architecture: str | None = "wan",
    packer: Callable[[Tensor, str], np.ndarray] = pack,
    prepare: Callable[[gguf.GGUFWriter], None] | None = None,
) -> dict[str, Tensor]:
    """Write a file, and return the values that are in it.

    Args:
        path: of the file.
        tensors: by the name they get in it.
        kind_of: chooses the kind of each tensor.
        architecture: `general.architecture`; None leaves it out.
        packer: quantises; `quantise` where the numbers must stand for the tensors.
        prepare: adds keys of its own.

    Returns:
        fp32 by the same names.
    """
    writer = gguf.GGUFWriter(path, architecture or "")  # which writes no empty architecture
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if prepare is not None:
        prepare(writer)
    values = {}
    for name, tensor in tensors.items():
        kind = kind_of(name, tensor)
        packed = packer(tensor, kind)
        values[name] = unpack(packed, kind).reshape(tensor.shape)
        writer.add_tensor(name, packed, raw_dtype=KIND[kind])
    _write(writer)
    return values


def write_header(
    path: Path, entries: Iterable[tuple[str, tuple[int, ...], str]], *, architecture: str, file_type: int
) -> int:
    """Write a sparse file of the right size: (name, shape, kind) of each tensor, and no data.

    Returns:
        Its bytes.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(file_type)
    data = 0
    for name, shape, kind in entries:
        elements, num_bytes = gguf.GGML_QUANT_SIZES[KIND[kind]]
        size = int(np.prod(shape, dtype=np.int64)) // elements * num_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=KIND[kind])
        data += writer.ggml_pad(size, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = writer.ggml_pad(path.stat().st_size, writer.data_alignment)
    with path.open("r+b") as file:
        file.truncate(start + data)
    return start + data


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
