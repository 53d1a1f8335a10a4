"""GGUF weights expanded: rows of packed blocks in, plain numbers out.

    out[r, e] = scale * q [- minimum], unpacked as in gguf_blocks.py for each kind of block

Grid       (blocks / N,), one program per N blocks; the rows do not matter, since no block spans two.
Tile       N blocks of 32 or 256 elements; a packed number is loaded once, every store is 16 bytes per thread.
Numerics   in fp32, every product exact, rounded once on the store (kinds with a minimum also by its subtraction).
Traffic    2 to 8.5 bits of each element read, out's dtype written; bandwidth-bound, by the stores.
Reference  dequantize_gguf_reference, below.
Source     ggml-org/llama.cpp, gguf-py/gguf/quants.py.
"""

import torch
from torch import Tensor

from ._checks import COMPUTE_DTYPES, require
from ._gguf_triton import dequantize_blocks
from ._launch import runs_triton
from .gguf_blocks import FORMATS

_ELEMENTS_AT_ONCE = 1 << 18  # of the reference: its fp32 copy stays in the cache of one core


def dequantize_gguf_reference(blocks: Tensor, kind: str, *, in_features: int, dtype: torch.dtype) -> Tensor:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    form = FORMATS[kind]
    out = torch.empty(blocks.shape[0], in_features, dtype=dtype, device=blocks.device)
    num_blocks = out.numel() // form.elements
    packed, flat = blocks.view(num_blocks, form.num_bytes), out.view(num_blocks, form.elements)
    at_once = max(_ELEMENTS_AT_ONCE // form.elements, 1)
    for source, target in zip(packed.split(at_once), flat.split(at_once), strict=True):
        target.copy_(form.unpack(source))
    return out


def dequantize_gguf_triton(blocks: Tensor, kind: str, *, in_features: int, dtype: torch.dtype) -> Tensor:
    """Launch the kind's kernel on checked arguments."""
    out = torch.empty(blocks.shape[0], in_features, dtype=dtype, device=blocks.device)
    dequantize_blocks(blocks, kind, out)
    return out


def dequantize_gguf(blocks: Tensor, kind: str, *, in_features: int, dtype: torch.dtype) -> Tensor:
    """Expand a weight stored as GGUF blocks.

    Args:
        blocks: [out, bytes of a row] uint8, the rows as they lie in the file.
        kind: GGUF's name of the blocks' type: F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q4_K, Q3_K, Q2_K, Q5_0, Q5_1, Q4_0 or
            Q4_1.
        in_features: elements of a row, whole blocks.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        [out, in_features] in dtype, on blocks' device, each value rounded once from fp32. blocks is not written to.

    Raises:
        ValueError: a kind, shape or dtype is not as above.
    """
    require(dtype in COMPUTE_DTYPES, "dtype: must be float32, bfloat16 or float16", dtype)
    blocks = check_blocks(blocks, kind, in_features)
    run = dequantize_gguf_triton if runs_triton(blocks) and FORMATS[kind].elements > 1 else dequantize_gguf_reference
    return run(blocks, kind, in_features=in_features, dtype=dtype)


def check_blocks(blocks: Tensor, kind: str, in_features: int) -> Tensor:
    """Refuse what are no rows of blocks.

    Returns:
        The blocks, contiguous and where numbers of up to 4 bytes can be read; a copy if they were not.

    Raises:
        ValueError: a kind, shape or dtype is not as `dequantize_gguf` describes it.
    """
    require(kind in FORMATS, f"kind: must be one of {', '.join(FORMATS)}", kind)
    require(blocks.dtype == torch.uint8 and blocks.dim() == 2, "blocks: must be [out, bytes] uint8", _described(blocks))
    form = FORMATS[kind]
    whole = in_features > 0 and in_features % form.elements == 0
    require(whole, f"in_features: must be a positive multiple of {form.elements}, a block of {kind}", in_features)
    row_bytes = in_features // form.elements * form.num_bytes
    fits = blocks.shape[1] == row_bytes
    require(fits, f"blocks: must have {row_bytes} bytes per row for {in_features} elements of {kind}", blocks.shape[1])
    aligned = blocks.is_contiguous() and blocks.data_ptr() % 4 == 0  # blocks are also read as fp16, F32 as fp32
    return blocks if aligned else blocks.clone(memory_format=torch.contiguous_format)


def _described(blocks: Tensor) -> str:
    return f"{list(blocks.shape)} {str(blocks.dtype).removeprefix('torch.')}"
