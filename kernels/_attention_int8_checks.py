"""How 8-bit attention refuses operands that do not belong together."""

import torch
from torch import Tensor

from ._attention_int8_tiles import LARGEST_WEIGHT
from ._checks import require
from ._heads import HEAD_DIMS
from ._quantized import EIGHT_BIT
from .block_mask import QUERY_BLOCK, BlockLists
from .quantize_keys import KEY_BLOCK, KEY_GROUPS, QuantizedKeys
from .quantize_queries import QuantizedQueries
from .quantize_values import QuantizedValues

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_operands(q: QuantizedQueries, k: QuantizedKeys, v: QuantizedValues, lists: BlockLists | None) -> None:
    """Refuse queries, keys, values and lists that are not of the same samples, heads and tokens.

    Raises:
        ValueError: a shape, dtype, stride or device is not as in their classes, or does not fit q's and k's.
    """
    shape = tuple(q.values.shape)
    require(len(shape) == 4 and q.values.numel() > 0, "q.values: must be [B, T, N, D], none of them 0", shape)
    require(shape[-1] in HEAD_DIMS, "q.values: head dimension must be 64 or 128", shape[-1])
    batch, tokens, heads, dim = shape
    require(k.tokens >= 1, "k.tokens: must be at least 1", k.tokens)
    require(v.tokens == k.tokens, f"v.tokens: must be {k.tokens}, like k.tokens", v.tokens)
    require(v.values.dtype in LARGEST_WEIGHT, "v.values: must be float8_e4m3fn or float16", v.values.dtype)
    blocks = -(-k.tokens // KEY_BLOCK)
    _check(q.values, "q.values", shape, torch.int8, q.values)
    _check(q.scale, "q.scale", (batch, tokens, heads), torch.float32, q.values)
    _check(k.values, "k.values", (batch, heads, blocks, KEY_BLOCK, dim), torch.int8, q.values)
    _check(k.scale, "k.scale", (batch, heads, blocks, KEY_GROUPS), torch.float32, q.values)
    _check(v.values, "v.values", (batch, heads, blocks, dim, KEY_BLOCK), v.values.dtype, q.values)
    _check(v.scale, "v.scale", (batch, heads, dim), torch.float32, q.values)
    _check(v.mean, "v.mean", (batch, heads, dim), torch.float32, q.values)
    if lists is not None:
        rows = (batch, heads, -(-tokens // QUERY_BLOCK))
        _check(lists.counts, "lists.counts", rows, torch.int32, q.values)
        width = lists.columns.shape[-1] if lists.columns.dim() else 0
        require(1 <= width <= blocks, f"lists.columns: must list 1 to {blocks} key blocks", width)
        _check(lists.columns, "lists.columns", (*rows, width), torch.int32, q.values)


def _check(x: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    require(x.shape == shape, f"{name}: must be {shape}", tuple(x.shape))
    require(x.dtype == dtype, f"{name}: must be {str(dtype).removeprefix('torch.')}", x.dtype)
    require(x.is_contiguous(), f"{name}: must be contiguous", f"strides {x.stride()}")
    require(x.device == like.device, f"{name}: must be on {like.device}, like q", x.device)


def check_out(out: Tensor, q: Tensor) -> None:
    """Refuse a tensor that the result [B, T, N, D] for queries q cannot be written to.

    Raises:
        ValueError: its shape, dtype, stride or device does not fit.
    """
    require(out.dtype in OUT_DTYPES, "out: must be bfloat16, float16 or float32", out.dtype)
    _check(out, "out", tuple(q.shape), out.dtype, q)


def check_quantized_out(dtype: torch.dtype, q: Tensor) -> None:
    """Refuse an 8-bit output that no linear reads.

    Raises:
        ValueError: dtype is not int8 or float8_e4m3fn, or heads are not 128 wide.
    """
    require(dtype in EIGHT_BIT, "dtype: must be int8 or float8_e4m3fn", dtype)
    require(q.shape[-1] == 128, "q.values: head dimension must be 128 for an 8-bit output", q.shape[-1])
