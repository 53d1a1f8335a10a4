"""The mask and latents of image to video, and the kept first frame."""

import pytest
import torch

from wanfast.dit.condition import image_condition, keep_first_frame
from wanfast.errors import RequestError


@pytest.mark.parametrize(("channels", "stride", "frames"), [(16, 4, 21), (16, 4, 1), (48, 4, 3), (5, 2, 4)])
def test_image_condition_folds_the_mask_of_pixel_frames_as_the_official_code_does(
    channels: int, stride: int, frames: int
) -> None:
    latents = torch.randn(1, channels, frames, 3, 5)
    pixel_frames = stride * (frames - 1) + 1
    mask = torch.ones(1, pixel_frames, 3, 5)
    mask[:, 1:] = 0
    mask = torch.cat([mask[:, :1].repeat_interleave(stride, dim=1), mask[:, 1:]], dim=1)
    mask = mask.view(1, frames, stride, 3, 5).transpose(1, 2)
    got = image_condition(latents, temporal_stride=stride)
    assert torch.equal(got, torch.cat([mask, latents], dim=1))


def test_image_condition_has_the_20_channels_of_i2v_in_a_batch() -> None:
    latents = torch.randn(2, 16, 3, 4, 6)
    got = image_condition(latents)
    assert got.shape == (2, 20, 3, 4, 6)
    assert torch.equal(got[:, 4:], latents)
    assert got[:, :4].sum() == 2 * 4 * 4 * 6
    assert got[:, :4, 0].eq(1).all()


def test_image_condition_refuses_by_name() -> None:
    with pytest.raises(RequestError, match=r"image_latents: must be \[B, C, F, H, W\], got \(16, 3, 4, 6\)"):
        image_condition(torch.zeros(16, 3, 4, 6))
    with pytest.raises(RequestError, match="temporal_stride: must be at least 1, got 0"):
        image_condition(torch.zeros(1, 16, 3, 4, 6), temporal_stride=0)


@pytest.mark.parametrize("frames", [1, 3])
def test_keep_first_frame_blends_by_the_mask_of_the_official_code(frames: int) -> None:
    latents, picture = torch.randn(2, 48, frames, 4, 6), torch.randn(2, 48, 1, 4, 6)
    before = latents.clone()
    mask = torch.ones_like(latents)
    mask[:, :, 0] = 0
    got = keep_first_frame(latents, picture)
    assert torch.equal(got, (1 - mask) * picture + mask * latents)
    assert torch.equal(latents, before)


def test_keep_first_frame_leaves_latents_without_a_picture() -> None:
    latents = torch.randn(1, 48, 3, 4, 6)
    assert keep_first_frame(latents, None) is latents


@pytest.mark.parametrize("shape", [(1, 48, 2, 4, 6), (1, 16, 1, 4, 6), (1, 48, 1, 4, 8), (48, 1, 4, 6)])
def test_keep_first_frame_refuses_another_shape_by_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"first_frame: must be \(1, 48, 1, 4, 6\), one frame of the latents, got"):
        keep_first_frame(torch.zeros(1, 48, 3, 4, 6), torch.zeros(shape))
