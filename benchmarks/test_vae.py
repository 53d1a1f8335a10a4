"""VAE encode and decode beside diffusers' on the same weights: seconds in this process, peak memory in a child each.

Decoding in strips stands beside decoding whole pictures: less memory, more work.
Wan 2.1's VAE has its full size, 2.2's half the channels of the real one. fp32, as the reference computes.
The full decodes have the real channels of both, in fp32 and bf16, at sizes of a small video; there diffusers' weights
also stand in channels_last_3d, its best setting on a CPU. They take many minutes: `-k full_decode`.
Run as a script with an engine, a version, an operation and a folder, it does it once and prints its peak memory.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from side_by_side import compare, compare_memory, print_peak
from torch import Tensor

LATENT_SIZE = (2, 8, 12)  # frames, rows, columns: 5 frames of 64 x 96 pixels in 2.1, of 128 x 192 in 2.2
WIDE_SIZE, NUM_TILES = (2, 4, 48), 3  # 5 frames of 32 x 384 pixels in 2.1, of 64 x 768 in 2.2
STRIDE, CHANNELS = {"2.1": 8, "2.2": 16}, {"2.1": 16, "2.2": 48}
ROUNDS = 3
FULL_SIZES = {"17x240x416": (5, 240, 416), "9x480x832": (3, 480, 832)}  # latent frames, rows and columns of pixels

Operation = Callable[[], Tensor]


def _split(operation: str) -> tuple[str, torch.dtype]:
    """An operation's own name, and the dtype behind it if it is not fp32: `decode-bfloat16`."""
    name, _, dtype = operation.partition("-")
    return name, getattr(torch, dtype or "float32")


