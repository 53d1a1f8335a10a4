"""Rearrangements of the Wan 2.2 VAE against the positions its description gives."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import AvgDown3D, DupUp3D

from wanfast.vae.patch import add_repeated_up_, average_down, patchify, unpatchify


def test_patchify_orders_channel_column_row() -> None:
    video = torch.arange(48.0).view(1, 3, 1, 4, 4)
    assert patchify(video, 2)[0, :, 0, 0, 0].tolist() == [0, 4, 1, 5, 16, 20, 17, 21, 32, 36, 33, 37]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_unpatchify_undoes_patchify(size: int) -> None:
    video = torch.randn(2, 3, 5, 6, 12)
    assert torch.equal(unpatchify(patchify(video, size), size), video)


@pytest.mark.parametrize(("channels", "out_channels", "temporal"), [(6, 6, 1), (6, 12, 2), (6, 6, 2)])
@pytest.mark.parametrize("frames", [1, 4])
def test_average_down_equals_the_reference(channels: int, out_channels: int, temporal: int, frames: int) -> None:
    x = torch.randn(2, channels, frames, 4, 6)
    want = AvgDown3D(channels, out_channels, factor_t=temporal, factor_s=2)(x)
    assert torch.allclose(average_down(x, out_channels, temporal), want, atol=1e-6)


def test_average_down_gives_the_first_frame_to_odd_channels_alone() -> None:
    x = torch.randn(1, 3, 1, 4, 4)
    shortcut = average_down(x, 6, 2)
    assert torch.equal(shortcut[:, 0::2], torch.zeros(1, 3, 1, 2, 2))
    assert torch.allclose(shortcut[:, 1::2, 0], F.avg_pool2d(x[:, :, 0], 2))


@pytest.mark.parametrize(("channels", "out_channels", "temporal"), [(6, 6, 2), (6, 3, 2), (6, 3, 1), (6, 6, 1)])
@pytest.mark.parametrize("is_first", [True, False])
def test_add_repeated_up_equals_the_reference(channels: int, out_channels: int, temporal: int, is_first: bool) -> None:
    source = torch.randn(2, channels, 1 if is_first else 2, 3, 5)
    repeated = DupUp3D(channels, out_channels, factor_t=temporal, factor_s=2)(source, first_chunk=is_first)
    x = torch.randn(repeated.shape)
    want = x + repeated
    add_repeated_up_(x, source, temporal)
    assert torch.equal(x, want)
