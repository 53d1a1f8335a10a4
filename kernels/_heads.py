"""What attention's operands look like: tokens of several heads, as projections write them."""

import torch
from torch import Tensor

from ._checks import COMPUTE_DTYPES, require

HEAD_DIMS = (64, 128)


def check_heads(x: Tensor, name: str) -> None:
    """Refuse a tensor that is not [B, T, N, D] with the channels of a head adjacent; other strides are free.

    Args:
        x: to be [B, T, N, D], float32, bfloat16 or float16; D 64 or 128.
        name: of the argument.

    Raises:
        ValueError: a shape, dtype or stride is not as above.
    """
    require(x.dtype in COMPUTE_DTYPES, f"{name}: must be float32, bfloat16 or float16", x.dtype)
    require(x.dim() == 4 and x.numel() > 0, f"{name}: must be [B, T, N, D], none of them 0", tuple(x.shape))
    require(x.shape[-1] in HEAD_DIMS, f"{name}: head dimension must be 64 or 128", x.shape[-1])
    require(x.stride(-1) == 1, f"{name}: channels must be adjacent in memory", f"strides {x.stride()}")


def check_has_e4m3(dtype: torch.dtype, x: Tensor, name: str) -> None:
    """Refuse e4m3 on a GPU that cannot compute in it.

    Raises:
        ValueError: dtype is float8_e4m3fn, and x is on a GPU older than compute capability 8.9.
    """
    if dtype == torch.float8_e4m3fn and x.is_cuda:
        capability = torch.cuda.get_device_capability(x.device)
        require(capability >= (8, 9), f"{name}: float8_e4m3fn needs compute capability 8.9; use float16", capability)
