"""The VAEs' encoders against the official code's values and against diffusers."""

import dataclasses

import pytest
import torch
from reference.vae import (
    diffusers_encode,
    diffusers_vae,
    golden_input,
    golden_tensors,
    official_state,
    psnr,
    small_config,
)
from tolerance import assert_close

from wanfast.checkpoint.reader import memory_reader
from wanfast.errors import RequestError
from wanfast.vae.encode import encode, encode_chunk, encode_chunks
from wanfast.vae.weights import VAEWeights, expected_tensors, load_vae

VERSIONS = ("2.1", "2.2")


def _golden_vae(version: str, dtype: torch.dtype = torch.float32) -> VAEWeights:
    config = dataclasses.replace(small_config(version), latents_mean=(0.1, -0.2, 0.3, -0.4))
    return load_vae(memory_reader(golden_tensors(expected_tensors(config))), config, dtype)


def _video(num_frames: int, *, height: int = 32, width: int = 48) -> torch.Tensor:
    return golden_input("a video", (1, 3, num_frames, height, width)).clamp(-1, 1)


@pytest.mark.parametrize(
    ("version", "name", "size", "mean", "std", "values"),
    [
        (
            "2.1",
            "video",
            (32, 48),
            -0.1313309,
            0.7910092,
            (-0.264515, -0.232487, -0.524741, -0.141345, 0.465462, 0.383024, 0.335729),
        ),
        (
            "2.2",
            "video2",
            (64, 96),
            0.01602607,
            0.6994685,
            (0.140399, -0.293848, 0.668141, -0.0311477, -0.305117, -1.05379, 0.550162),
        ),
    ],
)
def test_encode_gives_the_official_values(
    version: str, name: str, size: tuple[int, int], mean: float, std: float, values: tuple[float, ...]
) -> None:
    latents = encode(_golden_vae(version), golden_input(name, (1, 3, 9, *size)).clamp(-1, 1))
    assert latents.shape == (1, 4, 3, 4, 6)
    statistics = torch.stack((latents.double().mean(), latents.double().std(correction=0))).float()
    assert_close(got=statistics, want=torch.tensor((mean, std)), op="golden")
    chosen = latents.flatten()[[0, 1, 41, 96, 144, 205, 287]]
    assert_close(got=chosen, want=torch.tensor(values), op="golden")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("num_frames", [1, 5, 13])
def test_encode_equals_diffusers(version: str, num_frames: int) -> None:
    config = small_config(version)
    model = diffusers_vae(config, seed=num_frames)
    vae = load_vae(memory_reader(official_state(model, version)), config)
    video = _video(num_frames).expand(2, -1, -1, -1, -1) * torch.tensor((1.0, -0.5)).view(2, 1, 1, 1, 1)
    assert_close(got=encode(vae, video), want=diffusers_encode(model, video), op="vae_fp32")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_first_frame_alone_gives_the_first_latent_frame(version: str) -> None:
    vae, video = _golden_vae(version), _video(9)
    assert torch.equal(encode(vae, video[:, :, :1]), encode(vae, video)[:, :, :1])


@pytest.mark.parametrize("version", VERSIONS)
def test_chunks_of_any_origin_equal_the_whole_video(version: str) -> None:
    vae, video = _golden_vae(version), _video(9)
    whole = encode(vae, video)
    chunks = [video[:, :, :1].clone(), video[:, :, 1:5].clone(), video[:, :, 5:].clone()]
    assert torch.equal(encode_chunks(vae, iter(chunks)), whole)
    history, frames = None, []
    for chunk in chunks:
        latent_frame, history = encode_chunk(vae, chunk, history)
        frames.append(latent_frame)
    assert torch.equal(torch.cat(frames, dim=2), whole)


@pytest.mark.parametrize("version", VERSIONS)
def test_chunk_by_chunk_equals_the_rest_at_once(version: str) -> None:
    vae, video = _golden_vae(version), _video(13)
    first, history = encode_chunk(vae, video[:, :, :1], None)
    rest, _ = encode_chunk(vae, video[:, :, 1:], history)
    assert_close(got=encode(vae, video), want=torch.cat((first, rest), dim=2), op="vae_fp32")


def test_later_frames_do_not_reach_earlier_latents() -> None:
    vae, video = _golden_vae("2.1"), _video(9)
    changed = video.clone()
    changed[:, :, 5:] = 0.0
    assert torch.equal(encode(vae, changed)[:, :, :2], encode(vae, video)[:, :, :2])
    assert not torch.equal(encode(vae, changed)[:, :, 2], encode(vae, video)[:, :, 2])


@pytest.mark.parametrize("version", VERSIONS)
def test_bf16_stays_near_fp32(version: str) -> None:
    video = _video(5)
    want = encode(_golden_vae(version), video)
    got = encode(_golden_vae(version, torch.bfloat16), video)
    assert got.dtype == torch.float32
    # Measured: 58.7 dB in 2.1, 56.2 dB in 2.2; the limit allows for another order of sums.
    assert psnr(got, want, peak=2 * float(want.abs().max())) > 54


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 3, 8, 16, 16), r"video: must have 4n \+ 1 frames, got 8; the nearest is 9"),
        (torch.zeros(1, 3, 6, 16, 16), r"video: must have 4n \+ 1 frames, got 6; the nearest is 5"),
        (torch.zeros(1, 4, 5, 16, 16), r"video: must be \[B, 3, F, H, W\], got \[1, 4, 5, 16, 16\]"),
        (torch.zeros(3, 5, 16, 16), r"video: must be \[B, 3, F, H, W\], got \[3, 5, 16, 16\]"),
        (torch.zeros(1, 3, 0, 16, 16), r"video: must be \[B, 3, F, H, W\]"),
        (torch.zeros(1, 3, 5, 20, 16), r"video: height and width must be multiples of 8, got 20 x 16; 16 x 16 works"),
        (torch.zeros(1, 3, 5, 16, 4), r"video: height and width must be multiples of 8, got 16 x 4; 16 x 8 works"),
        (torch.zeros(1, 3, 5, 16, 16, dtype=torch.uint8), r"video: must be of a float dtype, got torch\.uint8"),
    ],
)
def test_a_video_that_does_not_fit_is_refused(video: torch.Tensor, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        encode(_golden_vae("2.1"), video)


def test_chunks_that_do_not_fit_are_refused() -> None:
    vae = _golden_vae("2.2")
    with pytest.raises(RequestError, match=r"chunk 0 must be of length 1 in frames, got 4"):
        encode_chunks(vae, [torch.zeros(1, 3, 4, 16, 16)])
    with pytest.raises(RequestError, match=r"chunk 1 must be of length 4 in frames, got 1"):
        encode_chunks(vae, [torch.zeros(1, 3, 1, 16, 16)] * 2)
    with pytest.raises(RequestError, match=r"multiples of 16, got 24 x 16; 16 x 16 works"):
        encode_chunks(vae, [torch.zeros(1, 3, 1, 24, 16)])
    with pytest.raises(RequestError, match="at least one frame"):
        encode_chunks(vae, [])
