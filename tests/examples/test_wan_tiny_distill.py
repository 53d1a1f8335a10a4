"""The distillation recipe: what the teacher leaves behind, what the student learns from it, and the files it writes."""

from dataclasses import replace
from pathlib import Path

import distill
import pytest
import torch
from distill import ALPHA, LEVELS, RANK, SMALL_STEPS, add_low_rank, follow, lightning_tensors, loss
from dit_model import BOUNDARY, DiTSizes
from optimizer import Both
from safetensors.torch import save_file
from torch import Tensor, nn
from train_dit import Model

from wanfast.config import T2V_A14B
from wanfast.lora import open_lora, parse_lora

SMALL = DiTSizes(dim=64, ffn_dim=64, num_layers=2, head_dim=32)


class Line(nn.Module):
    """A teacher whose velocity is the same everywhere, so that its path is known."""

    def __init__(self, with_text: float, without: float) -> None:
        super().__init__()
        self.values = (with_text, without)
        self.sigmas: list[float] = []

    def forward(self, latents: Tensor, sigmas: Tensor, captions: list[str]) -> Tensor:
        self.sigmas.append(float(sigmas[0]))
        value = torch.tensor([self.values[0] if caption else self.values[1] for caption in captions])
        return value.view(-1, 1, 1, 1, 1).expand_as(latents)


def test_the_students_levels_are_the_lightning_presets() -> None:
    assert pytest.approx((1.0, 0.9375, 5 / 6, 0.625, 0.0)) == LEVELS


def test_the_teacher_follows_its_guided_velocity(monkeypatch: pytest.MonkeyPatch) -> None:
    high, low = Line(0.5, 0.25), Line(1.0, 2.0)
    visited = follow({"high_noise": high, "low_noise": low}, range(3, 5))  # type: ignore[dict-item]
    assert visited.shape == (2, 5, 16, 5, 8, 8)
    slope_high, slope_low = 0.25 + 4.0 * 0.25, 2.0 - 3.0 * 1.0
    steps = visited.diff(dim=1)[:, :, 0, 0, 0, 0]
    want = [(LEVELS[i + 1] - LEVELS[i]) * (slope_high if i < 2 else slope_low) for i in range(4)]
    assert torch.allclose(steps, torch.tensor(want).expand(2, 4), atol=1e-5)
    assert len(high.sigmas) == len(low.sigmas) == 2 * SMALL_STEPS
    assert min(high.sigmas) > 0.83 and max(low.sigmas) < BOUNDARY
    assert not torch.equal(visited[0, 0], visited[1, 0])
    again = follow({"high_noise": high, "low_noise": low}, range(4, 5))  # type: ignore[dict-item]
    assert torch.equal(again[0, 0], visited[1, 0])  # the noise is the clip's own


def test_a_student_learns_straight_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "BATCH", 4)
    torch.manual_seed(0)
    model = Model(SMALL)
    nn.init.normal_(model.dit.head.head.weight, std=0.1)
    nn.init.normal_(model.dit.time_projection[1].weight, std=0.1)
    latents = torch.randn(2, 16, 5, 8, 8)
    text = model.read(["a red circle", ""])
    before = model.dit(latents, torch.full((2,), 900.0), text)
    model.requires_grad_(False)
    added = add_low_rank(model.dit)
    assert torch.equal(model.dit(latents, torch.full((2,), 900.0), text), before)  # up starts at zero
    assert len(added) == 2 * 10
    trajectories = torch.randn(4, 1, 16, 5, 8, 8) * torch.linspace(1, 0.5, 5).view(1, 5, 1, 1, 1, 1)
    additions = nn.ModuleDict({name.replace(".", "/"): addition for name, addition in added.items()})
    optimizer, values = Both(additions, (), 0.02, 0.02), []
    for _ in range(8):
        value = loss(model, trajectories, (0, 1), step=0)
        value.backward()
        optimizer.step(1.0)
        values.append(value.item())
    assert values[-1] < values[0]
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "parametrizations" not in name)


def test_the_files_are_loras_of_the_lightning_dialect(tmp_path: Path) -> None:
    added = add_low_rank(Model(SMALL).dit)
    nn.init.normal_(added["blocks.1.ffn.2"].up)
    save_file(lightning_tensors(added), tmp_path / "high_noise_model.safetensors")
    dit = replace(
        T2V_A14B.dit, dim=SMALL.dim, ffn_dim=SMALL.ffn_dim, num_heads=2, num_layers=2, text_dim=SMALL.text_dim
    )
    lora = open_lora(parse_lora(tmp_path / "high_noise_model.safetensors"), replace(T2V_A14B, dit=dit))
    assert set(lora.layers) == {"high_noise"}
    assert set(lora.layers["high_noise"]) == set(added)
    assert {keys.scale for keys in lora.layers["high_noise"].values()} == {ALPHA / RANK}
    assert not lora.report.unmatched
    change = added["blocks.1.ffn.2"](torch.zeros(64, 64))
    assert torch.allclose(change, added["blocks.1.ffn.2"].up @ added["blocks.1.ffn.2"].down * ALPHA / RANK)
