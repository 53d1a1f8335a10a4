"""The whole recipe in miniature: every script takes up what the one before left behind."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import distill
import evaluate
import evaluate_vae
import export
import latents
import numpy as np
import pytest
import recipe
import train_dit
import train_i2v
import train_ti2v
import train_vae
from dit_model import DiTSizes
from train_dit import PARTS, Model
from train_vae import Stage

import wanfast

SMALL = DiTSizes(dim=128, ffn_dim=128, num_layers=1)


def call(monkeypatch: pytest.MonkeyPatch, module: object, *arguments: object) -> object:
    """Run a script's main as from the command line; its exit status."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    try:
        module.main()  # type: ignore[attr-defined]
    except SystemExit as end:
        return end.code
    return 0


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a step or two of every training, of networks and data as small as can be."""
    monkeypatch.setattr(train_vae, "STAGES", (Stage(2, 2, 1, 32), Stage(1, 1, 17, 32)))
    make_vae = train_vae.make_vae
    monkeypatch.setattr(train_vae, "make_vae", lambda version: make_vae(version, base=4))
    for module in (latents, distill, train_i2v):
        monkeypatch.setattr(module, "NUM_CLIPS", 4)
        monkeypatch.setattr(module, "PIECE", 2)
    for module in (train_dit, train_ti2v):
        parts = {name: part._replace(num_steps=2) for name, part in module.PARTS.items()}
        monkeypatch.setattr(module, "PARTS", parts)
    for module in (train_dit, evaluate):
        monkeypatch.setattr(module, "Model", lambda: Model(SMALL))
    for module in (train_dit, distill, train_i2v, train_ti2v):
        monkeypatch.setattr(module, "BATCH", 2)
    for module in (distill, train_i2v):
        monkeypatch.setattr(module, "NUM_STEPS", 2)
    for module in (train_i2v, train_ti2v):
        monkeypatch.setattr(module, "NUM_JUDGED", 2)
        monkeypatch.setattr(module, "DiTSizes", lambda **sizes: replace(SMALL, **sizes))


def test_from_nothing_to_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_small(monkeypatch)
    assert call(monkeypatch, train_vae, tmp_path) == 0
    assert call(monkeypatch, evaluate_vae, tmp_path, "--clips", 1, "--require") == 1  # it has learnt nothing
    assert "frames 13-16" in capsys.readouterr().out
    assert call(monkeypatch, latents, tmp_path) == 0
    for part in PARTS:
        assert call(monkeypatch, train_dit, tmp_path, part) == 0
    assert call(monkeypatch, evaluate, tmp_path, "--captions", 8, "--steps", 2) == 0
    judged = json.loads(capsys.readouterr().out)
    assert set(judged["following"]) >= {"colour", "shape", "direction", "follows"}
    assert (tmp_path / "sheet_high_noise_low_noise_single.png").stat().st_size > 1000
    assert call(monkeypatch, export, tmp_path, tmp_path / "checkpoint") == 0
    for part in ("trajectories", "high_noise", "low_noise"):
        assert call(monkeypatch, distill, tmp_path, part) == 0

    capsys.readouterr()
    for part in ("conditions", "high_noise", "low_noise", "evaluate"):
        assert call(monkeypatch, train_i2v, tmp_path, part) == 0
    assert json.loads(capsys.readouterr().out)["first frame PSNR"] > 0
    assert call(monkeypatch, export, tmp_path, tmp_path / "i2v", "--task", "i2v") == 0
    picture = np.full((64, 64, 3), 99, dtype=np.uint8)
    video = wanfast.load(tmp_path / "i2v", device="cpu").generate(
        "it moves", image=picture, num_inference_steps=2, seed=1
    )
    assert video.frames.shape == (17, 64, 64, 3)

    assert call(monkeypatch, train_vae, tmp_path, "--version", "2.2") == 0
    assert call(monkeypatch, latents, tmp_path, "--version", "2.2") == 0
    capsys.readouterr()
    for part in ("ti2v", "ti2v_refined", "evaluate"):
        assert call(monkeypatch, train_ti2v, tmp_path, part) == 0
    assert json.loads(capsys.readouterr().out)["first frame PSNR"] > 0
    assert call(monkeypatch, export, tmp_path, tmp_path / "ti2v", "--task", "ti2v") == 0
    model = wanfast.load(tmp_path / "ti2v", device="cpu")
    assert model.loaded.config.task == "ti2v"
    for given in (None, picture):
        made = model.generate("a red circle moves left", image=given, num_inference_steps=2, seed=1)
        assert made.frames.shape == (17, 64, 64, 3)

    pipeline = wanfast.load(tmp_path / "checkpoint", device="cpu")
    loras = [tmp_path / "lightning" / f"{name}_model.safetensors" for name in distill.GUIDANCE]
    video = pipeline.generate("a red circle moves left", preset="lightning4", loras=loras, seed=1)
    assert len(list(video.frames)) == 17


def test_the_recipe_runs_scripts_that_exist_with_arguments_they_know(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"train_vae.py": train_vae, "evaluate_vae.py": evaluate_vae, "latents.py": latents}
    modules |= {"train_dit.py": train_dit, "evaluate.py": evaluate}
    outputs = [output for *_, output in recipe.STEPS if output]
    assert len(set(outputs)) == len(outputs)
    for script, arguments, _ in recipe.STEPS:
        assert (recipe.HERE / script).is_file()
        # An unknown argument would end with status 2 and say so; --help ends with 0 after all others are understood.
        assert call(monkeypatch, modules[script], "nowhere", *arguments, "--help") == 0


def test_the_recipe_stops_where_a_step_fails_and_goes_on_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first.py").write_text("print('first')")
    (tmp_path / "second.py").write_text("import pathlib, sys; sys.exit(3 * pathlib.Path(sys.argv[1], 'no').exists())")
    (tmp_path / "export.py").write_text("import pathlib, sys; pathlib.Path(sys.argv[2]).mkdir()")
    monkeypatch.setattr(recipe, "HERE", tmp_path)
    monkeypatch.setattr(recipe, "STEPS", (("first.py", (), "first.txt"), ("second.py", (), "")))
    run = tmp_path / "run"
    run.mkdir()
    (run / "no").touch()
    assert call(monkeypatch, recipe, run) == 3
    assert (run / "first.txt").read_text() == "first\n"
    assert not (run / "checkpoint").exists()
    (run / "no").unlink()
    (tmp_path / "first.py").write_text("raise SystemExit(1)")  # its result is there: it does not run again
    assert call(monkeypatch, recipe, run) == 0
    assert (run / "checkpoint").is_dir()