def _input(version: str, operation: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    frames, height, width = LATENT_SIZE
    if operation in FULL_SIZES:
        frames, height, width = FULL_SIZES[operation]
        size = (frames, height // STRIDE[version], width // STRIDE[version])
        return torch.randn(1, CHANNELS[version], *size, generator=generator)
    if operation != "encode":
        size = LATENT_SIZE if operation == "decode" else WIDE_SIZE
        return torch.randn(1, CHANNELS[version], *size, generator=generator)
    size = (4 * frames - 3, height * STRIDE[version], width * STRIDE[version])
    return torch.rand(1, 3, *size, generator=generator) * 2 - 1


def _wanfast(folder: Path, version: str, operation: str) -> Operation:
    import json

    from wanfast.checkpoint.names import vae_from_diffusers
    from wanfast.checkpoint.reader import open_folder
    from wanfast.vae.decode import decode
    from wanfast.vae.encode import encode
    from wanfast.vae.pixels import decode_pixels
    from wanfast.vae.weights import load_vae, vae_config

    operation, dtype = _split(operation)
    stored = open_folder(folder)
    reader = stored.renamed(vae_from_diffusers(stored.names(), version))
    statistics = json.loads((folder / "config.json").read_text())
    config = vae_config(reader, statistics["latents_mean"], statistics["latents_std"])
    vae = load_vae(reader, config, dtype, encoder=operation == "encode", decoder=operation != "encode")
    x = _input(version, operation)
    if operation == "encode":
        return lambda: encode(vae, x)
    if operation in ("whole", "strips"):
        num_tiles = NUM_TILES if operation == "strips" else 1
        return lambda: torch.cat(list(decode_pixels(vae, x, num_tiles)))
    return lambda: torch.cat(list(decode(vae, x)), dim=2)


def _diffusers(folder: Path, version: str, operation: str, *, is_channels_last: bool = False) -> Operation:
    from diffusers import AutoencoderKLWan
    from reference.vae import diffusers_encode

    operation, dtype = _split(operation)
    model = AutoencoderKLWan.from_pretrained(folder, torch_dtype=dtype).eval()
    for module in model.modules() if is_channels_last else ():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            layout = torch.channels_last if isinstance(module, torch.nn.Conv2d) else torch.channels_last_3d
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
    x = _input(version, operation)
    if operation == "encode":
        return lambda: diffusers_encode(model, x)
    mean, std = (torch.tensor(model.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    given = (x * std + mean).to(dtype)
    given = given.contiguous(memory_format=torch.channels_last_3d) if is_channels_last else given
    return lambda: model.decode(given, return_dict=False)[0].float()


def _channels_last(folder: Path, version: str, operation: str) -> Operation:
    return _diffusers(folder, version, operation, is_channels_last=True)


def _whole(folder: Path, version: str, _: str) -> Operation:
    return _wanfast(folder, version, "whole")


ENGINES = {"wanfast": _wanfast, "diffusers": _diffusers, "channels_last": _channels_last, "whole": _whole}


@pytest.fixture(scope="module", params=STRIDE)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """One VAE on disk, in diffusers' layout."""
    from reference.vae import diffusers_vae, small_config

    dims = {"2.1": (96, 96), "2.2": (80, 128)}[request.param]
    config = small_config(request.param, encoder_dim=dims[0], decoder_dim=dims[1], z_dim=CHANNELS[request.param])
    path = tmp_path_factory.mktemp("vae")
    diffusers_vae(config).save_pretrained(path)
    return request.param, path


@pytest.mark.parametrize("operation", ["decode", "encode"])
@torch.inference_mode()
def test_vae(benchmark: Any, stored: tuple[str, Path], operation: str) -> None:
    from tolerance import assert_close

    version, folder = stored
    ours, theirs = (ENGINES[engine](folder, version, operation) for engine in ("wanfast", "diffusers"))
    assert_close(got=ours(), want=theirs(), op="vae_fp32")
    benchmark.extra_info["threads"] = torch.get_num_threads()
    compare(benchmark, ours, theirs, peer="diffusers", rounds=ROUNDS)
    compare_memory(benchmark, __file__, version, operation, str(folder), peer="diffusers")


@torch.inference_mode()
def test_strips(benchmark: Any, stored: tuple[str, Path]) -> None:
    version, folder = stored
    ours, theirs = (ENGINES[engine](folder, version, "strips") for engine in ("wanfast", "whole"))
    assert (ours().int() - theirs().int()).abs().max() <= 1
    benchmark.extra_info["threads"] = torch.get_num_threads()
    compare(benchmark, ours, theirs, peer="whole", rounds=ROUNDS)
    compare_memory(benchmark, __file__, version, "strips", str(folder), peer="whole")


@pytest.fixture(scope="module", params=STRIDE)
def stored_full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """One VAE with the channels of the real one on disk, in diffusers' layout."""
    from reference.vae import diffusers_vae

    from wanfast.config import VAE_2_1, VAE_2_2

    path = tmp_path_factory.mktemp("full_vae")
    diffusers_vae(VAE_2_1 if request.param == "2.1" else VAE_2_2).save_pretrained(path)
    return request.param, path


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("peer", ["diffusers", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", FULL_SIZES)
@torch.inference_mode()
def test_full_decode(benchmark: Any, stored_full: tuple[str, Path], size: str, dtype: str, peer: str) -> None:
    """Timed in CPU seconds, which other processes disturb little."""
    version, folder = stored_full
    operation = f"{size}-{dtype}"
    ours, theirs = (ENGINES[engine](folder, version, operation) for engine in ("wanfast", peer))
    benchmark.extra_info["threads"] = torch.get_num_threads()
    compare(benchmark, ours, theirs, peer=peer, rounds=1, clock=time.process_time)
    compare_memory(benchmark, __file__, version, operation, str(folder), peer=peer)


@torch.inference_mode()
def _child(engine: str, version: str, operation: str, folder: str) -> None:
    print_peak(engine, lambda: ENGINES[engine](Path(folder), version, operation))


if __name__ == "__main__":
    _child(*sys.argv[1:])
