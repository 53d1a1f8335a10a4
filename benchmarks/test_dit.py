"""One DiT forward beside diffusers' on the same weights: seconds in this process, peak memory in a child process each.

Run as a script with an engine, a dtype and a folder, it does one forward and prints its peak memory: the child's part.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from side_by_side import compare, compare_memory, print_peak
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHANNELS, TEXT_DIM, TEXT_LEN, TIMESTEP = 16, 4096, 512, 611
GRID = (4, 64, 64)  # latent frames, rows, columns: 4,096 tokens
ROUNDS = 5

Forward = Callable[[], Tensor]


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, CHANNELS, *GRID, generator=generator)
    return latents, torch.randn(1, TEXT_LEN, TEXT_DIM, generator=generator).to(dtype)


def _wanfast(folder: Path, dtype: torch.dtype) -> Forward:
    from wanfast.checkpoint.names import dit_from_diffusers
    from wanfast.checkpoint.reader import open_folder
    from wanfast.dit.model import predict_velocities
    from wanfast.dit.weights import dit_config, load_block, load_outer

    stored = open_folder(folder)
    reader = stored.renamed(dit_from_diffusers(stored.names()))
    config = dit_config(reader)
    outer = load_outer(reader, config, dtype)
    blocks = [load_block(reader, config, index, dtype) for index in range(config.num_layers)]
    latents, context = _inputs(dtype)
    return lambda: predict_velocities(latents, TIMESTEP, [context], outer, blocks, config)[0]


def _diffusers(folder: Path, dtype: torch.dtype) -> Forward:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype).eval()
    latents, context = _inputs(dtype)
    timestep = torch.tensor([TIMESTEP])
    return lambda: model(latents.to(dtype), timestep, context).sample.float()


ENGINES = {"wanfast": _wanfast, "diffusers": _diffusers}


@pytest.fixture(scope="module", params=DTYPES)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """One DiT on disk in the dtype it computes in."""
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
    diffusers_dit(config).to(DTYPES[request.param]).save_pretrained(path)
    return request.param, path


@torch.inference_mode()
def test_dit_forward(benchmark: BenchmarkFixture, stored: tuple[str, Path]) -> None:
    from tolerance import assert_close

    dtype, folder = stored
    ours, theirs = (build(folder, DTYPES[dtype]) for build in ENGINES.values())
    truth = theirs() if dtype == "fp32" else _wanfast(folder, torch.float32)()
    assert_close(got=ours(), want=truth, op=f"dit_{dtype}")
    benchmark.extra_info["threads"] = torch.get_num_threads()
    compare(benchmark, ours, theirs, peer="diffusers", rounds=ROUNDS)
    compare_memory(benchmark, __file__, dtype, str(folder), peer="diffusers")


@torch.inference_mode()
def _child(engine: str, dtype: str, folder: str) -> None:
    print_peak(engine, lambda: ENGINES[engine](Path(folder), DTYPES[dtype]))


if __name__ == "__main__":
    _child(*sys.argv[1:])
