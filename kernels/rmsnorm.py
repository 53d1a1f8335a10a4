"""RMS norm over all channels, as Wan normalises queries and keys before it splits them into heads.

    y[r, :] = round(x[r, :] * rsqrt(mean(x[r, :]^2) + eps)) * weight        round: to x's dtype

Grid       (R,), one program per row; R is the product of all axes but the last.
Tile       a row in registers, in two power-of-two parts (see _tiles.py); C <= 8192.
Numerics   mean square and scaling in fp32; rounded to x's dtype before the weight, and once more on the store.
           A bf16 row with an fp32 weight gives fp32, as in torch.
Traffic    R*C elements of x read and R*C of y written; bandwidth-bound.
Reference  rms_norm_reference, below.
Source     Wan-Video/Wan2.2, wan/modules/model.py, WanRMSNorm.
"""

import torch
from torch import Tensor

from ._checks import check_channels, check_weight
from ._launch import on_device_of, runs_triton, tl, triton
from ._tiles import MAX_CHANNELS, row_tile


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # spares a tensor of squares
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = torch.mul(wide, rstd, out=None if wide is x else wide).to(x.dtype)  # a widened copy is free to take the result
    return y.mul_(weight) if y.dtype == torch.promote_types(x.dtype, weight.dtype) else y * weight


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [R, C], contiguous
    weight_ptr,  # [C], contiguous
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

    x_head = tl.load(x_ptr + row + head)  # in bounds: HEAD <= C
    x_tail = tl.load(x_ptr + row + tail, mask=live, other=0.0)
    weight_head = tl.load(weight_ptr + head).to(tl.float32)  # in bounds: HEAD <= C
    weight_tail = tl.load(weight_ptr + tail, mask=live, other=0.0).to(tl.float32)

    wide_head, wide_tail = x_head.to(tl.float32), x_tail.to(tl.float32)
    square = tl.sum(wide_head * wide_head, 0) + tl.sum(wide_tail * wide_tail, 0)
    rstd = tl.rsqrt(square / C + eps)
    y_head = (wide_head * rstd).to(x_head.dtype).to(tl.float32) * weight_head
    y_tail = (wide_tail * rstd).to(x_tail.dtype).to(tl.float32) * weight_tail
    tl.store(y_ptr + row + head, y_head)  # in bounds: HEAD <= C
    tl.store(y_ptr + row + tail, y_tail, mask=live)


def rms_norm_triton(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Launch the kernel on checked arguments."""
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    tile = row_tile(x.shape[-1])
    grid = (x.numel() // x.shape[-1],)
    with on_device_of(x):
        _rms_norm_kernel[grid](
            x, weight, y, eps, C=x.shape[-1], HEAD=tile.head, TAIL=tile.tail, num_warps=tile.num_warps
        )
    return y


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Scale each row to unit root-mean-square over its channels, then by the weight.

    Args:
        x: [..., C], contiguous; float32, bfloat16 or float16; C <= 8192.
        weight: [C], contiguous, any of those dtypes, on x's device.
        eps: added to the mean square, in units of x squared.

    Returns:
        [..., C] in the dtype that x's and weight's promote to. x is not written to.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.
    """
    check_channels(x, "x", max_channels=MAX_CHANNELS)
    check_weight(x, weight, "weight")
    return rms_norm_triton(x, weight, eps=eps) if runs_triton(x) else rms_norm_reference(x, weight, eps=eps)
