"""Distills 40 guided steps into 4 without guidance, as a pair of LoRAs with the names of the Lightning releases.

Usage: python distill.py RUN_FOLDER trajectories
       python distill.py RUN_FOLDER high_noise
       python distill.py RUN_FOLDER low_noise

The teacher follows its guided velocity in many small steps and leaves its latents behind where the four steps of the
student will begin. Each expert then learns to go from one of them to the next in a single straight line.
"""

import argparse
import itertools
import os
import sys
from pathlib import Path

import torch
from data import make_scene
from dit_model import BOUNDARY, DiT, Text
from evaluate import load_model, noise_levels
from optimizer import Both
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from train_dit import Model
from training import INTERRUPTED, Average, Run, learning_rate, wait_while_paused

SEED = 4
LEVELS = noise_levels(steps=4, shift=5.0)  # of the student's steps, and 0
SMALL_STEPS = 10  # of the teacher, for each of the student's
GUIDANCE = {"high_noise": 4.0, "low_noise": 3.0}
NUM_CLIPS, PIECE = 2000, 50
RANK, ALPHA = 16, 16.0
NUM_STEPS, BATCH, PEAK = 800, 32, 0.01


class LowRank(nn.Module):
    """Adds up @ down x alpha / rank to a matrix."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, RANK))

    def forward(self, weight: Tensor) -> Tensor:
        """The matrix with its addition."""
        return weight + self.up @ self.down * (ALPHA / RANK)


def add_low_rank(dit: DiT) -> dict[str, LowRank]:
    """Freeze a transformer but for low-rank additions to the linear layers of its blocks; by official layer name."""
    dit.requires_grad_(False)
    added = {}
    for name, module in list(dit.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            added[name] = LowRank(module.out_features, module.in_features)
            parametrize.register_parametrization(module, "weight", added[name])
    return added


def lightning_tensors(added: dict[str, LowRank]) -> dict[str, Tensor]:
    """Name the additions as the Lightning releases do."""
    tensors = {}
    for name, addition in added.items():
        tensors[f"diffusion_model.{name}.lora_down.weight"] = addition.down.detach().clone()
        tensors[f"diffusion_model.{name}.lora_up.weight"] = addition.up.detach().clone()
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(ALPHA)
    return tensors


def caption(number: int) -> str:
    """Of a trajectory; a clip's number tells its noise as well."""
    return make_scene(SEED, number).caption


def follow(experts: dict[str, Model], numbers: range) -> Tensor:
    """The teacher's latents at every level, from noise to clip: [B, 5, 16, 5, 8, 8]."""
    noise = [torch.randn(16, 5, 8, 8, generator=torch.Generator().manual_seed(SEED * 10**6 + n)) for n in numbers]
    latents = torch.stack(noise)
    captions = [caption(number) for number in numbers] + [""] * len(numbers)
    visited = [latents]
    for start, end in itertools.pairwise(LEVELS):
        name = "high_noise" if start >= BOUNDARY else "low_noise"
        spots = torch.linspace(start, end, SMALL_STEPS + 1)
        for sigma, next_sigma in itertools.pairwise(spots):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                levels = sigma.expand(len(captions))
                with_text, without = experts[name](latents.repeat(2, 1, 1, 1, 1), levels, captions).chunk(2)
            velocity = without + GUIDANCE[name] * (with_text - without)
            latents = latents + (next_sigma - sigma) * velocity
        visited.append(latents)
    return torch.stack(visited, dim=1)


def write_trajectories(folder: Path) -> None:
    """Let the teacher work; pieces that are there are kept."""
    experts = {name: load_model(folder, name) for name in GUIDANCE}
    (folder / "trajectories").mkdir(exist_ok=True)
    for first in range(0, NUM_CLIPS, PIECE):
        path = folder / "trajectories" / f"{first:06}.pt"
        if not path.exists():
            wait_while_paused(folder)
            torch.save(follow(experts, range(first, first + PIECE)).half(), path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)


def loss(model: Model, trajectories: Tensor, levels: tuple[int, ...], step: int) -> Tensor:
    """Mean squared error of the straight line from one level to the next, on the batch of a step."""
    generator = torch.Generator().manual_seed(step)
    numbers = torch.randint(len(trajectories), (BATCH,), generator=generator)
    chosen = torch.tensor(levels)[torch.randint(len(levels), (BATCH,), generator=generator)]
    sigmas = torch.tensor(LEVELS)
    start, end = trajectories[numbers, chosen].float(), trajectories[numbers, chosen + 1].float()
    length = (sigmas[chosen + 1] - sigmas[chosen]).view(-1, 1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        text: Text = model.read([caption(int(number)) for number in numbers])
        velocity = model.dit(start, 1000 * sigmas[chosen], text)  # the Euler sampler tells it no integer
    return (velocity - (end - start) / length).square().mean()


def distill(folder: Path, name: str) -> bool:
    """Train one expert's LoRA, and write it when it is done."""
    pieces = [torch.load(folder / "trajectories" / f"{n:06}.pt", weights_only=True) for n in range(0, NUM_CLIPS, PIECE)]
    trajectories = torch.cat(pieces)
    torch.manual_seed(SEED)
    model = load_model(folder, name).requires_grad_(False)
    added = add_low_rank(model.dit)
    additions = nn.ModuleDict({key.replace(".", "/"): addition for key, addition in added.items()})
    optimizer = Both(additions, (), lr=PEAK, adam_lr=PEAK)
    average = Average(additions, 0.99)
    levels = tuple(i for i, sigma in enumerate(LEVELS[:-1]) if (sigma >= BOUNDARY) == (name == "high_noise"))
    run = Run(folder, f"lora_{name}", {"model": additions, "optimizer": optimizer, "average": average})

    def take_step(step: int) -> dict[str, float]:
        value = loss(model, trajectories, levels, step)
        value.backward()
        optimizer.step(learning_rate(step, NUM_STEPS))
        average.update(step)
        return {"loss": value.item()}

    is_done = run.train(NUM_STEPS, take_step)
    if is_done:
        with torch.no_grad():
            for parameter_name, parameter in additions.named_parameters():
                parameter.copy_(average.values[parameter_name])
        target = folder / "lightning"
        target.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.bfloat16() for key, tensor in lightning_tensors(added).items()}
        save_file(tensors, target / f"{name}_model.safetensors", metadata={"format": "pt"})
    return is_done


def main() -> None:
    """Take one of the three steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=["trajectories", *GUIDANCE])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.part == "trajectories":
        write_trajectories(options.folder)
    elif not distill(options.folder, options.part):
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
