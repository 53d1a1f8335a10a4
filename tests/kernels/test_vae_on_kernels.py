"""Both whole VAEs through their kernels, launched as a GPU would launch them, against diffusers in fp32."""

import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from reference.vae import (
    diffusers_decode,
    diffusers_encode,
    diffusers_vae,
    golden_input,
    official_state,
    psnr,
    small_config,
)
from torch import Tensor

from wanfast.checkpoint.reader import memory_reader
from wanfast.config import VAEConfig, VAEVersion
from wanfast.kernels.rms_norm_silu import rms_norm_silu_triton
from wanfast.vae import blocks, conv, decode, encode
from wanfast.vae.tiles import cut_strips, decode_halo
from wanfast.vae.weights import VAEWeights, load_vae

kernel_file = importlib.import_module("wanfast.kernels.causal_conv3d")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Counter[str]:
    """Every operation launches its kernel, which is counted; where there is no GPU, the interpreter runs it."""
    counts: Counter[str] = Counter()

    def count(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: Any, **options: Any) -> Tensor:
            counts[name] += 1
            return run(*args, **options)

        return counted

    monkeypatch.setattr(kernel_file, "causal_conv3d_triton", count("causal_conv3d", kernel_file.causal_conv3d_triton))
    monkeypatch.setattr(conv, "causal_conv3d_reference", count("torch", conv.causal_conv3d_reference))
    if device.type != "cuda":
        monkeypatch.setattr(kernel_file, "runs_triton", lambda x: True)
        for module in (blocks, conv, decode, encode):
            monkeypatch.setattr(module, "norm_silu", rms_norm_silu_triton)
    return counts


def vae_of(
    version: VAEVersion, dtype: torch.dtype, device: torch.device
) -> tuple[AutoencoderKLWan, VAEConfig, VAEWeights]:
    """Every kind of layer once; 3 latent frames, so that a chunk has no history, zeros or frames in it."""
    config = small_config(version, multipliers=(1, 2, 2), temporal_downsample=(False, True), num_res_blocks=1)
    model = diffusers_vae(config, seed=3)
    return model, config, load_vae(memory_reader(official_state(model, version)), config, dtype, device=device)


@pytest.mark.parametrize(
    ("version", "num_latent_frames", "dtype", "least"),
    [("2.1", 3, torch.float16, 70.0), ("2.2", 2, torch.float16, 70.0), ("2.1", 2, torch.bfloat16, 50.0)],
    ids=str,
)
@torch.no_grad()
def test_decoding_on_kernels_is_diffusers_decoding(
    version: VAEVersion,
    num_latent_frames: int,
    dtype: torch.dtype,
    least: float,
    launches: Counter[str],
    device: torch.device,
) -> None:
    model, _, vae = vae_of(version, dtype, device)
    latents = golden_input("latents", (1, 4, num_latent_frames, 2, 3))
    chunks = list(decode.decode(vae, latents.to(device)))
    assert [chunk.shape[2] for chunk in chunks] == [1, 2, 2][:num_latent_frames]
    want = diffusers_decode(model, latents)
    assert (want.abs() < 1).float().mean() > 0.99, "the clamp would hide differences"
    assert psnr(torch.cat(chunks, dim=2).cpu(), want, peak=2.0) > least
    assert launches["causal_conv3d"] and launches["torch"] == 0


@pytest.mark.parametrize("version", ["2.1", "2.2"])
@torch.no_grad()
def test_encoding_on_kernels_is_diffusers_encoding(
    version: VAEVersion, launches: Counter[str], device: torch.device
) -> None:
    model, config, vae = vae_of(version, torch.float16, device)
    side = config.spatial_stride
    video = golden_input("video", (1, 3, 5, 2 * side, 3 * side)).clamp(-1, 1)
    want = diffusers_encode(model, video)
    got = encode.encode(vae, video.to(device)).cpu()
    assert psnr(got, want, peak=2 * float(want.abs().max())) > 70
    assert launches["causal_conv3d"] and launches["torch"] == 0


@torch.no_grad()
def test_a_strip_on_kernels_is_that_of_the_whole_bit_for_bit(launches: Counter[str], device: torch.device) -> None:
    """Views of wider pictures go through the kernels too."""
    _, config, vae = vae_of("2.1", torch.float16, device)
    latents = golden_input("latents", (1, 4, 1, 1, 12)).to(device)
    (whole,) = decode.decode(vae, latents)
    strip = cut_strips(1, 12, 2, decode_halo(config))[0]
    (kept,) = decode.decode(vae, latents, strip)
    assert torch.equal(kept, strip.keep(whole, config.spatial_stride))
