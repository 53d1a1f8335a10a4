"""The official code as a reference, played by a stand-in checkout that writes down how it is called."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.tiny import random_tiny

from wanfast.__main__ import main
from wanfast.bench import official_engine
from wanfast.bench.case import Case, Tier, plan_of
from wanfast.bench.engine import measured_run
from wanfast.bench.official_engine import OfficialEngine, check_checkout, given_noise, missing_here
from wanfast.bench.settle import drawn_picture
from wanfast.checkpoint.lookup import Sources
from wanfast.config import I2V_A14B, T2V_A14B, TI2V_5B, ModelConfig
from wanfast.errors import RequestError
from wanfast.generation import draw_noise
from wanfast.request import Request

CPU = torch.device("cpu")

# The official classes as far as the benchmark meets them: arguments, and how the noise is drawn and the video shaped.
STAND_IN = """
import json
from pathlib import Path
import torch

CALLS = Path(__file__).parents[1] / "calls.json"

class _Model:
    strides = (4, 8, 8)

    def __init__(self, config, checkpoint_dir, device_id=0, rank=0, t5_fsdp=False, dit_fsdp=False, use_sp=False,
                 t5_cpu=False, init_on_cpu=True, convert_model_dtype=False):
        self.made = dict(kind=type(self).__name__, config=config, checkpoint_dir=checkpoint_dir, device_id=device_id,
                         convert_model_dtype=convert_model_dtype)

    def _video(self, prompt, size, frame_num, channels, told, draws=1):
        frames, height, width = self.strides
        shape = (channels, (frame_num - 1) // frames + 1, size[1] // height, size[0] // width)
        torch.randn(3, 3)
        generator = torch.Generator()
        for _ in range(draws):
            noise = torch.randn(*shape, dtype=torch.float32, generator=generator, device=torch.device("cpu"))
        told = {key: value for key, value in told.items() if key not in ("self", "img")}
        CALLS.write_text(json.dumps(dict(made=self.made, prompt=prompt, told=told, noise=float(noise.sum()))))
        return noise.mean().expand(3, frame_num, size[1], size[0]) / 10

class WanT2V(_Model):
    def generate(self, input_prompt, size=(1280, 720), frame_num=81, shift=5.0, sample_solver="unipc",
                 sampling_steps=50, guide_scale=5.0, n_prompt="", seed=-1, offload_model=True):
        return self._video(input_prompt, size, frame_num, 16, dict(locals()), DRAWS)

class WanI2V(_Model):
    def generate(self, input_prompt, img, max_area=720 * 1280, frame_num=81, shift=5.0, sample_solver="unipc",
                 sampling_steps=40, guide_scale=5.0, n_prompt="", seed=-1, offload_model=True):
        assert max_area == img.size[0] * img.size[1]
        return self._video(input_prompt, img.size, frame_num, 16, dict(locals()))

class WanTI2V(_Model):
    strides = (4, 16, 16)
    def generate(self, input_prompt, img=None, size=(1280, 704), max_area=704 * 1280, frame_num=81, shift=5.0,
                 sample_solver="unipc", sampling_steps=50, guide_scale=5.0, n_prompt="", seed=-1, offload_model=True):
        return self._video(input_prompt, size, frame_num, 48, dict(locals()))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    yield write_checkout(tmp_path / "Wan2.2")
    for name in [name for name in sys.modules if name.split(".")[0] == "wan"]:
        del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if not entry.startswith(str(tmp_path))]


def write_checkout(folder: Path, draws: int = 1) -> Path:
    (folder / "wan" / "configs").mkdir(parents=True)
    (folder / "generate.py").write_text("")
    (folder / "wan" / "__init__.py").write_text(STAND_IN.replace("DRAWS", str(draws)))
    configs = 'WAN_CONFIGS = {"t2v-A14B": "its t2v", "i2v-A14B": "its i2v", "ti2v-5B": "its ti2v"}\n'
    (folder / "wan" / "configs" / "__init__.py").write_text(configs)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "Wan2.1_VAE.pth").touch()
    return folder


def make_case(config: ModelConfig, checkpoint: Path, **asked: Any) -> Case:
    takes_picture = config.task == "i2v"
    request = Request(
        "a ball",
        negative_prompt="blurry",
        image_size=(64, 32) if takes_picture else None,
        width=64,
        height=32,
        num_frames=5,
        num_inference_steps=6,
        seed=3,
    )
    return Case(
        weights="checkpoint",
        sources=Sources(model=checkpoint),
        config=config,
        request=replace(request, **asked),
        picture=drawn_picture(64, 32) if takes_picture else None,
        tiers=(Tier("exact", "exact"),),
        reference_precision="bf16",
        placement="model",
        device="cpu",
        vram=None,
        ram=None,
        runs=1,
        warmup=0,
        threads=1,
    )


