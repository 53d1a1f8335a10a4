"""LoRA and presets on the command line: what is said, what is recorded, and that a rerun repeats or refuses."""

import json
from pathlib import Path

import pytest
import torch
from reference import loras
from reference.families import make_family
from safetensors.torch import save_file

import wanfast
from wanfast.__main__ import main
from wanfast.config import MODELS
from wanfast.plan import make_plan
from wanfast.presets import PRESETS, apply_preset, preset_note
from wanfast.request import Request
from wanfast.video import read_settings, read_video

SMALL = ["--size", "32x32", "--num-frames", "5", "--steps", "3", "--seed", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t2v")
    return make_family("t2v", folder).write_official(folder / "model")


@pytest.fixture(autouse=True)
def style(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA file in an otherwise empty working folder."""
    monkeypatch.chdir(tmp_path)
    layers = loras.linear_layers(wanfast.load(model).loaded.config.dit)
    return loras.write_lora(tmp_path / "style.safetensors", loras.random_factors(layers), alpha=2.0)


def run(*words: object) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


def frames(path: str) -> torch.Tensor:
    return torch.as_tensor(read_video(path))


def test_generate_says_and_records_its_loras_and_rerun_repeats(
    model: Path, style: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["generate", "a ball", "--model", model, *SMALL]
    assert run(*line, "-o", "plain.mp4") == 0
    capsys.readouterr()
    assert run(*line, "--lora", "style.safetensors:0.5@high", "--lora", "style.safetensors", "-o", "a.mp4") == 0
    said = capsys.readouterr().err
    assert "LoRA style.safetensors: strength 0.5, high_noise, 60 tensors\n" in said
    assert "LoRA style.safetensors: strength 1, high_noise and low_noise, 60 tensors\n" in said
    assert not torch.equal(frames("a.mp4"), frames("plain.mp4"))
    recorded = read_settings("a.mp4")["loras"]
    assert [(entry["path"], entry["strength"], entry["target"]) for entry in recorded] == [
        (str(style), 0.5, "high_noise"),
        (str(style), 1.0, "both"),
    ]
    assert read_settings("plain.mp4")["loras"] == []
    assert run("rerun", "a.mp4", "-o", "b.mp4") == 0
    assert torch.equal(frames("a.mp4"), frames("b.mp4"))
    assert read_settings("b.mp4")["loras"] == recorded


def test_python_gives_what_the_command_gives(model: Path, style: Path) -> None:
    assert run("generate", "a ball", "--model", model, *SMALL, "--lora", f"{style}:0.5@low", "-o", "a.mp4") == 0
    pipeline = wanfast.load(model)
    video = pipeline.generate(
        "a ball",
        width=32,
        height=32,
        num_frames=5,
        num_inference_steps=3,
        seed=1,
        loras=[wanfast.LoraSpec(style, 0.5, "low_noise")],
    )
    assert video.settings["loras"] == read_settings("a.mp4")["loras"]
    video.save("b.mp4")
    assert torch.equal(frames("a.mp4"), frames("b.mp4"))


def test_rerun_finds_a_moved_file_by_its_contents_and_refuses_another(
    model: Path, style: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", "a ball", "--model", model, *SMALL, "--lora", style, "-o", "a.mp4") == 0
    moved = style.rename("moved_high.safetensors").absolute()  # its new name must not turn it to one expert
    capsys.readouterr()
    assert run("rerun", "a.mp4", "-o", "b.mp4") == 2
    assert "lora: must be the file the clip was made with" in capsys.readouterr().err
    assert run("rerun", "a.mp4", "--lora", moved, "-o", "b.mp4") == 0
    assert torch.equal(frames("a.mp4"), frames("b.mp4"))
    save_file({"diffusion_model.head.head.diff_b": torch.zeros(64)}, style)
    assert run("rerun", "a.mp4", "-o", "c.mp4") == 2
    assert not Path("c.mp4").exists()


def test_mistakes_are_one_line_and_leave_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"unrelated": torch.zeros(1)}, "other.safetensors")
    Path("broken.safetensors").write_bytes(b"\xff" * 64)
    before = {path.name for path in Path().iterdir()}
    for lora, code, said in [
        ("missing.safetensors", 2, "lora: must be FILE[:strength]"),
        ("style.safetensors@hgih", 2, "lora: must be FILE[:strength]"),
        ("other.safetensors", 1, "other.safetensors: no tensor fits"),
        ("broken.safetensors", 1, "broken.safetensors: not a safetensors file"),
    ]:
        for command in ("generate", "plan"):
            assert run(command, "a ball", "--model", model, *SMALL, "--lora", lora) == code
            out, err = capsys.readouterr()
            assert (out, err.count("\n")) == ("", 1)
            assert said in err
    assert run("generate", "a ball", "--model", "no-such-folder", "--lora", "missing.safetensors") == 2
    assert "lora: " in capsys.readouterr().err, "before any model is looked for"
    assert run("generate", "a ball", "--model", model, "--preset", "quick") == 2
    assert "preset: must be one of lightning4, got 'quick'" in capsys.readouterr().err
    assert {path.name for path in Path().iterdir()} == before


@pytest.mark.parametrize("name", ["t2v-A14B", "i2v-A14B"])
def test_lightning4_is_two_steps_of_each_expert_and_one_forward_each(name: str) -> None:
    """The sigmas of the published 4-step list [1000, 750, 500, 250] under shift 5."""
    size = (640, 640) if name.startswith("i2v") else None
    request = Request("a ball", seed=0, image_size=size)
    plan = make_plan(MODELS[name], apply_preset(request, "lightning4"), precision="exact")
    assert plan.steps_per_expert == {"high_noise": 2, "low_noise": 2}
    assert plan.num_forwards == 4
    assert plan.solver == "euler"
    want = [5 * t / (1000 + 4 * t) for t in (1000, 750, 500, 250)]
    assert [step.sigma for step in plan.steps] == pytest.approx(want, abs=2e-3)
    assert plan.steps[-1].sigma_next == 0


def test_a_preset_fills_in_and_does_not_override() -> None:
    stated = Request("a ball", num_inference_steps=8, guidance_high=2.0, shift=3.0, solver="unipc")
    filled = apply_preset(stated, "lightning4")
    assert (filled.num_inference_steps, filled.shift, filled.solver) == (8, 3.0, "unipc")
    assert (filled.guidance, filled.guidance_high, filled.guidance_low) == (None, 2.0, 1.0)
    assert apply_preset(stated, None) == stated
    for preset in PRESETS.values():
        assert preset.guidance == 1


@pytest.mark.parametrize(
    ("name", "is_distilled"),
    [
        ("Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/high_noise_model.safetensors", True),
        ("wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022.safetensors", True),
        ("loras/Lightning_high.safetensors", True),
        ("loras/style.safetensors", False),
        ("loras/style_14steps.safetensors", False),
        ("high_noise_model/diffusion_pytorch_model.safetensors", False),
    ],
)
def test_a_name_that_speaks_of_few_steps_is_answered(name: str, is_distilled: bool) -> None:
    usual = make_plan(MODELS["t2v-A14B"], Request("a ball", seed=0), precision="exact")
    note = preset_note(usual, ["plain.safetensors", name])
    assert (note is not None) == is_distilled
    if note is not None:
        assert name in note
        assert "lightning4" in note
    few = make_plan(MODELS["t2v-A14B"], apply_preset(Request("a ball", seed=0), "lightning4"), precision="exact")
    note = preset_note(few, ["plain.safetensors", name])
    assert note is None if is_distilled else note is not None and "4 steps without guidance are for weights" in note


def test_the_command_line_warns_of_a_preset_not_used(
    model: Path, style: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    style.rename("style_4steps_lora.safetensors")
    line = ["plan", "a ball", "--model", model, *SMALL, "--lora", "style_4steps_lora.safetensors"]
    assert run(*line) == 0
    assert "preset lightning4" in capsys.readouterr().err
    assert run(*line, "--preset", "lightning4", "--json") == 0
    out, err = capsys.readouterr()
    assert "lightning4" not in err
    assert json.loads(out)["solver"] == "euler"
