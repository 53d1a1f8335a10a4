"""One DiT forward beside diffusers' on the same weights: seconds in this process, peak memory in a child process each.

Every round times both, one after the other, so that a slow spell of the machine meets both alike.
Run as a script with an engine, a dtype and a folder, it does one forward and prints its peak memory: the child's part.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from safetensors.torch import load_file
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHANNELS, TEXT_DIM, TEXT_LEN, TIMESTEP = 16, 4096, 512, 611
GRID = (4, 64, 64)  # latent frames, rows, columns: 4,096 tokens
WEIGHTS = "diffusion_pytorch_model.safetensors"
ROUNDS = 5

Forward = Callable[[], Tensor]


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, CHANNELS, *GRID, generator=generator)
    return latents, torch.randn(1, TEXT_LEN, TEXT_DIM, generator=generator).to(dtype)


def _wanfast(folder: Path, dtype: torch.dtype) -> Forward:
    from wanfast.checkpoint.names import dit_from_diffusers
    from wanfast.checkpoint.reader import memory_reader
    from wanfast.dit.model import predict_velocities
    from wanfast.dit.weights import dit_config, load_block, load_outer

    state = load_file(folder / WEIGHTS)
    reader = memory_reader({official: state[name] for name, official in dit_from_diffusers(state).items()})
    config = dit_config(reader)
    outer = load_outer(reader, config, dtype)
    blocks = [load_block(reader, config, index, dtype) for index in range(config.num_layers)]
    latents, context = _inputs(dtype)
    return lambda: predict_velocities(latents, TIMESTEP, [context], outer, blocks, config)[0]


def _diffusers(folder: Path, dtype: torch.dtype) -> Forward:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder)).eval()
    model.load_state_dict(load_file(folder / WEIGHTS))
    for name, parameter in model.named_parameters():  # as from_pretrained does where accelerate is installed
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    latents, context = _inputs(dtype)
    timestep = torch.tensor([TIMESTEP])
    return lambda: model(latents.to(dtype), timestep, context).sample.float()


ENGINES = {"wanfast": _wanfast, "diffusers": _diffusers}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from reference.dit import diffusers_dit

    from wanfast.config import DiTConfig

    config = DiTConfig(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        dim=512,
        ffn_dim=2048,
        num_heads=4,
        num_layers=8,
        text_dim=TEXT_DIM,
        text_len=TEXT_LEN,
        freq_dim=256,
        patch_size=(1, 2, 2),
        eps=1e-6,
    )
    path = tmp_path_factory.mktemp("dit")
    diffusers_dit(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_dit_forward(benchmark: BenchmarkFixture, folder: Path, dtype: str) -> None:
    from tolerance import assert_close

    ours, theirs = (build(folder, DTYPES[dtype]) for build in ENGINES.values())
    truth = ours() if dtype == "fp32" else _wanfast(folder, torch.float32)()
    assert_close(got=ours(), want=theirs() if dtype == "fp32" else truth, op=f"dit_{dtype}")

    peer_seconds: list[float] = []

    def time_peer() -> None:
        start = time.perf_counter()
        theirs()
        peer_seconds.append(time.perf_counter() - start)

    benchmark.pedantic(ours, setup=time_peer, rounds=ROUNDS)
    peaks = {engine: _peak_megabytes(engine, dtype, folder) for engine in ENGINES}
    seconds, peer = benchmark.stats.stats.median, sorted(peer_seconds)[len(peer_seconds) // 2]
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "diffusers_seconds": round(peer, 4),
        "diffusers_seconds_over_ours": round(peer / seconds, 3),
        "diffusers_fastest_over_our_fastest": round(min(peer_seconds) / benchmark.stats.stats.min, 3),
        "forward_peak_mb": peaks["wanfast"],
        "diffusers_forward_peak_mb": peaks["diffusers"],
    }
    assert peaks["wanfast"] <= peaks["diffusers"]


def _peak_megabytes(engine: str, dtype: str, folder: Path) -> float:
    """Most memory one forward adds to a fresh process that holds the weights and inputs."""
    command = [sys.executable, __file__, engine, dtype, str(folder)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _status_kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


@torch.inference_mode()
def _child(engine: str, dtype: str, folder: str) -> None:
    torch.set_num_threads(2)
    forward = ENGINES[engine](Path(folder), DTYPES[dtype])
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status_kilobytes("VmRSS")
    forward()
    print((_status_kilobytes("VmHWM") - before) / 1e3)


if __name__ == "__main__":
    _child(*sys.argv[1:])
