"""The VAEs' decoders against the official code's values and against diffusers."""

import dataclasses

import pytest
import torch
from reference.vae import (
    diffusers_decode,
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
from wanfast.vae import decode as decode_module
from wanfast.vae.blocks import History
from wanfast.vae.decode import decode, decode_frame
from wanfast.vae.weights import VAEWeights, expected_tensors, load_vae

VERSIONS = ("2.1", "2.2")


def _golden_vae(version: str, dtype: torch.dtype = torch.float32) -> VAEWeights:
    config = dataclasses.replace(small_config(version), latents_mean=(0.1, -0.2, 0.3, -0.4))
    return load_vae(memory_reader(golden_tensors(expected_tensors(config))), config, dtype)


def _decode_unclamped(vae: VAEWeights, latents: torch.Tensor) -> torch.Tensor:
    history, frames = None, []
    for latent_frame in latents.split(1, dim=2):
        chunk, history = decode_frame(vae, latent_frame, history)
        frames.append(chunk)
    return torch.cat(frames, dim=2)


@pytest.mark.parametrize(
    ("version", "size", "mean", "std", "places", "values"),
    [
        (
            "2.1",
            (32, 48),
            -0.2146072,
            0.5397052,
            (0, 1, 8557, 19968, 29952, 42788, 59903),
            (-0.00795052, 0.0474285, 0.353254, 0.245341, 0.254692, -1.12616, -0.223046),
        ),
        (
            "2.2",
            (64, 96),
            0.03545988,
            0.5634595,
            (0, 1, 34230, 79872, 119808, 171154, 239615),
            (-0.12618, 0.0959087, -0.737914, -0.457922, -1.01063, -0.189356, 0.398717),
        ),
    ],
)
def test_decode_gives_the_official_values(
    version: str, size: tuple[int, int], mean: float, std: float, places: tuple[int, ...], values: tuple[float, ...]
) -> None:
    vae, latents = _golden_vae(version), golden_input("lat", (1, 4, 4, 4, 6))
    video = _decode_unclamped(vae, latents)
    assert video.shape == (1, 3, 13, *size)
    statistics = torch.stack((video.double().mean(), video.double().std(correction=0))).float()
    assert_close(got=statistics, want=torch.tensor((mean, std)), op="golden")
    assert_close(got=video.flatten()[list(places)], want=torch.tensor(values), op="golden")
    assert torch.equal(torch.cat(list(decode(vae, latents)), dim=2), video.clamp(-1, 1))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("num_latent_frames", [1, 2, 5])
def test_decode_equals_diffusers(version: str, num_latent_frames: int) -> None:
    config = small_config(version)
    model = diffusers_vae(config, seed=num_latent_frames)
    vae = load_vae(memory_reader(official_state(model, version)), config)
    latents = golden_input("latents", (2, 4, num_latent_frames, 3, 5))
    want = diffusers_decode(model, latents)
    assert (want.abs() < 1).float().mean() > 0.99, "the clamp would hide differences"
    chunks = list(decode(vae, latents))
    assert [chunk.shape[2] for chunk in chunks] == [1] + [4] * (num_latent_frames - 1)
    assert_close(got=torch.cat(chunks, dim=2), want=want, op="vae_fp32")


@pytest.mark.parametrize("version", VERSIONS)
def test_one_temporal_level_doubles_frames_once(version: str) -> None:
    config = small_config(version, multipliers=(1, 2, 2), temporal_downsample=(False, True))
    model = diffusers_vae(config)
    vae = load_vae(memory_reader(official_state(model, version)), config)
    latents = golden_input("latents", (1, 4, 3, 2, 2))
    assert_close(got=torch.cat(list(decode(vae, latents)), 2), want=diffusers_decode(model, latents), op="vae_fp32")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_prefix_of_the_latents_gives_a_prefix_of_the_video(version: str) -> None:
    vae, latents = _golden_vae(version), golden_input("lat", (1, 4, 4, 2, 3))
    whole = torch.cat(list(decode(vae, latents)), dim=2)
    part = torch.cat(list(decode(vae, latents[:, :, :2])), dim=2)
    assert torch.equal(part, whole[:, :, :5])


@pytest.mark.parametrize("version", VERSIONS)
def test_frame_by_frame_equals_the_rest_at_once(version: str) -> None:
    vae, latents = _golden_vae(version), golden_input("lat", (1, 4, 4, 4, 6))
    first, history = decode_frame(vae, latents[:, :, :1], None)
    rest, _ = decode_frame(vae, latents[:, :, 1:], history)
    assert_close(got=_decode_unclamped(vae, latents), want=torch.cat((first, rest), dim=2), op="vae_fp32")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_next_history_takes_the_memory_of_the_last(version: str) -> None:
    vae, latents = _golden_vae(version), golden_input("lat", (1, 4, 3, 2, 3))
    _, history = decode_frame(vae, latents[:, :, :1], None)
    _, history = decode_frame(vae, latents[:, :, 1:2], history)  # what the first frame skips has its history now
    places = [tensor.data_ptr() for tensor in _tensors(history) if tensor.numel()]
    _, history = decode_frame(vae, latents[:, :, 2:], history)
    assert [tensor.data_ptr() for tensor in _tensors(history) if tensor.numel()] == places


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("at_once", [1, 3, 4])
def test_a_few_frames_at_a_time_give_what_all_give(at_once: int, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latents = _golden_vae(version), golden_input("lat", (1, 4, 3, 2, 3))
    want = list(decode(vae, latents))
    monkeypatch.setattr(decode_module, "FINE_FRAMES", at_once)
    for chunk, wanted in zip(decode(vae, latents), want, strict=True):
        assert_close(got=chunk, want=wanted, op="vae_fp32")


def _tensors(history: History) -> list[torch.Tensor]:
    nested = [history.conv_in, history.conv_out, *history.middle[0], *history.middle[1]]
    for level in history.levels:
        nested += [level.resample, *(tensor for block in level.blocks for tensor in block)]
    return [tensor for tensor in nested if tensor is not None]


@pytest.mark.parametrize("version", VERSIONS)
def test_history_holds_two_frames_per_convolution_and_no_chunk(version: str) -> None:
    vae, latents = _golden_vae(version), golden_input("lat", (1, 4, 4, 2, 3))
    history, sizes = None, []
    for latent_frame in latents.split(1, dim=2):
        _, history = decode_frame(vae, latent_frame, history)
        held = _tensors(history)
        assert all(tensor.shape[2] <= 2 for tensor in held)
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in held)
        sizes.append(sum(tensor.nbytes for tensor in held))
    assert sizes[-1] == sizes[-2], "the history must not grow"


@pytest.mark.parametrize("version", VERSIONS)
def test_bf16_stays_near_fp32(version: str) -> None:
    latents = golden_input("lat", (1, 4, 3, 4, 6))
    want = torch.cat(list(decode(_golden_vae(version), latents)), dim=2)
    got = torch.cat(list(decode(_golden_vae(version, torch.bfloat16), latents)), dim=2)
    assert got.dtype == torch.float32
    # Black to white is 2. Measured: 46.3 dB in 2.1, 48.7 dB in 2.2; the limit allows for another order of sums.
    assert psnr(got, want, peak=2.0) > 44


def test_chunks_are_made_when_asked_for_and_lie_in_range() -> None:
    vae = _golden_vae("2.1")
    chunks = decode(vae, 5 * golden_input("lat", (1, 4, 3, 2, 2)))
    first = next(chunks)
    assert first.shape == (1, 3, 1, 16, 16) and first.is_contiguous()
    for chunk in (first, *chunks):
        assert chunk.dtype == torch.float32
        assert float(chunk.abs().max()) <= 1.0


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(1, 16, 3, 2, 2), r"latents: must be \[B, 4, F, H, W\].*got \[1, 16, 3, 2, 2\]; this VAE"),
        (torch.zeros(4, 3, 2, 2), r"latents: must be \[B, 4, F, H, W\].*got \[4, 3, 2, 2\]"),
        (torch.zeros(1, 4, 0, 2, 2), r"latents: must be \[B, 4, F, H, W\] with at least one frame"),
        (torch.zeros(1, 4, 3, 2, 2, dtype=torch.int64), r"latents: must be of a float dtype, got torch\.int64"),
    ],
)
def test_latents_that_do_not_fit_are_refused_at_the_call(latents: torch.Tensor, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        decode(_golden_vae("2.1"), latents)
