"""How far a video is from another one: PSNR, SSIM and the worst pixel, on the 8-bit frames that would be written."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Frames = npt.NDArray[np.uint8]

PEAK = 255.0
WINDOW, SIGMA = 11, 1.5
_C1, _C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One video against another."""

    psnr: float | None  # dB over all pixels of all frames; None where no pixel differs, which would be infinite
    ssim: float  # mean over frames, channels and windows; 1 for equal videos
    worst_pixel: int  # largest difference of any channel of any pixel, of 255
    worst_frame: int  # that holds it; the first one

    @property
    def is_identical(self) -> bool:
        """Whether no pixel differs."""
        return self.worst_pixel == 0


def compare_videos(got: Frames, want: Frames) -> Difference:
    """Measure how far one video is from another.

    Args:
        got: uint8 [F, H, W, 3].
        want: of the same shape.

    Returns:
        The difference.

    Raises:
        ValueError: the shapes or dtypes are not as above, or a side is shorter than SSIM's window of 11 pixels.
    """
    for name, frames in (("got", got), ("want", want)):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
            raise ValueError(f"{name}: must be uint8 [F, H, W, 3], got {frames.dtype} {frames.shape}")
    if got.shape != want.shape:
        raise ValueError(f"got: must have the shape of want, {want.shape}, got {got.shape}")
    if min(got.shape[1:3]) < WINDOW:
        raise ValueError(f"got: must be at least {WINDOW} pixels high and wide, got {got.shape[1]} x {got.shape[2]}")
    squares, similarity, worst = 0, 0.0, []
    for one, other in zip(got, want, strict=True):  # frame by frame: a whole video in float64 would be gigabytes
        apart = one.astype(np.int32) - other.astype(np.int32)
        squares += int(np.square(apart).sum(dtype=np.int64))
        worst.append(int(np.abs(apart).max()))
        similarity += ssim(_channels(one), _channels(other))
    mean_square = squares / got.size
    return Difference(
        psnr=None if squares == 0 else 10 * math.log10(PEAK**2 / mean_square),
        ssim=similarity / len(got),
        worst_pixel=max(worst),
        worst_frame=worst.index(max(worst)),
    )


def ssim(x: Tensor, y: Tensor) -> float:
    """Measure the structural similarity of pictures, averaged over all windows that lie inside.

    Means, variances and the covariance are weighted by a Gaussian of 11 x 11 pixels, sigma 1.5; K1 = 0.01, K2 = 0.03.

    Args:
        x: [C, H, W] float64, values in [0, 255].
        y: of the same shape.

    Source: Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment: from error visibility to structural
        similarity", equation 13.
    """
    taps = torch.exp(-torch.arange(-(WINDOW // 2), WINDOW // 2 + 1, dtype=torch.float64).square() / (2 * SIGMA**2))
    taps /= taps.sum()
    maps = torch.stack([x, y, x * x, y * y, x * y])  # [5, C, H, W]
    blurred = F.conv2d(maps.flatten(0, 1)[:, None], taps[None, None, :, None])
    blurred = F.conv2d(blurred, taps[None, None, None, :])
    mean_x, mean_y, square_x, square_y, product = blurred.view(*maps.shape[:2], *blurred.shape[2:])
    variances = (square_x - mean_x * mean_x) + (square_y - mean_y * mean_y)
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x * mean_x + mean_y * mean_y + _C1)
    return float((luminance * (2 * covariance + _C2) / (variances + _C2)).mean())


def _channels(frame: Frames) -> Tensor:
    return torch.from_numpy(frame).permute(2, 0, 1).double()
