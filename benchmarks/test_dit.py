"""One DiT forward beside diffusers' on the same weights: seconds in this process, peak memory in a child process each.

Run as a script with an engine, a dtype and a folder, it does one forward and prints its peak memory: the child's part.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from safetensors.torch import load_file
from side_by_side import compare, compare_memory, print_peak
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

    benchmark.extra_info["threads"] = torch.get_num_threads()
    compare(benchmark, ours, theirs, peer="diffusers", rounds=ROUNDS)
    compare_memory(benchmark, __file__, dtype, str(folder), peer="diffusers")


@torch.inference_mode()
def _child(engine: str, dtype: str, folder: str) -> None:
    print_peak(engine, lambda: ENGINES[engine](Path(folder), DTYPES[dtype]))


if __name__ == "__main__":
    _child(*sys.argv[1:])
