"""Weights of the VAEs: what a file must hold, and what is read from it."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from reference.vae import golden_tensors, small_config

from wanfast.checkpoint.reader import memory_reader
from wanfast.config import VAE_2_1, VAE_2_2, VAEConfig
from wanfast.errors import CheckpointError
from wanfast.vae.decode import decode
from wanfast.vae.encode import encode
from wanfast.vae.weights import expected_tensors, load_vae, vae_config

VERSIONS = ("2.1", "2.2")


@pytest.mark.parametrize(
    ("config", "num_tensors", "num_parameters"), [(VAE_2_1, 194, 126_892_531), (VAE_2_2, 196, 704_688_668)]
)
def test_the_full_vaes_have_the_official_counts(config: VAEConfig, num_tensors: int, num_parameters: int) -> None:
    shapes = expected_tensors(config)
    assert len(shapes) == num_tensors
    assert sum(math.prod(shape) for shape in shapes.values()) == num_parameters


def test_names_and_shapes_of_the_full_vaes_are_the_official_ones() -> None:
    wan21, wan22 = expected_tensors(VAE_2_1), expected_tensors(VAE_2_2)
    assert wan21["decoder.upsamples.3.time_conv.weight"] == (768, 384, 3, 1, 1)
    assert wan21["decoder.upsamples.4.shortcut.weight"] == (384, 192, 1, 1, 1)
    assert wan21["decoder.upsamples.11.resample.1.weight"] == (96, 192, 3, 3)
    assert wan21["encoder.downsamples.8.time_conv.weight"] == (384, 384, 3, 1, 1)
    assert wan21["encoder.head.2.weight"] == (32, 384, 3, 3, 3)
    assert wan22["encoder.conv1.weight"] == (160, 12, 3, 3, 3)
    assert wan22["encoder.downsamples.2.downsamples.2.time_conv.weight"] == (640, 640, 3, 1, 1)
    assert wan22["decoder.upsamples.2.upsamples.0.shortcut.weight"] == (512, 1024, 1, 1, 1)
    assert wan22["decoder.upsamples.1.upsamples.3.time_conv.weight"] == (2048, 1024, 3, 1, 1)
    assert wan22["decoder.middle.1.norm.gamma"] == (1024, 1, 1)


@pytest.mark.parametrize("config", [VAE_2_1, VAE_2_2], ids=VERSIONS)
def test_the_full_sizes_are_read_from_names_and_shapes(config: VAEConfig) -> None:
    tensors = {name: torch.empty(shape, device="meta") for name, shape in expected_tensors(config).items()}
    assert vae_config(memory_reader(tensors)) == config


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"multipliers": (1, 1), "temporal_downsample": (True,), "num_res_blocks": 1},
        {"multipliers": (1, 2, 2), "temporal_downsample": (False, True), "encoder_dim": 4, "z_dim": 6},
    ],
)
def test_other_sizes_are_read_from_names_and_shapes(version: str, sizes: dict[str, object]) -> None:
    config = small_config(version, **sizes)
    reader = memory_reader(golden_tensors(expected_tensors(config)))
    assert vae_config(reader, config.latents_mean, config.latents_std) == config


def test_unknown_latent_statistics_are_refused() -> None:
    reader = memory_reader(golden_tensors(expected_tensors(small_config("2.1"))), path="small.pth")
    with pytest.raises(CheckpointError, match=r"small\.pth: .*unknown for 4 latent channels.*config\.json"):
        vae_config(reader)
    with pytest.raises(CheckpointError, match=r"small\.pth: .*need 4 values each.*got 3 and 4"):
        vae_config(reader, (0.0,) * 3, (1.0,) * 4)


def test_channels_that_no_shortcut_can_make_are_refused() -> None:
    config = small_config("2.2", multipliers=(1, 2, 4), temporal_downsample=(False, True))
    tensors = {name: torch.empty(shape, device="meta") for name, shape in expected_tensors(config).items()}
    with pytest.raises(CheckpointError, match="level 2 of the VAE's encoder goes from 2 to 4 times 8 channels"):
        vae_config(memory_reader(tensors), config.latents_mean, config.latents_std)


def test_half_a_vae_does_its_half_alone() -> None:
    config = small_config("2.1")
    reader = memory_reader(golden_tensors(expected_tensors(config)))
    latents = encode(load_vae(reader, config, decoder=False), torch.zeros(1, 3, 1, 16, 16))
    (frame,) = decode(load_vae(reader, config, encoder=False), latents)
    assert frame.shape == (1, 3, 1, 16, 16)
    with pytest.raises(ValueError, match=r"vae: must hold a decoder.*decoder=True"):
        next(decode(load_vae(reader, config, decoder=False), latents))
    with pytest.raises(ValueError, match=r"vae: must hold an encoder.*encoder=True"):
        encode(load_vae(reader, config, encoder=False), frame)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_keeps_the_stored_tensors_alive(dtype: torch.dtype) -> None:
    config = small_config("2.1")
    tensors = {name: tensor.to(dtype) for name, tensor in golden_tensors(expected_tensors(config)).items()}
    stored = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    held = [*_storages(load_vae(memory_reader(tensors), config, dtype))]
    assert len(held) > 194 - 10
    assert stored.isdisjoint(held)


def _storages(weights: object) -> Iterator[int]:
    if isinstance(weights, torch.Tensor):
        yield weights.untyped_storage().data_ptr()
    elif isinstance(weights, tuple):
        for item in weights:
            yield from _storages(item)
    elif dataclasses.is_dataclass(weights):
        for field in dataclasses.fields(weights):
            yield from _storages(getattr(weights, field.name))


def test_a_file_of_something_else_is_refused_by_name() -> None:
    reader = memory_reader({"blocks.0.modulation": torch.zeros(1, 6, 8)}, path="dit.safetensors")
    with pytest.raises(CheckpointError, match=r"dit\.safetensors: tensor conv2\.weight is missing"):
        vae_config(reader)


@pytest.mark.parametrize("version", VERSIONS)
def test_missing_unexpected_and_misshaped_tensors_are_refused_by_name(version: str) -> None:
    config = small_config(version)
    tensors = golden_tensors(expected_tensors(config))
    for name in ("decoder.head.2.bias", "encoder.middle.1.proj.weight", "conv1.weight"):
        broken = {key: tensor for key, tensor in tensors.items() if key != name}
        with pytest.raises(CheckpointError, match=f"1 missing .*{name}"):
            load_vae(memory_reader(broken), config)
        with pytest.raises(CheckpointError, match=f"1 mis-shaped .*{name}"):
            load_vae(memory_reader(tensors | {name: torch.zeros(5, 5)}), config)
    with pytest.raises(CheckpointError, match=r"1 unexpected .*decoder\.extra"):
        load_vae(memory_reader(tensors | {"decoder.extra": torch.zeros(1)}), config)


def test_a_value_that_is_not_finite_is_refused_by_name() -> None:
    config = small_config("2.1")
    tensors = golden_tensors(expected_tensors(config))
    tensors["decoder.conv1.weight"][3, 1, 0, 2, 1] = math.nan
    with pytest.raises(CheckpointError, match=r"decoder\.conv1\.weight"):
        load_vae(memory_reader(tensors), config)


def test_other_statistics_change_the_decoded_video_as_the_formula_says() -> None:
    config = small_config("2.1")
    tensors = memory_reader(golden_tensors(expected_tensors(config)))
    vae = load_vae(tensors, config)
    plain = dataclasses.replace(
        vae, config=dataclasses.replace(config, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    )
    latents = torch.randn(1, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(1, 4, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    (got,), (want,) = decode(vae, latents), decode(plain, latents * std + mean)
    assert torch.allclose(got, want, atol=1e-5)
