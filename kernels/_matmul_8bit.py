"""What the 8-bit linears share: the tile's matrix product on the device, launch parameters, reference and checks.

    y[m, n] = (sum_k x[m, k] * w[n, k]) * x_scale[m, g] * w_scale[n] + bias[n] + sum_r t[m, r] * up[n, r]

x's scale multiplies the finished sum where a token has one (G = 1), and the sum of each 128 channels where it has one
for each of those. int8 products are summed exactly, in int32. e4m3 products are summed in fp16 where that is the tensor
cores' full rate, and added to fp32 at least every 128 channels: the bound in _quantized.py excludes an overflow.
Elsewhere they are summed in fp32.

The weight's sizes are constants of the compiled kernel: they are few, and addresses that differ by a constant share
their registers. On Ada a tile's columns are two halves, each with a product and an accumulator of its own: Triton 3.8
and 3.9 keep both in registers, where they spill a single one of twice the width, and an epilogue has the halves that a
rotation by the Hadamard matrix combines. On Hopper the tile is one product, since halves would read the tokens twice.
"""

from typing import Any

import torch
from torch import Tensor

from ._checks import COMPUTE_DTYPES, require
from ._launch import runs_triton, tl, triton
from ._quantized import EIGHT_BIT, GROUP, Quantized, QuantizedWeight, check_quantized
from ._tiles_8bit import Tile, generation_of

LowRank = tuple[Tensor, Tensor]  # x @ down^T [..., R], and up [N, R] with the term's scale in it


@triton.jit
def tile_at(
    num_m,  # tiles along the rows of y
    num_n,  # and along its columns
    GROUP_M: tl.constexpr,  # rows of tiles that are run together, so that their weights are still in the L2 cache
):  # -> (row, column) of this program's tile
    program = tl.program_id(0)
    first = program // (GROUP_M * num_n) * GROUP_M
    height = tl.minimum(num_m - first, GROUP_M)
    place = program % (GROUP_M * num_n)
    return first + place % height, place // height


@triton.jit
def _step(x, w, total, scale, GROUPED: tl.constexpr, CARRIED: tl.constexpr, NARROW: tl.constexpr):
    if GROUPED:
        return total + tl.dot(x, w.T, out_dtype=NARROW).to(tl.float32) * scale
    elif CARRIED:
        return tl.dot(x, w.T, total, out_dtype=NARROW)
    else:
        return total + tl.dot(x, w.T, out_dtype=NARROW).to(tl.float32)


