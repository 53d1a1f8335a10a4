"""Decoded frames become pixels on the host; on a GPU the copy runs while the next frames are being computed."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from wanfast.errors import NotFiniteError


def to_uint8(frames: Tensor) -> Tensor:
    """Turn decoded frames into pixels: clamp to [-1, 1], scale to [0, 255], drop the fraction as the reference does.

    Args:
        frames: [1, 3, F, H, W], any float dtype and device.

    Returns:
        uint8 [F, H, W, 3], RGB, contiguous, CPU.

    Raises:
        ValueError: frames have another shape.
        NotFiniteError: a value is NaN or infinite; it would become a black or white pixel without a word.

    Source: Wan-Video/Wan2.2, wan/utils/utils.py, save_video.
    """
    (pixels,) = on_host((frames,))
    return pixels


def on_host(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Turn chunk after chunk into pixels on the host, as `to_uint8` does with one.

    From a GPU they come one behind: while a chunk is waited for, the next one is being computed. Each is copied into
    pinned memory of its own, which torch keeps for the next once it is let go.

    Args:
        chunks: [1, 3, F, H, W] each, F any.

    Yields:
        uint8 [F, H, W, 3], contiguous, CPU, complete.

    Raises:
        ValueError, NotFiniteError: as in `to_uint8`.
    """
    under_way: _Copy | None = None
    for frames in chunks:
        if frames.device.type != "cuda":
            yield _checked(_to_pixels(frames).cpu(), is_finite=bool(frames.isfinite().all()))
            continue
        before, under_way = under_way, _Copy(frames)
        if before is not None:
            yield before.result()
    if under_way is not None:
        yield under_way.result()


class _Copy:
    """A chunk on its way to the host."""

    def __init__(self, frames: Tensor) -> None:
        """Start, behind what computes the frames; nothing is waited for."""
        pixels = _to_pixels(frames)
        is_finite = frames.isfinite().all()
        self._pixels = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
        self._is_finite = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._pixels.copy_(pixels, non_blocking=True)
        self._is_finite.copy_(is_finite, non_blocking=True)
        self._end: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._end.record(torch.cuda.current_stream(frames.device))

    def result(self) -> Tensor:
        """Wait for the end of the copy, and give the pixels."""
        self._end.synchronize()
        return _checked(self._pixels, is_finite=bool(self._is_finite))


def _to_pixels(frames: Tensor) -> Tensor:
    if frames.ndim != 5 or frames.shape[:2] != (1, 3):
        raise ValueError(f"frames: must be [1, 3, frames, height, width], got {list(frames.shape)}")
    pixels = frames[0].float().clamp(-1, 1).add(1).div(2).mul(255).to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).contiguous()


def _checked(pixels: Tensor, *, is_finite: bool) -> Tensor:
    if not is_finite:
        raise NotFiniteError("frames: must be finite, got NaN or infinity from the decoder; precision fp32 may work")
    return pixels
