"""VAE encode and decode beside diffusers' on the same weights: seconds in this process, peak memory in a child each.

Every round times both, one after the other, so that a slow spell of the machine meets both alike.
Wan 2.1's VAE has its full size, 2.2's half the channels of the real one. fp32, as the reference computes.
Run as a script with an engine, a version, an operation and a folder, it does it once and prints its peak memory.
"""

import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

LATENT_SIZE = (3, 8, 12)  # frames, rows, columns: 64 x 96 pixels in 2.1, 128 x 192 in 2.2, 9 frames
STRIDE, CHANNELS = {"2.1": 8, "2.2": 16}, {"2.1": 16, "2.2": 48}
ROUNDS = 3

Operation = Callable[[], Tensor]


def _input(version: str, operation: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    frames, height, width = LATENT_SIZE
    if operation == "decode":
        return torch.randn(1, CHANNELS[version], *LATENT_SIZE, generator=generator)
    size = (4 * frames - 3, height * STRIDE[version], width * STRIDE[version])
    return torch.rand(1, 3, *size, generator=generator) * 2 - 1


def _wanfast(folder: Path, version: str, operation: str) -> Operation:
    import json

    from wanfast.checkpoint.names import vae_from_diffusers
    from wanfast.checkpoint.reader import open_folder
    from wanfast.vae.decode import decode
    from wanfast.vae.encode import encode
    from wanfast.vae.weights import load_vae, vae_config

    stored = open_folder(folder)
    reader = stored.renamed(vae_from_diffusers(stored.names(), version))
    statistics = json.loads((folder / "config.json").read_text())
    config = vae_config(reader, statistics["latents_mean"], statistics["latents_std"])
    vae = load_vae(reader, config, encoder=operation == "encode", decoder=operation == "decode")
    x = _input(version, operation)
    if operation == "encode":
        return lambda: encode(vae, x)
    return lambda: torch.cat(list(decode(vae, x)), dim=2)


def _diffusers(folder: Path, version: str, operation: str) -> Operation:
    from diffusers import AutoencoderKLWan
    from reference.vae import diffusers_decode, diffusers_encode

    model = AutoencoderKLWan.from_pretrained(folder).eval()
    x = _input(version, operation)
    call = {"encode": diffusers_encode, "decode": diffusers_decode}[operation]
    return lambda: call(model, x)


ENGINES = {"wanfast": _wanfast, "diffusers": _diffusers}


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
    peaks = {engine: _peak_megabytes(engine, version, operation, folder) for engine in ENGINES}
    ours, theirs = (build(folder, version, operation) for build in ENGINES.values())
    assert_close(got=ours(), want=theirs(), op="vae_fp32")
    peer_seconds: list[float] = []

    def time_peer() -> None:
        start = time.perf_counter()
        theirs()
        peer_seconds.append(time.perf_counter() - start)

    benchmark.pedantic(ours, setup=time_peer, rounds=ROUNDS)
    seconds, peer = benchmark.stats.stats.median, statistics.median(peer_seconds)
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "diffusers_seconds": round(peer, 4),
        "diffusers_seconds_over_ours": round(peer / seconds, 3),
        "diffusers_fastest_over_our_fastest": round(min(peer_seconds) / benchmark.stats.stats.min, 3),
        "peak_mb": peaks["wanfast"],
        "diffusers_peak_mb": peaks["diffusers"],
    }
    assert peaks["wanfast"][-1] <= peaks["diffusers"][-1]


def _peak_megabytes(engine: str, version: str, operation: str, folder: Path) -> list[float]:
    """What a fresh process holds after its imports: the weights at rest, and the most during one call."""
    command = [sys.executable, __file__, engine, version, operation, str(folder)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [float(word) for word in output.split()[-2:]]


def _memory_megabytes(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


@torch.inference_mode()
def _main(engine: str, version: str, operation: str, folder: str) -> None:
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    if engine == "diffusers":
        import reference.vae  # noqa: F401  (what an import costs is not a VAE's memory)
    else:
        import wanfast.vae.decode
        import wanfast.vae.encode  # noqa: F401
    imported = _memory_megabytes("VmRSS")
    call = ENGINES[engine](Path(folder), version, operation)
    ctypes.CDLL(None).malloc_trim(0)
    at_rest = _memory_megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    call()
    print(round(at_rest - imported, 1), round(_memory_megabytes("VmHWM") - imported, 1))


if __name__ == "__main__":
    _main(*sys.argv[1:])
