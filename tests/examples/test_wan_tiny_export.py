"""What the recipe exports is a checkpoint that wanfast opens, and it makes the clips that the recipe's networks do."""

import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import distill
import evaluate
import latents
import numpy as np
import pytest
import torch
import train_dit
import train_i2v
from dit_model import DiTSizes
from evaluate import decode, load_model, sample
from evaluate_vae import load_vae
from export import export, export_package, fold_statistics
from judge_checkpoint import diffusers_engine, wanfast_engine
from latents import load_statistics
from optimizer import Both
from plot import draw
from safetensors.torch import save_file
from torch import nn
from train_dit import Model
from train_vae import make_vae
from training import Average, Run
from vae_model import VAE

import wanfast

SMALL = DiTSizes(dim=256, ffn_dim=256, num_layers=1)
CAPTION = "a red circle moves left on a black background"


def shaken(module: nn.Module, seed: int, size: float) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder as it is after all trainings, with networks that have learnt nothing."""
    folder = tmp_path_factory.mktemp("run")
    vae = shaken(make_vae(base=4), 0, 0.05)
    Run(folder, "vae", {"model": vae}).train(0, lambda step: {})
    for number, name in enumerate(("base", "high_noise", "low_noise")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_dit, "Model", lambda: Model(SMALL))
            model = shaken(train_dit.make_model(name, folder), number, 0.02)
        parts = {"model": model, "optimizer": Both(model, (), 0.1, 0.1), "average": Average(model, 0.9)}
        Run(folder, name, parts).train(0, lambda step: {})
    (folder / "latents").mkdir()
    values = torch.randn(6, 16, 5, 8, 8, generator=torch.Generator().manual_seed(3)).half() * 3 + 1
    torch.save(values, folder / "latents" / "000000.pt")
    return folder


def test_folded_statistics_leave_the_pixels_as_they_were(run: Path) -> None:
    own, wans = load_vae(run), VAE(4)
    mean, deviation = load_statistics(run)
    row = wanfast.config.VAE_2_1
    wans.load_state_dict(fold_statistics(own.state_dict(), mean, deviation, row))
    video = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    axes = (1, 16, 1, 1, 1)
    with torch.no_grad():
        ours, theirs = own.encode(video)[0], wans.encode(video)[0]
        as_wan = (theirs - torch.tensor(row.latents_mean).view(axes)) / torch.tensor(row.latents_std).view(axes)
        assert torch.allclose(as_wan, (ours - mean.view(axes)) / deviation.view(axes), atol=1e-4)
        assert torch.allclose(wans.decode(theirs), own.decode(ours), atol=1e-4)


def test_latents_are_normed_over_all_pieces(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "NUM_CLIPS", 6)
    monkeypatch.setattr(latents, "PIECE", 6)
    clips = latents.load_latents(run).transpose(0, 1).flatten(1)
    assert torch.allclose(clips.mean(1), torch.zeros(16), atol=1e-2)
    assert torch.allclose(clips.std(1), torch.ones(16), atol=1e-2)


def test_wanfast_shows_what_the_recipe_shows(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "Model", lambda: Model(SMALL))
    export(run, tmp_path / "tiny")
    pipeline = wanfast.load(tmp_path / "tiny", device="cpu")
    assert pipeline.loaded.config.name == "wan-tiny"
    video = pipeline.generate(CAPTION, num_inference_steps=8, solver="dpmpp", seed=5)
    experts = [load_model(run, part) for part in ("high_noise", "low_noise")]
    drawn = sample(experts, [CAPTION], steps=8, shift=12.0, guidance=(4.0, 3.0), seed=5)
    clip = decode(load_vae(run), drawn, run)[0]
    got = np.stack([np.asarray(frame, dtype=np.float32) / 255 for frame in video.frames])
    assert got.shape == clip.shape
    assert got.std() > 0.02
    # Both round to bf16, at different places, which networks of random weights magnify.
    assert np.abs(got - clip).mean() < 0.03
    assert np.corrcoef(got.ravel(), clip.ravel())[0, 1] > 0.99


def test_the_package_has_what_was_trained(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sibling is stored in 8 bits and takes VAE and text encoder from its neighbour; LoRAs go with their preset."""
    trained = tmp_path / "run"
    shutil.copytree(run, trained)
    monkeypatch.setattr(train_i2v, "DiTSizes", lambda **sizes: replace(SMALL, **sizes))
    for number, name in enumerate(("high_noise", "low_noise")):
        model = shaken(train_i2v.make_model(train_dit.load_average(run, name)), 10 + number, 0.02)
        parts = {"model": model, "optimizer": Both(model, (), 0.1, 0.1), "average": Average(model, 0.9)}
        Run(trained, f"i2v_{name}", parts).train(0, lambda step: {})
    (trained / "lightning").mkdir()
    low_rank = distill.lightning_tensors(distill.add_low_rank(load_own(train_dit.load_average(run, "low_noise")).dit))
    for name in ("high_noise", "low_noise"):
        save_file(low_rank, trained / "lightning" / f"{name}_model.safetensors")
    export_package(trained, tmp_path / "wan_tiny")
    assert {path.name for path in (tmp_path / "wan_tiny").iterdir()} == {"t2v", "i2v"}
    monkeypatch.setattr("wanfast.tiny.__file__", str(tmp_path / "tiny.py"))
    picture = np.full((64, 64, 3), 90, np.uint8)
    asked = {"image": picture, "num_inference_steps": 3, "seed": 5}
    got = wanfast.load("wan-tiny-i2v", device="cpu").generate(CAPTION, **asked)
    assert (got.settings["model"], got.settings["model_path"]) == ("wan-tiny-i2v", "wan-tiny-i2v")
    export(trained, tmp_path / "whole", "i2v")
    want = wanfast.load(tmp_path / "whole", device="cpu").generate(CAPTION, **asked)
    assert (got.frames.float() - want.frames.float()).abs().mean() < 2
    assert np.corrcoef(got.frames.flatten(), want.frames.flatten())[0, 1] > 0.99
    video = wanfast.load(device="cpu").generate(CAPTION, preset="lightning4", seed=5)
    assert len(video.settings["loras"]) == 2


