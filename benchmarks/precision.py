"""How far each precision is from fp32, block by block and in the velocity: the table of docs/numerics.md.

    python benchmarks/precision.py --write     measure; put the table into docs/numerics.md and precision.json

Random weights of Wan's proportions (heads of 128, an FFN 2.7 times as wide), with what makes Wan's activations hard to
round: channels that all keys share, channels that a norm's scale blows up, and a few outlier tokens. No trained weights
are in it. On a CPU the references round exactly as the kernels do.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from wanfast.checkpoint.reader import Reader, memory_reader
from wanfast.config import T2V_A14B, DiTConfig
from wanfast.dit import model as dit_model
from wanfast.dit.packed import DTYPES, pack_block, prepare_block
from wanfast.dit.weights import expected_tensors, load_block, load_outer

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "precision.json", ROOT / "docs" / "numerics.md"
BEGIN, END = "<!-- precision table -->", "<!-- end of the precision table -->"
CONFIG = replace(T2V_A14B.dit, dim=1280, num_heads=10, ffn_dim=3456, num_layers=12, text_dim=256, text_len=64)
GRID = (5, 20, 24)  # of latents: 600 tokens
TIERS = ("exact", "int8", "fp8")


def make_reader(config: DiTConfig) -> Reader:
    """Draw weights that keep the size of what they multiply, with outliers."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for name, shape in expected_tensors(config).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            state[name] = 1 + 0.1 * noise
        elif name.endswith(("bias", "modulation")):
            state[name] = 0.1 * noise
        else:
            state[name] = noise * shape[0] ** 0.5 / noise.numel() ** 0.5
    for index in range(config.num_layers):
        state[f"blocks.{index}.self_attn.k.bias"][::16] += 4
        state[f"blocks.{index}.self_attn.v.bias"][::24] += 2
        state[f"blocks.{index}.modulation"][:, 1, ::160] += 8
        state[f"blocks.{index}.modulation"][:, 4, 5::160] += 8
    return memory_reader(state)


def streams(reader: Reader, config: DiTConfig, precision: str) -> tuple[list[Tensor], Tensor]:
    """Run one forward; give the residual stream after each block, and the velocity."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, config.in_channels, *GRID, generator=generator)
    latents[:, :, 2, :4, :4] *= 6  # outlier tokens
    context = torch.randn(1, 20, config.text_dim, generator=generator).to(dtype)
    seen: list[Tensor] = []
    keep: list[Tensor] = []

    def blocks():
        for index in range(config.num_layers):
            block = load_block(reader, config, index, dtype)
            if precision in DTYPES:
                block = pack_block(prepare_block(block, DTYPES[precision]), DTYPES[precision])
            yield block
            seen.append(keep[0].clone())

    own = dit_model.dit_block, dit_model.dit_block_8bit

    def watched(run):
        def call(hidden: Tensor, *arguments: object, **options: object) -> Tensor:
            keep[:] = [hidden]
            return run(hidden, *arguments, **options)

        return call

    dit_model.dit_block, dit_model.dit_block_8bit = map(watched, own)
    try:
        outer = load_outer(reader, config, dtype)
        (velocity,) = dit_model.predict_velocities(latents, 700, [context], outer, blocks(), config)
    finally:
        dit_model.dit_block, dit_model.dit_block_8bit = own
    return seen, velocity


def error(got: Tensor, want: Tensor) -> float:
    """RMS of the difference as a share of the RMS of what it differs from."""
    return float((got - want).double().square().mean().sqrt() / want.double().square().mean().sqrt())


@torch.no_grad()
def measure() -> dict[str, dict[str, list[float] | float]]:
    """Errors of every tier against fp32, and against exact."""
    reader = make_reader(CONFIG)
    runs = {precision: streams(reader, CONFIG, precision) for precision in ("fp32", *TIERS)}
    results: dict[str, dict[str, list[float] | float]] = {}
    for tier in TIERS:
        blocks, velocity = runs[tier]
        results[tier] = {
            "blocks": [error(*pair) for pair in zip(blocks, runs["fp32"][0], strict=True)],
            "velocity": error(velocity, runs["fp32"][1]),
            "velocity_to_exact": error(velocity, runs["exact"][1]),
        }
    return results


def table(results: Mapping[str, Mapping[str, list[float] | float]]) -> str:
    """Write the results as Markdown."""
    count = len(results["exact"]["blocks"])
    shown = [0, *range(2, count - 1, 3), count - 1]
    head = [f"block {index}" for index in shown] + ["velocity", "velocity, to exact"]
    lines = ["| precision | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for tier, found in results.items():
        values = [found["blocks"][index] for index in shown] + [found["velocity"], found["velocity_to_exact"]]
        lines.append(
            f"| {tier} | " + " | ".join("-" if not value else f"{100 * value:.2f} %" for value in values) + " |"
        )
    return "\n".join(lines)


def put_into_page(page: str, text: str) -> str:
    """Replace what stands between the marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    results = measure()
    print(table(results))
    if arguments.write:
        RESULTS.write_text(json.dumps({"torch": torch.__version__, "precisions": results}, indent=1) + "\n")
        PAGE.write_text(put_into_page(PAGE.read_text(), table(results)))


if __name__ == "__main__":
    main()
