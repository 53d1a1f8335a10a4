"""One DiT forward with its blocks behind a residency, beside the same forward over a list of them, on a CPU.

In place nothing is copied: what is measured is what asking costs. In two slots every block is read from its file into a
slot while the one before it computes; on a CPU both want the same cores and the same memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from side_by_side import compare
from torch import Tensor

from wanfast.checkpoint.reader import Reader, open_file
from wanfast.config import DiTConfig
from wanfast.dit.model import predict_velocities
from wanfast.dit.weights import BlockWeights, expected_tensors, load_block, load_outer
from wanfast.random_weights import random_tensors
from wanfast.residency import Residency, weight_bytes
from wanfast.residency.moves import plan_moves

CONFIG = DiTConfig(
    in_channels=16,
    out_channels=16,
    dim=512,
    ffn_dim=2048,
    num_heads=4,
    num_layers=6,
    text_dim=512,
    text_len=64,
    freq_dim=256,
    patch_size=(1, 2, 2),
    eps=1e-6,
)
GRID = (1, 32, 32)  # latent frames, rows, columns: 256 tokens
DTYPE, TIMESTEP, ROUNDS, PASSES = torch.float32, 611, 7, 2


@dataclass(frozen=True)
class Model:
    """A DiT in a file, and one forward of it over any blocks."""

    reader: Reader
    forward: Callable[[Iterator[BlockWeights]], Tensor]

    def load(self, _: str, index: int) -> BlockWeights:
        """Read a block."""
        return load_block(self.reader, CONFIG, index, DTYPE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """One DiT on disk in the dtype it computes in."""
    from safetensors.torch import save_file

    path: Path = tmp_path_factory.mktemp("dit") / "model.safetensors"
    save_file(random_tensors(expected_tensors(CONFIG), "residency"), path)
    reader = open_file(path)
    outer = load_outer(reader, CONFIG, DTYPE)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, *GRID, generator=generator)
    context = torch.randn(1, 64, CONFIG.text_dim, generator=generator)
    return Model(reader, lambda blocks: predict_velocities(latents, TIMESTEP, [context], outer, blocks, CONFIG)[0])


@torch.no_grad()
@pytest.mark.parametrize("num_slots", [None, 2, 4], ids=["in place", "2 slots", "4 slots"])
def test_residency(benchmark: BenchmarkFixture, model: Model, num_slots: int | None) -> None:
    size = weight_bytes(model.load("single", 0)) + 27 * 256
    budget = None if num_slots is None else num_slots * size
    residency = Residency(model.load, CONFIG.num_layers, torch.device("cpu"), budget, slot_bytes=size)
    blocks = [model.load("single", index) for index in range(CONFIG.num_layers)]
    passes = ["single"] * PASSES

    def ours() -> Tensor:
        residency.begin(passes)
        for _ in passes:
            velocity = model.forward(residency.blocks("single"))
        residency.end()
        return velocity

    def plain() -> Tensor:
        for _ in passes:
            velocity = model.forward(iter(blocks))
        return velocity

    torch.testing.assert_close(ours(), plain(), rtol=0, atol=1e-4)
    accesses = [("single", index) for _ in passes for index in range(CONFIG.num_layers)]
    moves = 0 if num_slots is None else len(plan_moves(accesses, num_slots).moves)
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "megabytes_copied": round(moves * size / 1e6)}
    compare(benchmark, ours, plain, peer="plain", rounds=ROUNDS)
    residency.release()
