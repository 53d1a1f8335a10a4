"""What the kernels share that normalise and turn queries and keys: their formula, device code and checks."""

import torch
from torch import Tensor

from ._checks import COMPUTE_DTYPES, check_weight, require
from ._launch import tl, triton
from ._tiles import MAX_CHANNELS

MIN_CHANNELS = 4  # both parts of a row then hold whole pairs


def turned_reference(x: Tensor, weight: Tensor, rotations: Tensor, *, eps: float) -> Tensor:
    """RMS norm of x [B, T, C] as Wan rounds it, then the rotation of its channel pairs: [B, T, N, D] fp32."""
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # spares a tensor of squares
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = (wide * rstd).to(x.dtype) * weight
    pairs = torch.view_as_complex(normed.float().unflatten(-1, (-1, rotations.shape[-1], 2)))
    return torch.view_as_real(pairs * rotations[:, None]).flatten(-2)


@triton.jit
def normed(
    x,  # [E], as stored
    rstd,  # fp32
    weight,  # [E], as stored
):  # -> [E] fp32: x * rstd, rounded to x's dtype, times weight, rounded as torch's product of the two would be
    y = (x.to(tl.float32) * rstd).to(x.dtype).to(tl.float32) * weight.to(tl.float32)
    if x.dtype == weight.dtype:
        y = y.to(x.dtype).to(tl.float32)
    return y


@triton.jit
def turned(
    y,  # [E] fp32, E even: channel pairs, each a complex number
    rotation,  # [E] fp32: what each pair is multiplied by, cos and sin in turn
):  # -> [E] fp32
    E: tl.constexpr = y.shape[0]
    even, odd = tl.split(tl.reshape(y, (E // 2, 2)))
    cos, sin = tl.split(tl.reshape(rotation, (E // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (E,))


def head_dim_of(rotations: Tensor) -> int:
    """Channels of one head, D, from rotations [T, D / 2]."""
    return 2 * rotations.shape[-1]


def row_strides(x: Tensor) -> tuple[int, int]:
    """Strides of x [B, T, ...] from one sample to the next, and from one token to the next."""
    return x.stride(0), x.stride(1)


def check_turned(x: Tensor, weight: Tensor, rotations: Tensor) -> None:
    """Refuse queries or keys, a weight or rotations that do not fit together.

    Raises:
        ValueError: a shape, dtype, stride or device is not as the kernels want it.
    """
    require(x.dtype in COMPUTE_DTYPES, "x: must be float32, bfloat16 or float16", x.dtype)
    require(x.dim() == 3, "x: must be [B, T, C]", tuple(x.shape))
    channels = x.shape[-1]
    fits = MIN_CHANNELS <= channels <= MAX_CHANNELS
    require(fits, f"x: must have {MIN_CHANNELS} to {MAX_CHANNELS} channels", channels)
    require(x.stride(-1) == 1, "x: channels must be adjacent in memory", f"strides {x.stride()}")
    check_weight(x, weight, "weight")
    require(rotations.dtype == torch.complex64, "rotations: must be complex64", rotations.dtype)
    shape = tuple(rotations.shape)
    fits = len(shape) == 2 and shape[0] == x.shape[1] and shape[1] > 0 and channels % (2 * shape[1]) == 0
    require(fits, f"rotations: must be [{x.shape[1]}, D / 2], D a divisor of x's {channels} channels", shape)
    require(rotations.is_contiguous(), "rotations: must be contiguous", f"strides {rotations.stride()}")
    require(not rotations.is_conj(), "rotations: must hold their values, not a conjugate's view", "a lazy conjugate")
    require(rotations.device == x.device, f"rotations: must be on {x.device}, like x", rotations.device)


def check_heads_out(x: Tensor, rotations: Tensor, out: Tensor) -> None:
    """Refuse memory for a result that the kernels cannot write heads of x to.

    Raises:
        ValueError: out is not [B, T, N, D] of a supported dtype on x's device with the channels of a token adjacent.
    """
    head_dim = head_dim_of(rotations)
    shape = (*x.shape[:2], x.shape[-1] // head_dim, head_dim)
    require(tuple(out.shape) == shape, f"out: must be {shape}", tuple(out.shape))
    require(out.dtype in COMPUTE_DTYPES, "out: must be float32, bfloat16 or float16", out.dtype)
    adjacent = out.stride(-1) == 1 and (shape[2] == 1 or out.stride(-2) == head_dim)
    require(adjacent, "out: the heads of a token must be adjacent in memory", f"strides {out.stride()}")
    require(out.device == x.device, f"out: must be on {x.device}, like x", out.device)
