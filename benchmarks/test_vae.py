"""VAE encode and decode beside diffusers' on the same weights: seconds in this process, peak memory in a child each.

Decoding in strips stands beside decoding whole pictures: less memory, more work.
Wan 2.1's VAE has its full size, 2.2's half the channels of the real one. fp32, as the reference computes.
Run as a script with an engine, a version, an operation and a folder, it does it once and prints its peak memory.
"""

import sys
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

Operation = Callable[[], Tensor]


def _input(version: str, operation: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    frames, height, width = LATENT_SIZE
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

    stored = open_folder(folder)
    reader = stored.renamed(vae_from_diffusers(stored.names(), version))
    statistics = json.loads((folder / "config.json").read_text())
    config = vae_config(reader, statistics["latents_mean"], statistics["latents_std"])
    vae = load_vae(reader, config, encoder=operation == "encode", decoder=operation != "encode")
    x = _input(version, operation)
    if operation == "encode":
        return lambda: encode(vae, x)
    if operation in ("whole", "strips"):
        num_tiles = NUM_TILES if operation == "strips" else 1
        return lambda: torch.cat(list(decode_pixels(vae, x, num_tiles)))
    return lambda: torch.cat(list(decode(vae, x)), dim=2)


def _diffusers(folder: Path, version: str, operation: str) -> Operation:
    from diffusers import AutoencoderKLWan
    from reference.vae import diffusers_decode, diffusers_encode

    model = AutoencoderKLWan.from_pretrained(folder).eval()
    x = _input(version, operation)
    call = {"encode": diffusers_encode, "decode": diffusers_decode}[operation]
    return lambda: call(model, x)


def _whole(folder: Path, version: str, _: str) -> Operation:
    return _wanfast(folder, version, "whole")


ENGINES = {"wanfast": _wanfast, "diffusers": _diffusers, "whole": _whole}


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


@torch.inference_mode()
def _child(engine: str, version: str, operation: str, folder: str) -> None:
    print_peak(engine, lambda: ENGINES[engine](Path(folder), version, operation))


if __name__ == "__main__":
    _child(*sys.argv[1:])