@triton.jit
def sum_products(
    x_ptr,  # at the tile's first row: [.., K], contiguous
    x_scale_ptr,  # at the tile's first row: [.., G] fp32, contiguous
    w_ptr,  # at the tile's first column: [.., K], contiguous
    last_row,  # of x, counted from the tile's first
    last_column,  # row of w, counted from the tile's first
    WHOLE: tl.constexpr,  # no tile has columns past the end
    K: tl.constexpr,  # a multiple of 128
    GROUPED: tl.constexpr,  # G is K / 128; otherwise 1
    FP16_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides 128; 128 where GROUPED
    SPLIT: tl.constexpr,
):  # -> the products times x's scale, fp32: two halves [BLOCK_M, BLOCK_N / 2], or where not SPLIT the whole tile twice
    half: tl.constexpr = BLOCK_N // 2 if SPLIT else BLOCK_N
    is_int: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    narrow: tl.constexpr = tl.int32 if is_int else (tl.float16 if FP16_SUMS else tl.float32)
    carried: tl.constexpr = is_int or not FP16_SUMS  # one accumulator for all K
    total: tl.constexpr = tl.float32 if GROUPED or not carried else narrow

    # Rows and columns past the end repeat the last one; no epilogue stores them.
    m = tl.minimum(tl.arange(0, BLOCK_M), last_row)
    k = tl.arange(0, BLOCK_K)[None, :]
    x_at = x_ptr + m[:, None] * K + k
    n = tl.arange(0, half)
    low_at = w_ptr + (n if WHOLE else tl.minimum(n, last_column))[:, None] * K + k
    high_at = w_ptr + (half + n if WHOLE else tl.minimum(half + n, last_column))[:, None] * K + k
    scale_at = x_scale_ptr + m * (K // 128)

    low = tl.zeros((BLOCK_M, half), total)
    high = tl.zeros((BLOCK_M, half), total)
    for _ in range(0, K // BLOCK_K):
        x = tl.load(x_at)  # in bounds: rows up to the last, BLOCK_K divides K
        w_low = tl.load(low_at)  # in bounds: as x
        scale = tl.load(scale_at)[:, None] if GROUPED else 1.0  # in bounds: one scale per step
        low = _step(x, w_low, low, scale, GROUPED, carried, narrow)
        if SPLIT:
            w_high = tl.load(high_at)  # in bounds: as x
            high = _step(x, w_high, high, scale, GROUPED, carried, narrow)
        x_at += BLOCK_K
        low_at += BLOCK_K
        high_at += BLOCK_K
        scale_at += 1

    scale = 1.0 if GROUPED else tl.load(x_scale_ptr + m)[:, None]  # in bounds: rows up to the last
    low = low.to(tl.float32) * scale
    high = high.to(tl.float32) * scale if SPLIT else low
    return low, high


@triton.jit
def finish_half(
    y,  # [BLOCK_M, HALF] fp32: products times x's scale
    w_scale_ptr,  # [N] fp32, or None
    bias_ptr,  # [N], or None
    n,  # [HALF]: columns of y
    N,
):  # -> y with its weight's scale and the bias
    live = n < N
    if w_scale_ptr is not None:
        y *= tl.load(w_scale_ptr + n, mask=live, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=live, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def finish_tile(
    low,  # [BLOCK_M, HALF] fp32: products times x's scale
    high,  # the same of the columns beside them; unused unless SPLIT
    w_scale_ptr,  # [N] fp32, or None
    bias_ptr,  # [N], or None
    t_ptr,  # at the tile's first row: [.., R], contiguous, or None
    up_ptr,  # [N, R], contiguous
    last_row,  # of t, counted from the tile's first
    n,  # [HALF]: columns of low
    N,
    R,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
):  # -> both with their weight's scale, the bias and the low-rank term
    HALF: tl.constexpr = low.shape[1]
    low = finish_half(low, w_scale_ptr, bias_ptr, n, N)
    if SPLIT:
        high = finish_half(high, w_scale_ptr, bias_ptr, n + HALF, N)
    if t_ptr is not None:
        # Products that share an operand are laid out as those of the main loop are, and their sums need not be moved.
        m = tl.arange(0, BLOCK_M)[:, None]
        live = (n < N)[:, None]
        up_at = up_ptr + n.to(tl.int64)[:, None] * R
        for start in tl.range(0, R, 16, num_stages=1):
            r = start + tl.arange(0, 16)[None, :]
            t = tl.load(t_ptr + m * R + r, mask=(m <= last_row) & (r < R), other=0.0)
            up = tl.load(up_at + r, mask=live & (r < R), other=0.0)
            low = tl.dot(t, up.T, low)
            if SPLIT:
                up = tl.load(up_at + HALF * R + r, mask=(n + HALF < N)[:, None] & (r < R), other=0.0)
                high = tl.dot(t, up.T, high)
    return low, high


def matmul_reference(x: Quantized, weight: QuantizedWeight, bias: Tensor | None, low_rank: LowRank | None) -> Tensor:
    """The formula above in plain torch, [..., N] fp32: the truth of every 8-bit linear, and the path without a GPU."""
    inputs, outputs = weight.values.shape[1], weight.values.shape[0]
    values, scale = x.values.reshape(-1, inputs), x.scale.flatten(0, -2)
    groups = scale.shape[1]
    if values.dtype == torch.int8:
        y = torch.zeros(len(values), outputs, device=x.device)
        runs = zip(values.split(inputs // groups, 1), weight.values.split(inputs // groups, 1), strict=True)
        for g, (x_run, w_run) in enumerate(runs):
            y += _int_matmul(x_run, w_run).float() * scale[:, g : g + 1]
    else:
        wide = (values.float().unflatten(1, (groups, -1)) * scale[:, :, None]).flatten(1)
        y = wide @ weight.values.float().T
    y *= weight.scale
    if bias is not None:
        y += bias.float()
    if low_rank is not None:
        t, up = low_rank
        y += t.reshape(-1, up.shape[1]).float() @ up.float().T
    return y.view(*x.shape[:-1], outputs)


def _int_matmul(x: Tensor, w: Tensor) -> Tensor:
    """Multiply int8 by the transpose of int8, exactly."""
    if x.is_cuda:  # where torch's integer product asks for certain sizes
        return x.double() @ w.double().T
    return torch._int_mm(x, w.T)


def check_operands(x: Quantized, weight: QuantizedWeight, bias: Tensor | None, low_rank: LowRank | None) -> None:
    """Refuse operands that no 8-bit linear multiplies.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or one of x and the weight is rotated alone.
    """
    check_quantized(x, "x")
    values, scale = weight.values, weight.scale
    require(values.dtype in EIGHT_BIT, "weight.values: must be int8 or float8_e4m3fn", values.dtype)
    require(values.dtype == x.values.dtype, f"weight.values: must be {x.values.dtype}, like x", values.dtype)
    require(values.dim() == 2 and values.numel() > 0, "weight.values: must be [N, K], not empty", tuple(values.shape))
    outputs, inputs = values.shape
    require(inputs == x.shape[-1], f"weight.values: must have x's {x.shape[-1]} channels", tuple(values.shape))
    require(values.is_contiguous(), "weight.values: must be contiguous", f"strides {values.stride()}")
    check_vector(scale, "weight.scale", outputs, x.device)
    require(scale.dtype == torch.float32, "weight.scale: must be float32", scale.dtype)
    require(values.device == x.device, f"weight.values: must be on {x.device}, like x", values.device)
    require(weight.rotated == x.rotated, f"weight.rotated: must be {x.rotated}, like x", weight.rotated)
    check_terms(x, outputs, bias, low_rank)
    whole = inputs % GROUP == 0
    require(whole or not runs_triton(values), f"x: channels must be a multiple of {GROUP} on a GPU", inputs)


def check_terms(x: Quantized, outputs: int, bias: Tensor | None, low_rank: LowRank | None) -> None:
    """Refuse a bias or a low-rank term that does not fit tokens and outputs.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    if bias is not None:
        check_vector(bias, "bias", outputs, x.device)
    if low_rank is not None:
        _check_low_rank(x, outputs, *low_rank)


def check_vector(vector: Tensor, name: str, size: int, device: torch.device) -> None:
    """Refuse what is no [size] on the device.

    Raises:
        ValueError: a shape, dtype, stride or device is another.
    """
    require(tuple(vector.shape) == (size,), f"{name}: must be [{size}]", tuple(vector.shape))
    require(vector.dtype in COMPUTE_DTYPES, f"{name}: must be float32, bfloat16 or float16", vector.dtype)
    require(vector.is_contiguous(), f"{name}: must be contiguous", f"strides {vector.stride()}")
    require(vector.device == device, f"{name}: must be on {device}, like x", vector.device)


def _check_low_rank(x: Quantized, outputs: int, t: Tensor, up: Tensor) -> None:
    require(up.dim() == 2 and len(up) == outputs, f"up: must be [{outputs}, R]", tuple(up.shape))
    shape = (*x.shape[:-1], up.shape[1])
    require(tuple(t.shape) == shape, f"t: must be {shape}, x's tokens and up's rank", tuple(t.shape))
    for name, tensor in (("t", t), ("up", up)):
        require(tensor.dtype in (torch.bfloat16, torch.float16), f"{name}: must be bfloat16 or float16", tensor.dtype)
        require(tensor.is_contiguous(), f"{name}: must be contiguous", f"strides {tensor.stride()}")
        require(tensor.device == x.device, f"{name}: must be on {x.device}, like x", tensor.device)
    require(t.dtype == up.dtype, f"t: must be {up.dtype}, like up", t.dtype)


def launch_arguments(
    x: Quantized, weight: QuantizedWeight, bias: Tensor | None, low_rank: LowRank | None, epilogue: str
) -> tuple[Tile, dict[str, Any]]:
    """The tile of a launch, and the arguments, by name, that the kernels of all 8-bit linears take."""
    t, up = low_rank if low_rank is not None else (None, None)
    outputs, inputs = weight.values.shape
    grouped = x.scale.shape[-1] > 1
    generation = generation_of(x.device)
    tile = generation.tile(x.values.dtype, epilogue, grouped=grouped, low_rank=up is not None)
    return tile, {
        "x_ptr": x.values,
        "x_scale_ptr": x.scale,
        "w_ptr": weight.values,
        "w_scale_ptr": weight.scale,
        "bias_ptr": bias,
        "t_ptr": t,
        "up_ptr": up,
        "N": outputs,
        "K": inputs,
        "R": 0 if up is None else up.shape[1],
        "GROUPED": grouped,
        "FP16_SUMS": generation.fp16_sums and x.values.dtype == torch.float8_e4m3fn,
        **tile.constants(),
    }
