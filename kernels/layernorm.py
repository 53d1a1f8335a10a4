"""Layer norm with a learned weight and bias, as before Wan's cross-attention.

    y[r, :] = (x[r, :] - mean) * rsqrt(var + eps) * weight + bias           var: biased, over the row

Grid       (R,), one program per row; R is the product of all axes but the last.
Tile       a row in registers, in two power-of-two parts (see _tiles.py); C <= 8192.
Numerics   reduce and scale in fp32, two-pass variance, rounded once, on the store.
Traffic    R*C elements of x read and R*C of y written; bandwidth-bound.
Reference  layer_norm_reference, below.
Source     Wan-Video/Wan2.2, wan/modules/model.py, WanLayerNorm with elementwise_affine (norm3).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_channels, check_out_dtype, check_weight
from ._launch import on_device_of, runs_triton, tl, triton
from ._tiles import MAX_CHANNELS, row_tile


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(out_dtype or x.dtype)


@triton.jit
def _layer_norm_kernel(
    x_ptr,  # [R, C], contiguous
    weight_ptr,  # [C], contiguous
    bias_ptr,  # [C], contiguous
    y_ptr,  # [R, C], contiguous
    eps,
    C: tl.constexpr,
    HEAD: tl.constexpr,  # power of two, at most C
    TAIL: tl.constexpr,  # power of two, HEAD + TAIL at least C
):
    row = tl.program_id(0).to(tl.int64) * C
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    live = tail < C

    x_head = tl.load(x_ptr + row + head).to(tl.float32)  # in bounds: HEAD <= C
    x_tail = tl.load(x_ptr + row + tail, mask=live, other=0.0).to(tl.float32)
    mean = (tl.sum(x_head, 0) + tl.sum(x_tail, 0)) / C
    x_head -= mean
    x_tail = tl.where(live, x_tail - mean, 0.0)  # dead lanes must not reach the variance
    variance = (tl.sum(x_head * x_head, 0) + tl.sum(x_tail * x_tail, 0)) / C
    rstd = tl.rsqrt(variance + eps)

    weight_head = tl.load(weight_ptr + head).to(tl.float32)  # in bounds: HEAD <= C
    weight_tail = tl.load(weight_ptr + tail, mask=live, other=0.0).to(tl.float32)
    bias_head = tl.load(bias_ptr + head).to(tl.float32)  # in bounds: HEAD <= C
    bias_tail = tl.load(bias_ptr + tail, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr + row + head, x_head * rstd * weight_head + bias_head)  # in bounds: HEAD <= C
    tl.store(y_ptr + row + tail, x_tail * rstd * weight_tail + bias_tail, mask=live)


def layer_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Launch the kernel on checked arguments."""
    y = torch.empty_like(x, dtype=out_dtype or x.dtype)
    tile = row_tile(x.shape[-1])
    grid = (x.numel() // x.shape[-1],)
    with on_device_of(x):
        _layer_norm_kernel[grid](
            x, weight, bias, y, eps, C=x.shape[-1], HEAD=tile.head, TAIL=tile.tail, num_warps=tile.num_warps
        )
    return y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """Normalise each row over its channels, then apply the weight and bias.

    Args:
        x: [..., C], contiguous; float32, bfloat16 or float16; C <= 8192.
        weight: [C], contiguous, any of those dtypes, on x's device.
        bias: like weight.
        eps: added to the variance, in units of x squared.
        out_dtype: of the result; x's dtype where None.

    Returns:
        [..., C] in out_dtype, rounded once from fp32. x is not written to.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.
    """
    check_channels(x, "x", max_channels=MAX_CHANNELS)
    check_weight(x, weight, "weight")
    check_weight(x, bias, "bias")
    check_out_dtype(out_dtype)
    run = layer_norm_triton if runs_triton(x) else layer_norm_reference
    return run(x, weight, bias, eps=eps, out_dtype=out_dtype)
