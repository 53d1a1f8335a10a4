"""Gated residual: what a block computed, weighted by the gate the timestep predicts, added to the residual stream.

    out[b, t, :] = x[b, t, :] + gate[b, r, :] * y[b, t, :]
    r = 0 for t < first_tokens, else the last row

Grid       (B * T,), one program per token.
Tile       a token in registers, in two power-of-two parts (see _tiles.py); C <= 8192.
Numerics   in fp32, rounded once, on the store.
Traffic    B*T*C elements each of x and y read and of out written; the gate rows stay in cache. Bandwidth-bound.
Reference  gated_residual_reference, below.
Source     Wan-Video/Wan2.2, wan/modules/model.py, WanAttentionBlock.forward.
"""

import torch
from torch import Tensor

from ._checks import check_channels, check_modulation, require
from ._launch import on_device_of, runs_triton, tl, triton
from ._rows import row_strides, split_tokens
from ._tiles import MAX_CHANNELS, row_tile


def gated_residual_reference(
    x: Tensor, y: Tensor, gate: Tensor, *, first_tokens: int = 0, overwrite: bool = False
) -> Tensor:
    """The formula above in plain torch: the truth the kernel is held to, and the path without a GPU."""
    wide = y.float()
    if overwrite and x.dtype == torch.float32:
        out = x
    elif wide is y:
        out = torch.empty_like(wide)
    else:
        out = wide  # a widened copy of y is free to take the result
    tokens = (split_tokens(tensor, gate.shape[1], first_tokens) for tensor in (x, wide, out))
    for r, (x_run, y_run, out_run) in enumerate(zip(*tokens, strict=True)):
        torch.addcmul(x_run.float(), y_run, gate[:, r : r + 1].float(), out=out_run)
    return x.copy_(out) if overwrite else out.to(x.dtype)


@triton.jit(do_not_specialize=["T", "first_tokens"])
def _gated_residual_kernel(
    x_ptr,  # [B, T, C], contiguous
    y_ptr,  # [B, T, C], contiguous
    gate_ptr,  # [B, R, C], channels adjacent; R is 1 or 2
    out_ptr,  # [B, T, C], contiguous; may be x: a program has read its token before it stores
    T,
    first_tokens,  # tokens that take gate row 0
    gate_stride_b,
    gate_stride_r,  # from row 0 to the last row; 0 where R is 1
    C: tl.constexpr,
    HEAD: tl.constexpr,  # power of two, at most C
    TAIL: tl.constexpr,  # power of two, HEAD + TAIL at least C
):
    token = tl.program_id(0).to(tl.int64)  # b * T + t
    b, t = token // T, token % T
    r = tl.where(t < first_tokens, 0, 1)
    row = token * C
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    live = tail < C

    gate_row = gate_ptr + b * gate_stride_b + r * gate_stride_r
    x_head = tl.load(x_ptr + row + head).to(tl.float32)  # in bounds: HEAD <= C
    y_head = tl.load(y_ptr + row + head).to(tl.float32)  # in bounds: HEAD <= C
    gate_head = tl.load(gate_row + head).to(tl.float32)  # in bounds: HEAD <= C
    x_tail = tl.load(x_ptr + row + tail, mask=live, other=0.0).to(tl.float32)
    y_tail = tl.load(y_ptr + row + tail, mask=live, other=0.0).to(tl.float32)
    gate_tail = tl.load(gate_row + tail, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + head, x_head + gate_head * y_head)  # in bounds: HEAD <= C
    tl.store(out_ptr + row + tail, x_tail + gate_tail * y_tail, mask=live)


def gated_residual_triton(
    x: Tensor, y: Tensor, gate: Tensor, *, first_tokens: int = 0, overwrite: bool = False
) -> Tensor:
    """Launch the kernel on checked arguments."""
    out = x if overwrite else torch.empty_like(x)
    batch, tokens, channels = x.shape
    tile = row_tile(channels)
    with on_device_of(x):
        _gated_residual_kernel[(batch * tokens,)](
            x,
            y,
            gate,
            out,
            tokens,
            first_tokens,
            *row_strides(gate),
            C=channels,
            HEAD=tile.head,
            TAIL=tile.tail,
            num_warps=tile.num_warps,
        )
    return out


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, first_tokens: int = 0, overwrite: bool = False) -> Tensor:
    """Add `gate * y` to the residual stream, each token with the gate row it belongs to.

    Args:
        x: [B, T, C], the residual stream, contiguous; float32, bfloat16 or float16; C <= 8192.
        y: [B, T, C], what the block computed, contiguous, any of those dtypes, on x's device.
        gate: [B, R, C], channels adjacent, any of those dtypes, on x's device. R is 1 (one timestep per sample) or 2
            (the first tokens have a timestep of their own). Slices and expanded batches are fine.
        first_tokens: tokens [0, first_tokens) take row 0, the others the last row; of no effect where R is 1.
        overwrite: return the result in x's memory.

    Returns:
        [B, T, C] in x's dtype, rounded once from fp32. Nothing is written to unless `overwrite`.

    Raises:
        ValueError: a shape, dtype, stride, device or first_tokens is not as above.
    """
    check_channels(x, "x", max_channels=MAX_CHANNELS)
    check_channels(y, "y", max_channels=MAX_CHANNELS)
    require(y.shape == x.shape, f"y: must have x's shape {tuple(x.shape)}", tuple(y.shape))
    require(y.device == x.device, f"y: must be on {x.device}, like x", y.device)
    check_modulation(x, gate, "gate", first_tokens)
    run = gated_residual_triton if runs_triton(x) else gated_residual_reference
    return run(x, y, gate, first_tokens=first_tokens, overwrite=overwrite)