@pytest.mark.parametrize("config", [T2V_A14B, I2V_A14B, TI2V_5B], ids=lambda config: config.task)
def test_its_classes_are_called_as_generate_py_calls_them(
    config: ModelConfig, checkout: Path, checkpoint: Path, tmp_path: Path
) -> None:
    case = make_case(config, checkpoint)
    engine = OfficialEngine(case, checkout)
    engine.load()
    noise = draw_noise(plan_of(case))[0]
    run = measured_run(engine, CPU, noise, torch.zeros(2, 3, 4), tmp_path / "clip.mp4", keeps_frames=True)
    calls = json.loads((checkout / "calls.json").read_text())
    kind = {"t2v": "WanT2V", "i2v": "WanI2V", "ti2v": "WanTI2V"}[config.task]
    assert calls["made"] == {
        **{"kind": kind, "config": f"its {config.task}", "checkpoint_dir": str(checkpoint), "device_id": 0},
        "convert_model_dtype": True,
    }
    told = calls["told"]
    assert (told["input_prompt"], told["n_prompt"], told["seed"]) == ("a ball", "blurry", 3)
    assert (told["frame_num"], told["sampling_steps"], told["shift"]) == (5, 6, config.shift)
    assert (told["sample_solver"], told["offload_model"]) == ("unipc", True)
    guidance = {"t2v": [3.0, 4.0], "i2v": [3.5, 3.5], "ti2v": 5.0}[config.task]  # the low-noise expert's first
    assert told["guide_scale"] == guidance
    assert told.get("size", [64, 32]) == [64, 32] and told.get("max_area", 64 * 32) == 64 * 32
    assert calls["noise"] == pytest.approx(float(noise.sum()))  # ours, not its own
    assert run.frames is not None and run.frames.shape == (5, 32, 64, 3)
    assert int(run.frames[0, 0, 0, 0]) == int((noise.mean() / 10 + 1) / 2 * 255)
    assert run.seconds.keys() == {"generate", "decode", "write", "total"} and run.steps == ()


def test_noise_that_is_drawn_otherwise_is_refused(tmp_path: Path, checkpoint: Path, checkout: Path) -> None:
    wrong = write_checkout(tmp_path / "other", draws=2)
    case = make_case(T2V_A14B, checkpoint)
    engine = OfficialEngine(case, wrong)
    engine.load()
    with pytest.raises(RequestError, match=r"must draw the noise .* once with torch.randn, did 2 times"):
        measured_run(engine, CPU, draw_noise(plan_of(case))[0], None, tmp_path / "clip.mp4", keeps_frames=False)


def test_torch_is_its_own_again_afterwards() -> None:
    own, noise = torch.randn, torch.randn(2, 3)
    with given_noise(noise):
        assert torch.equal(torch.randn((2, 3)), noise)
        assert torch.randn(4, generator=torch.Generator().manual_seed(0)).shape == (4,)
    assert torch.randn is own
    with pytest.raises(KeyError), given_noise(noise):
        raise KeyError
    assert torch.randn is own


def test_what_the_official_code_cannot_run_is_refused_by_name(
    checkout: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(official_engine, "missing_here", lambda: [])
    case = make_case(T2V_A14B, checkpoint)
    check_checkout(checkout, case)
    with pytest.raises(RequestError, match=r"reference: must be a checkout of Wan-Video/Wan2\.2"):
        check_checkout(tmp_path, case)
    (tmp_path / "empty").mkdir()
    for other in (
        replace(case, weights="wan-tiny", sources=Sources()),
        replace(case, sources=Sources(model=tmp_path / "empty")),
        replace(case, sources=Sources(model=checkpoint, vae="vae.safetensors")),
    ):
        with pytest.raises(RequestError, match="reference: the official code reads a checkpoint folder as published"):
            check_checkout(checkout, other)
    with pytest.raises(RequestError, match="has the solvers unipc and dpm"):
        check_checkout(checkout, make_case(T2V_A14B, checkpoint, solver="euler"))
    monkeypatch.setattr(official_engine, "missing_here", lambda: ["a CUDA device", "the flash_attn package"])
    with pytest.raises(RequestError, match="needs a CUDA device and the flash_attn package; leave --reference out"):
        check_checkout(checkout, case)


def test_what_is_missing_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(official_engine.importlib.util, "find_spec", lambda name: None)
    assert [item.split()[1] for item in missing_here()] == ["CUDA", "flash_attn"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = object()
    monkeypatch.setattr(
        official_engine.importlib.util, "find_spec", lambda name: found if name == "flash_attn_interface" else None
    )
    assert missing_here() == []


def test_the_command_refuses_it_before_anything_is_loaded(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_tiny(tmp_path / "wan-tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = ["bench", "--model", str(model), "--device", "cpu", "--reference", str(checkout), "-o", "out"]
    assert main(line) == 2
    err = capsys.readouterr().err
    assert "reference: the official code needs a CUDA device" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists() and not (checkout / "calls.json").exists()
