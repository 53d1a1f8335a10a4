"""The norms of the VAEs: RMS norm over a pixel's channels, alone and with the SiLU that follows most of them.

Paths      a GPU                       kernels/rms_norm_silu.py
           a CPU, fp32 and bf16        csrc/: one pass, where torch's chain takes five
           everything else             torch
Source     Wan-Video/Wan2.2, wan/modules/vae2_1.py, RMS_norm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wanfast import kernels
from wanfast.kernels.rms_norm_silu import pixel_strides
from wanfast.vae import extension

_SMALLEST_NORM = 1e-12


def rms_norm(x: Tensor, weight: Tensor, *, overwrite: bool = False) -> Tensor:
    """Divide by the length of the channel vector, and multiply by the weight.

    Args:
        x: [B, C, ...]; written to if `overwrite`.
        weight: [C, 1, ...], times sqrt(C), in x's dtype.
        overwrite: return the result in x's memory.

    Returns:
        x's shape and dtype; the length is summed in fp32.
    """
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    scale = length.clamp_min_(_SMALLEST_NORM).reciprocal_().to(x.dtype)
    return torch.mul(x, scale, out=x if overwrite else None).mul_(weight)


def norm_silu(x: Tensor, weight: Tensor, *, overwrite: bool = False) -> Tensor:
    """Apply `rms_norm`, then SiLU, with no memory besides the result's."""
    if x.is_cuda and pixel_strides(x) is not None:
        return kernels.rms_norm_silu(x, weight, overwrite=overwrite)
    if x.device.type == "cpu" and extension.serves(x.dtype) and _is_channels_last(x):
        y = x if overwrite else torch.empty_like(x)
        extension.norm_silu(x, weight, y)
        return y
    return F.silu(rms_norm(x, weight, overwrite=overwrite), inplace=True)


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
