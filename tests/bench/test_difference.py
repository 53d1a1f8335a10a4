"""The difference of two videos, held to closed forms, to windows computed one by one, and to scikit-image's number."""

import math

import numpy as np
import pytest
import torch

from wanfast.bench.difference import SIGMA, WINDOW, compare_videos, ssim

RNG = np.random.default_rng(0)


def video(height: int = 20, width: int = 33, frames: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def ssim_window_by_window(x: np.ndarray, y: np.ndarray) -> float:
    """Equation 13 of the paper as it stands, over every window that lies inside; x and y [H, W] float64."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * SIGMA**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for row in range(x.shape[0] - WINDOW + 1):
        for column in range(x.shape[1] - WINDOW + 1):
            a, b = (z[row : row + WINDOW, column : column + WINDOW] for z in (x, y))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            variance_a, variance_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
            values.append(top / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)))
    return float(np.mean(values))


def test_equal_videos_are_identical() -> None:
    frames = video()
    found = compare_videos(frames, frames.copy())
    assert (found.psnr, found.worst_pixel, found.is_identical) == (None, 0, True)
    assert found.ssim == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("by", [1, 7, 100])
def test_psnr_of_a_constant_shift_is_its_formula(by: int) -> None:
    frames = video() // 2
    found = compare_videos(frames + np.uint8(by), frames)
    assert found.psnr == pytest.approx(20 * math.log10(255 / by), abs=1e-9)
    assert found.worst_pixel == by


def test_one_pixel_is_found_where_it_is() -> None:
    want = video(frames=4)
    got = want.copy()
    got[2, 5, 6, 1] = 255 if want[2, 5, 6, 1] < 128 else 0
    apart = abs(int(got[2, 5, 6, 1]) - int(want[2, 5, 6, 1]))
    found = compare_videos(got, want)
    assert (found.worst_pixel, found.worst_frame, found.is_identical) == (apart, 2, False)
    assert found.psnr == pytest.approx(10 * math.log10(255**2 * want.size / apart**2), abs=1e-9)


def test_differences_do_not_wrap_around() -> None:
    black, white = np.zeros((1, 16, 16, 3), np.uint8), np.full((1, 16, 16, 3), 255, np.uint8)
    for found in (compare_videos(black, white), compare_videos(white, black)):
        assert (found.worst_pixel, found.psnr) == (255, pytest.approx(0, abs=1e-12))


@pytest.mark.parametrize(("a", "b"), [(0, 255), (100, 101), (10, 200)])
def test_ssim_of_flat_pictures_is_their_luminance_term(a: int, b: int) -> None:
    one, other = (torch.full((3, 16, 20), float(value), dtype=torch.float64) for value in (a, b))
    c1 = (0.01 * 255) ** 2
    assert ssim(one, other) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-9)


@pytest.mark.parametrize("size", [(11, 11), (14, 23)])
def test_ssim_is_its_equation_in_every_window(size: tuple[int, int]) -> None:
    x = RNG.uniform(0, 255, (2, *size))
    y = np.clip(x + RNG.normal(0, 30, x.shape), 0, 255)
    want = np.mean([ssim_window_by_window(a, b) for a, b in zip(x, y, strict=True)])
    assert ssim(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(want, abs=1e-10)


def test_ssim_is_scikit_images() -> None:
    """0.26, structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)."""
    rows, columns = np.mgrid[0:24, 0:40]
    one = (rows * 7 + columns * 3) % 256
    other = (rows * 7 + columns * 3 + (rows * columns) % 13) % 256
    got, want = (np.repeat(z.astype(np.uint8)[None, :, :, None], 3, axis=3) for z in (other, one))
    assert compare_videos(got, want).ssim == pytest.approx(0.9424035902307207, abs=1e-9)


def test_frames_and_channels_weigh_the_same() -> None:
    want = video(frames=2)
    got = want.copy()
    got[1, :, :, 2] = 128
    alone = compare_videos(got[1:], want[1:]).ssim
    assert compare_videos(got, want).ssim == pytest.approx((1 + alone) / 2, abs=1e-12)


@pytest.mark.parametrize(
    ("got", "want", "named"),
    [
        (np.zeros((1, 16, 16, 3)), np.zeros((1, 16, 16, 3), np.uint8), "got: must be uint8"),
        (np.zeros((1, 16, 16, 3), np.uint8), np.zeros((2, 16, 16, 3), np.uint8), "shape of want"),
        (np.zeros((1, 16, 10, 3), np.uint8), np.zeros((1, 16, 10, 3), np.uint8), "at least 11 pixels"),
        (np.zeros((0, 16, 16, 3), np.uint8), np.zeros((0, 16, 16, 3), np.uint8), "got: must be uint8"),
    ],
)
def test_what_cannot_be_compared_is_refused(got: np.ndarray, want: np.ndarray, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        compare_videos(got, want)
