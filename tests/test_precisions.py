"""The 8-bit precisions from end to end: near the exact one, the same on any number of slots, guarded step by step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import loras
from reference.families import make_family
from torch import Tensor

import wanfast
import wanfast.denoise as denoise
from wanfast.__main__ import main
from wanfast.checkpoint.lookup import Sources
from wanfast.convert import convert_model
from wanfast.dit.packed import PackedBlock
from wanfast.errors import RequestError
from wanfast.model import open_model
from wanfast.residency import Residency
from wanfast.tiny import tiny_folder

SMALL: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 4, "seed": 1}
PRECISIONS = pytest.mark.parametrize("precision", ["fp8", "int8"])


def latents(model: Path, precision: str, **options: Any) -> Tensor:
    pipeline = wanfast.load(model, precision=precision, device="cpu", **options)
    return pipeline.generate("a red ball", output="latents", **SMALL)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_family("t2v", folder).write_official(folder / "model")


@PRECISIONS
def test_a_run_in_8_bits_is_near_one_in_16(precision: str, model: Path) -> None:
    want = latents(model, "exact")
    got = latents(model, precision)
    assert torch.equal(got, latents(model, precision))
    assert 1e-4 < error(got, want) < {"fp8": 0.1, "int8": 0.05}[precision]


@PRECISIONS
def test_converted_weights_compute_what_weights_rounded_at_load_do(precision: str, model: Path, tmp_path: Path) -> None:
    folder = convert_model(open_model(Sources(model=model)), tmp_path / "ready", precision)
    assert error(latents(folder, precision), latents(model, precision)) < {"fp8": 0.04, "int8": 0.01}[precision]


def test_the_same_bits_for_every_number_of_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Residency, "_is_in_place", lambda self, experts: False)
    size = wanfast.load(tiny_folder(), device="cpu", precision="int8").loaded._residency._slot_bytes
    want = latents(tiny_folder(), "int8", vram=8 * size)
    assert size < wanfast.load(tiny_folder(), device="cpu", precision="exact").loaded._residency._slot_bytes
    assert torch.equal(latents(tiny_folder(), "int8", vram=2 * size), want)


class Spoiled:
    """Velocities of 8-bit blocks that are out of range at one step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, value: float, prompt: int = 0) -> None:
        self.calls: list[bool] = []  # whether in 8 bits
        own = denoise.predict_velocities

        def predict(*arguments: Any, **more: Any) -> list[Tensor]:
            blocks = list(arguments[4])
            self.calls.append(isinstance(blocks[0], PackedBlock))
            velocities = [one.contiguous() for one in own(*arguments[:4], blocks, *arguments[5:], **more)]
            if len(self.calls) == step and self.calls[-1]:
                velocities[prompt].view(-1)[5] = value
            return velocities

        monkeypatch.setattr(denoise, "predict_velocities", predict)


@pytest.mark.parametrize(("value", "prompt"), [(float("nan"), 0), (float("inf"), 1), (-1e6, 0), (1e7, 1)])
@PRECISIONS
def test_a_step_out_of_range_is_taken_again_in_16_bits(
    precision: str,
    value: float,
    prompt: int,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    want = latents(model, precision)
    spoiled = Spoiled(monkeypatch, 2, value, prompt)
    got = latents(model, precision)
    assert spoiled.calls == [True, True, False, True, True]
    assert "step 2: 8-bit numbers ran out of range; it is taken again in 16 bits" in caplog.text
    assert error(got, want) < 0.1


def test_a_sound_run_has_no_step_in_16_bits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled = Spoiled(monkeypatch, 99, 0.0)
    latents(model, "int8")
    assert spoiled.calls == [True] * 4


def test_an_exact_run_is_not_repeated(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = denoise.predict_velocities
    calls: list[int] = []

    def predict(*arguments: Any, **more: Any) -> list[Tensor]:
        calls.append(1)
        return [velocity * 1e6 for velocity in own(*arguments, **more)]

    monkeypatch.setattr(denoise, "predict_velocities", predict)
    latents(model, "exact")
    assert len(calls) == 4


def test_names() -> None:
    with pytest.raises(RequestError, match=r"^precision: must be auto, fp32, exact, fp8, int8, got 'fp4'"):
        wanfast.load(tiny_folder(), precision="fp4")  # type: ignore[arg-type]


def test_fp8_is_not_planned_for_a_card_that_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", "t2v-a14b", "--precision", "fp8", "a cat"]
    assert main([*command, "--gpu", "3090"]) == 2
    assert "fp8 needs a GPU of compute capability 8.9 or more, got RTX 3090; try int8" in capsys.readouterr().err
    assert main([*command, "--gpu", "4090"]) == 0


def test_the_plan_of_an_8_bit_model(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", "t2v-a14b", "--gpu", "4090", "--vram", "24GB", "--size", "1280x720", "a cat"]
    assert main([*command, "--precision", "int8"]) == 0
    text = capsys.readouterr().out
    assert "precision int8" in text
    assert "one expert stays, 40 blocks of 0.35 GB (int8)" in text


@PRECISIONS
def test_loras_ride_along_and_are_swapped(precision: str, model: Path, tmp_path: Path) -> None:
    """Against the same LoRA in 16 bits, whose effect is far larger than what 8 bits cost."""
    names = [f"blocks.{index}.self_attn.{name}" for index in range(2) for name in "qkv"]
    shapes = loras.linear_layers(wanfast.load(model, device="cpu").loaded.config.dit)
    factors = loras.random_factors({name: shapes[name] for name in names}, rank=4)
    file = loras.write_lora(tmp_path / "style.safetensors", factors, alpha=16.0)

    def run(which: str, *styles: Path) -> Tensor:
        pipeline = wanfast.load(model, precision=which, device="cpu")
        pipeline.generate("a red ball", output="latents", loras=[file], **SMALL)  # one with it before
        return pipeline.generate("a red ball", output="latents", loras=styles, **SMALL)

    want, plain = run("exact", file), latents(model, "exact")
    got = run(precision, file)
    assert torch.equal(run(precision), latents(model, precision))
    assert error(want, plain) > 5 * error(got, want)
