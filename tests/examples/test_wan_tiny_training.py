"""Training steps run, stop when told to, wait when asked to, and go on as if they had never stopped."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import train_dit
import train_vae
from data import NUM_FRAMES
from dit_model import DiTSizes
from optimizer import Both
from torch import nn
from train_dit import PARTS, Model
from training import PAUSE, Average, Run, learning_rate

SCRIPTS = Path(train_vae.__file__).parent


class Toy:
    """A training of a small network whose steps depend on their number alone."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))
        self.optimizer = Both(self.model, adam=("2",), lr=0.05, adam_lr=0.01)
        self.average = Average(self.model, 0.9)
        self.run = Run(folder, "toy", {"model": self.model, "optimizer": self.optimizer, "average": self.average})

    def step(self, number: int) -> dict[str, float]:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(number))
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        self.optimizer.step(learning_rate(number, 90, warmup=5))
        self.average.update(number)
        return {"loss": loss.item()}

    def state(self) -> dict[str, torch.Tensor]:
        return {**self.model.state_dict(), **{f"average.{k}": v for k, v in self.average.state_dict().items()}}


def test_a_training_in_pieces_is_the_training_in_one(tmp_path: Path) -> None:
    whole = Toy(tmp_path / "whole")
    assert whole.run.train(90, whole.step)
    for steps in (33, 61, 90):
        piece = Toy(tmp_path / "pieces")
        assert piece.run.train(steps, piece.step)
    want, got = whole.state(), piece.state()
    assert all(torch.equal(got[name], want[name]) for name in want)
    rows = [(tmp_path / name / "toy.csv").read_text().splitlines() for name in ("whole", "pieces")]
    steps = [row.split(",")[0] for row in rows[1]]
    assert steps == ["step", "20", "40", "60", "80"] == [row.split(",")[0] for row in rows[0]]
    first, last = (float(rows[0][number].split(",")[2]) for number in (1, 4))
    assert last < 0.7 * first
    # The piece that began at step 33 saw seven of the steps that the row of step 40 sums up.
    values = [float(text.splitlines()[2].split(",")[2]) for text in map("\n".join, rows)]
    assert 0.5 < values[1] / values[0] < 2


def test_what_was_logged_after_the_checkpoint_is_logged_anew(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    toy.run.train(40, toy.step)
    with (tmp_path / "toy.csv").open("a") as log:
        log.write("60,9,9\n80,9")  # a killed process wrote on, and died within a line
    again = Toy(tmp_path)
    again.run.train(80, again.step)
    lines = (tmp_path / "toy.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "20", "40", "60", "80"]
    assert "9,9" not in lines[3]


def test_two_processes_do_not_train_the_same(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    with pytest.raises(SystemExit, match="another process is training toy"):
        Toy(tmp_path)
    assert toy.run.step == 0


def test_a_pause_holds_the_training_up(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    (tmp_path / PAUSE).touch()
    lift = threading.Timer(0.3, (tmp_path / PAUSE).unlink)
    lift.start()
    start = time.monotonic()
    toy.run.train(1, toy.step)
    assert time.monotonic() - start >= 0.3
    assert toy.run.seconds < 0.3  # of computing


def test_a_terminated_training_saves_its_last_step(tmp_path: Path) -> None:
    code = (
        "import sys, time; from training import Run; from torch import nn; import pathlib\n"
        "run = Run(pathlib.Path(sys.argv[1]), 'x', {'model': nn.Linear(1, 1)})\n"
        "print('ready', flush=True)\n"
        "done = run.train(10**9, lambda step: time.sleep(0.01) or {'loss': 1.0})\n"
        "print(run.step, done, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        step, done = process.stdout.read().split()
    assert process.returncode == 0
    assert (int(step) > 0, done) == (True, "False")
    assert torch.load(tmp_path / "x.pt", weights_only=True)["step"] == int(step)


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_a_step_of_the_vae_on_every_kind_of_batch(version: str) -> None:
    stages = (train_vae.Stage(3, 3, 1, 32), train_vae.Stage(2, 1, NUM_FRAMES, 32), train_vae.Stage(2, 1, 5, 64))
    shapes = [tuple(train_vae.batch(step, stages).shape) for step in (2, 3, 5)]
    assert shapes == [(3, 3, 1, 32, 32), (1, 3, NUM_FRAMES, 32, 32), (1, 3, 5, 64, 64)]
    assert torch.equal(train_vae.batch(4, stages), train_vae.batch(4, stages))
    vae = train_vae.make_vae(version, base=4)
    optimizer = Both(vae, adam=("encoder.conv1", "decoder.head"), lr=0.03, adam_lr=0.03)
    values = []
    for _ in range(6):
        loss, parts = train_vae.losses(vae, train_vae.batch(0, stages), step=0)
        loss.backward()
        optimizer.step(0.1)
        values.append(parts["fit"])
    assert np.isfinite(values).all()
    assert values[-1] < values[0]


def test_edges_weigh_more() -> None:
    video = torch.zeros(1, 3, 1, 8, 8)
    video[..., 4:] = 1.0
    weight = train_vae.edge_weight(video)[0, 0, 0]
    assert weight[0].tolist() == [1, 1, 5, 5, 5, 1, 1, 1]  # the step lies between columns 3 and 4


def test_a_step_of_the_transformer_and_of_an_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_dit, "BATCH", 4)
    small = DiTSizes(dim=64, ffn_dim=64, num_layers=1, head_dim=32)
    monkeypatch.setattr(train_dit, "Model", lambda: Model(small))
    clips = torch.randn(8, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    model = train_dit.make_model("base", tmp_path)
    before = train_dit.loss(model, clips, PARTS["base"], step=3)
    assert before.item() == pytest.approx(2.0, rel=0.1)  # the head starts at zero: noise and clips of variance 1
    assert train_dit.loss(model, clips, PARTS["base"], step=3).item() == before.item()
    average = Average(model, 0.9)
    run = Run(tmp_path, "base", {"model": model, "optimizer": Both(model, (), 0.01, 0.01), "average": average})
    run.train(0, lambda step: {})
    expert = train_dit.make_model("high_noise", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expert.parameters(), strict=True))
    train_dit.loss(expert, clips, PARTS["high_noise"], step=0).backward()
    assert expert.dit.head.head.weight.grad is not None
    assert all(parameter.grad is None for parameter in expert.text.parameters())


def test_captions_are_left_away_or_spoilt_as_often_as_stated() -> None:
    rng = np.random.default_rng(0)
    varied = [train_dit.vary(rng, "a red circle") for _ in range(4000)]
    assert varied.count("") / 4000 == pytest.approx(train_dit.DROPPED, abs=0.02)
    spoilt = [caption for caption in varied if caption not in ("", "a red circle")]
    assert len(spoilt) / 4000 == pytest.approx(train_dit.STRANGE * (1 - train_dit.DROPPED), abs=0.02)
    assert all(len(caption.split()) == 4 and set(["a", "red", "circle"]) <= set(caption.split()) for caption in spoilt)
