"""Calls into the C++ extension (csrc/): tensors that the callers have checked become addresses and sizes.

Frames are [B, C, T, H, W] in channels_last_3d, fp32 or bf16, on the CPU. As many threads as torch has compute.
"""

import torch
from torch import Tensor

try:
    from wanfast import _C as _C
except ImportError:  # installed without a compiler
    _C = None  # type: ignore[assignment]


def instruction_sets() -> list[str]:
    """Name what the extension can use on this CPU, the best first; nothing where it was not built."""
    return [] if _C is None else _C.instruction_sets()


def serves(dtype: torch.dtype) -> bool:
    """Whether the extension is the faster way to compute in this dtype on this CPU.

    In bf16 torch is, where it has matrix units (AMX) or where the extension has no vectors of x86.
    """
    if _C is None or dtype not in (torch.float32, torch.bfloat16):
        return False
    return dtype == torch.float32 or (_C.instruction_sets() != ["portable"] and not _C.has_bf16_matrices())


def pack(weight: Tensor, *, as_pairs: bool | None = None) -> Tensor:
    """Lay weights out as csrc/causal_conv3d.h says.

    Args:
        weight: [sets, O, C, kt, kh, kw], fp32 or bf16.
        as_pairs: multiply bf16 in pairs, or else in fp32; None is the faster that this CPU can. Of no meaning in fp32.

    Returns:
        [sets, slots], bf16 in pairs or else fp32.
    """
    if as_pairs is None:
        as_pairs = weight.dtype == torch.bfloat16 and _C.has_bf16_products()
    dtype = torch.bfloat16 if as_pairs else torch.float32
    weight = weight.to(dtype).contiguous()
    sets, out_channels, channels, *kernel = weight.shape
    format, taps = _C.Format.bf16_pairs if as_pairs else _C.Format.fp32, torch.Size(kernel).numel()
    slots = _C.packed_slots(out_channels=out_channels, channels=channels, taps=taps, format=format)
    packed = torch.empty((sets, slots * (2 if as_pairs else 1)), dtype=dtype)
    for source, target in zip(weight, packed, strict=True):
        _C.pack_weight(
            weight=source.data_ptr(),
            packed=target.data_ptr(),
            out_channels=out_channels,
            channels=channels,
            taps=taps,
            format=format,
        )
    return packed


def convolve(
    x: Tensor,
    history: Tensor | None,
    packed: Tensor,
    shape: tuple[int, int, int, int, int],
    form: str,
    bias: Tensor | None,
    y: Tensor,
    *,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    instruction_set: str = "auto",
    method: str = "fastest",
) -> None:
    """Write a convolution's result to y.

    Args:
        x: the chunk.
        history: the frames before it, or None.
        packed: of `pack`.
        shape: O, C, kt, kh, kw.
        form: one of the names of `_C.Form`.
        bias: [O] or None.
        y: in x's dtype; may be the residual.
        residual: added; y's shape, dtype and layout.
        norm: [O, ...], or None: the norm's weight that y goes through, and SiLU after it.
        instruction_set: one of `instruction_sets()`; "auto" is the first.
        method: one of the names of `_C.Method`.

    Raises:
        ValueError: an instruction set that this CPU lacks, or a method that does not serve the form or the format.
    """
    out_channels, channels, kt, kh, kw = shape
    batch, _, frames, height, width = x.shape
    bias = torch.zeros(out_channels, dtype=torch.float32) if bias is None else _as_fp32(bias)
    norm = None if norm is None else _as_fp32(norm)
    _C.causal_conv3d(
        x=x.data_ptr(),
        history=0 if history is None else history.data_ptr(),
        packed=packed.data_ptr(),
        bias=bias.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        norm=0 if norm is None else norm.data_ptr(),
        y=y.data_ptr(),
        batch=batch,
        channels=channels,
        out_channels=out_channels,
        frames=frames,
        history_frames=0 if history is None else history.shape[2],
        height=height,
        width=width,
        kt=kt,
        kh=kh,
        kw=kw,
        form=getattr(_C.Form, form),
        format=_format(x.dtype, packed.dtype),
        num_threads=torch.get_num_threads(),
        instruction_set=instruction_set,
        method=getattr(_C.Method, method),
    )


def norm_silu(x: Tensor, weight: Tensor, y: Tensor, *, instruction_set: str = "auto") -> None:
    """Write RMS norm over channels, then SiLU, to y, which may be x.

    Args:
        x: frames.
        weight: [C, ...], times sqrt(C).
        y: x's shape, dtype and layout.
        instruction_set: as in `convolve`.

    Raises:
        ValueError: an instruction set that this CPU lacks.
    """
    weight = _as_fp32(weight)
    _C.norm_silu(
        x=x.data_ptr(),
        norm=weight.data_ptr(),
        y=y.data_ptr(),
        pixels=x.numel() // x.shape[1],
        channels=x.shape[1],
        format=_format(x.dtype, torch.float32),
        num_threads=torch.get_num_threads(),
        instruction_set=instruction_set,
    )


def _as_fp32(values: Tensor) -> Tensor:
    return values.detach().to(torch.float32).flatten().contiguous()


def _format(frames: torch.dtype, weights: torch.dtype) -> "_C.Format":
    if frames == torch.float32:
        return _C.Format.fp32
    return _C.Format.bf16_pairs if weights == torch.bfloat16 else _C.Format.bf16_widened