def test_the_plot_has_a_curve_for_every_log(tmp_path: Path) -> None:
    (tmp_path / "vae.csv").write_text("step,seconds,fit\n20,1,0.5\n40,2,0.25\n")
    (tmp_path / "base.csv").write_text("step,seconds,loss\n20,1,2\n")
    assert draw(tmp_path).count("<polyline") == 2


def test_diffusers_shows_what_wanfast_shows(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(run, tmp_path / "tiny")
    options = Namespace(steps=3, preset=None, lora=[])
    ours = wanfast_engine(tmp_path / "tiny", options)(CAPTION, 5)
    theirs = diffusers_engine(tmp_path / "tiny", options)(CAPTION, 5)
    assert ours.shape == theirs.shape == (17, 64, 64, 3)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.995
    assert np.abs(ours - theirs).mean() < 0.02


def test_an_image_to_video_expert_starts_as_the_text_to_video_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_i2v, "DiTSizes", lambda **sizes: replace(SMALL, **sizes))
    state = train_dit.load_average(run, "low_noise")
    own = load_own(state)
    model = train_i2v.make_model(state).eval()
    latents = torch.randn(2, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = train_i2v.with_mask(torch.randn(2, 16, 5, 8, 8))
    assert condition.shape == (2, 20, 5, 8, 8)
    assert condition[:, :4, 0].min() == 1 and condition[:, :4, 1:].abs().max() == 0
    with torch.no_grad():
        sigmas = torch.tensor([0.3, 0.7])
        want = own(latents, sigmas, [CAPTION, ""])
        got = model(torch.cat([latents, condition], dim=1), sigmas, [CAPTION, ""])
    assert torch.allclose(got, want, atol=1e-5)


def load_own(state: dict[str, torch.Tensor]) -> Model:
    model = Model(SMALL)
    model.load_state_dict(state)
    return model.eval()
