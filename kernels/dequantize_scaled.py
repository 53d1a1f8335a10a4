"""Expands 8-bit weights: int8 or fp8 numbers times the scale of the tensor, of their row, or of their square block.

    y[o, i] = values[o, i] * s[o, i]        s[o, i] = scale, scale[o, 0] or scale[o // 128, i // 128], by scale's shape

Grid       (ceil(O / ROWS), ceil(I / COLUMNS)), one program per tile.
Tile       4 x 1024 weights, or 32 x 128 where they have a scale per block; a thread loads 16 adjacent bytes at a time.
Numerics   multiply in fp32, rounded once, on the store; a NaN stays a NaN.
Traffic    O*I bytes read and O*I elements written; the scales stay in cache. Bandwidth-bound.
Reference  dequantize_scaled_reference, below.
Source     comfyanonymous/ComfyUI, comfy/ops.py (scale_weight); ModelTC/LightX2V, tools/convert (weight_scale);
           thu-ml/TurboDiffusion, turbodiffusion/ops/core.py (128 x 128 blocks).
"""

import torch
from torch import Tensor

from wanfast.block_sizes import SCALE_BLOCK, block_counts

from ._checks import COMPUTE_DTYPES, require
from ._launch import on_device_of, runs_triton, tl, triton

STORED_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
NUM_WARPS = 4
WIDE_TILE = {"ROWS": 4, "COLUMNS": 1024, "SIDE": 1}
BLOCK_TILE = {"ROWS": 32, "COLUMNS": SCALE_BLOCK, "SIDE": SCALE_BLOCK}  # a tile lies within one block

_FP8_CAPABILITY = (8, 9)  # of the first GPUs whose instructions convert fp8


def dequantize_scaled_reference(values: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    y = torch.empty(values.shape, dtype=dtype, device=values.device)
    is_blocked = _is_blocked(values, scale)
    scales = scale if is_blocked else scale.expand(values.shape[0], 1).split(SCALE_BLOCK)
    strips = zip(values.split(SCALE_BLOCK), y.split(SCALE_BLOCK), scales, strict=True)
    for strip, out, row in strips:  # its fp32 stays in cache
        out.copy_(strip.float().mul_(row.repeat_interleave(SCALE_BLOCK)[: y.shape[1]] if is_blocked else row))
    return y


@triton.jit(do_not_specialize=["OUT"])
def _dequantize_scaled_kernel(
    values_ptr,  # [OUT, IN], contiguous
    scale_ptr,  # fp32, contiguous
    y_ptr,  # [OUT, IN], contiguous
    OUT,
    IN,
    scale_stride_row,  # 0 where all rows share a scale
    scale_stride_column,  # 0 where all columns share a scale
    SIDE: tl.constexpr,  # rows and columns that share a scale; 1 where each row has its own
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = (rows < OUT)[:, None] & (columns < IN)[None, :]
    at = rows.to(tl.int64)[:, None] * IN + columns[None, :]
    scale_at = rows // SIDE * scale_stride_row + tl.program_id(1) * COLUMNS // SIDE * scale_stride_column

    values = tl.load(values_ptr + at, mask=live, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + scale_at, mask=rows < OUT, other=0.0)  # a row's columns in a tile share it
    tl.store(y_ptr + at, values * scale[:, None], mask=live)


def dequantize_scaled_triton(values: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Launch the kernel on checked arguments."""
    y = torch.empty(values.shape, dtype=dtype, device=values.device)
    rows, columns = values.shape
    is_blocked = _is_blocked(values, scale)
    tile = BLOCK_TILE if is_blocked else WIDE_TILE
    grid = (-(-rows // tile["ROWS"]), -(-columns // tile["COLUMNS"]))
    with on_device_of(values):
        _dequantize_scaled_kernel[grid](
            values,
            scale,
            y,
            rows,
            columns,
            scale_stride_row=0 if scale.dim() == 0 else scale.shape[1],
            scale_stride_column=int(is_blocked),
            **tile,
            num_warps=NUM_WARPS,
        )
    return y


def dequantize_scaled(values: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Multiply 8-bit weights by their scales.

    Args:
        values: [O, I], contiguous; int8, float8_e4m3fn or float8_e5m2.
        scale: fp32, contiguous, on the device of `values`: [] for all weights, [O, 1] for each row, or
            [ceil(O / 128), ceil(I / 128)] for each square block.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        [O, I] in `dtype`, rounded once from fp32.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.
    """
    require(values.dtype in STORED_DTYPES, "values: must be int8, float8_e4m3fn or float8_e5m2", values.dtype)
    require(values.dim() == 2 and values.numel() > 0, "values: must be [O, I], not empty", tuple(values.shape))
    require(values.is_contiguous(), "values: must be contiguous", f"strides {values.stride()}")
    blocks = block_counts(values.shape)
    rule = f"scale: must be [], [{values.shape[0]}, 1] or {list(blocks)} for values {list(values.shape)}"
    require(tuple(scale.shape) in ((), (values.shape[0], 1), blocks), rule, list(scale.shape))
    require(scale.dtype == torch.float32, "scale: must be float32", scale.dtype)
    require(scale.is_contiguous(), "scale: must be contiguous", f"strides {scale.stride()}")
    require(scale.device == values.device, f"scale: must be on {values.device}, like values", scale.device)
    require(dtype in COMPUTE_DTYPES, "dtype: must be float32, bfloat16 or float16", dtype)
    run = dequantize_scaled_triton if runs_triton(values) and _converts(values) else dequantize_scaled_reference
    return run(values, scale, dtype=dtype)


def _is_blocked(values: Tensor, scale: Tensor) -> bool:
    return scale.dim() == 2 and scale.shape != (values.shape[0], 1)


def _converts(values: Tensor) -> bool:
    """Whether the GPU of `values` has instructions that convert their dtype."""
    return values.dtype == torch.int8 or torch.cuda.get_device_capability(values.device) >= _FP8_CAPABILITY
