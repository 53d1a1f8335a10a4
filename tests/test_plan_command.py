"""`wanfast plan`: memory and seconds for any machine by name, refusals with a way out, and the same for files."""

import json
import re
from pathlib import Path

import pytest
from reference import loras

import wanfast
from wanfast.__main__ import main
from wanfast.config import T2V_A14B
from wanfast.forecast import make_forecast
from wanfast.machines import GPUS
from wanfast.plan import make_plan
from wanfast.request import Request
from wanfast.weight_sizes import parse_stored, weight_sizes


def _run(*words: object) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as stopped:
        return int(stopped.code or 0)


LINE = ("plan", "a ball", "--model", "t2v-a14b", "--seed", 1)


def test_a_card_by_name_answers_what_it_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(*LINE, "--vram", "24GB", "--ram", "64GB", "--gpu", "4090") == 0
    shown = capsys.readouterr().out
    for line in (
        "slots for 40 blocks",
        "an expert does not fit beside the rest: its blocks of 0.70 GB (bf16) stream through",
        "of 24.00 GB at the peak, which is steps (high_noise, low_noise); computed",
        "of 64.00 GB",
        "computed, at the peak rates of the card: a bound from below",
        "78.98 per step, 40 steps",
    ):
        assert line in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_8_bit_files_keep_an_expert_on_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(*LINE, "--gpu", "4090", "--stored", "fp8", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    memory, seconds = plan["memory"], plan["seconds"]
    assert memory["expert_is_resident"] is True
    assert memory["peak"] == max(stage["total"] for stage in memory["stages"].values()) <= memory["limit"]
    assert memory["stages"][memory["peak_stage"]]["total"] == memory["peak"]
    assert memory["source"] == seconds["source"] == "computed"
    assert seconds["total"] == pytest.approx(sum(seconds["stages"].values()))
    assert plan["num_tokens"] == 75_600


def test_what_does_not_fit_is_refused_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(*LINE, "--gpu", "4090", "--vram", "6GB") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("wanfast plan: vram: 1280x720 with 81 frames needs ")
    offered = captured.err.rstrip().rpartition("; ")[2].split(" ")
    size, frames = offered[0], offered[2]
    assert _run(*LINE, "--gpu", "4090", "--vram", "6GB", "--size", size, "--num-frames", frames) == 0


def test_without_card_or_limit_the_need_is_shown_and_no_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(*LINE, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["memory"]["limit"] is None
    assert "seconds" not in plan


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpu", "voodoo"), "gpu: must be one of 3090, "),
        (("--ram", "lots"), "ram: must be an amount of memory, got 'lots'"),
        (("--stored", "fp4"), "stored: must be one of fp32, bf16, fp8, "),
        (("--gpu", ""), "gpu: must not be empty"),
    ],
)
def test_bad_machines_are_refused_by_name(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(*LINE, *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        (["--device", "cpu", "--gpu", "4090"], 2, "gpu: must be left out for device cpu, got RTX 4090"),
        (["--gpu", "4090", "--vram", "80GB"], 2, "vram: must be at most the 25.77 GB of a RTX 4090, got 80.00 GB"),
        (["--gpu", "4090", "--ram", "1GB"], 1, "ram: must be at least the 2.15 GB left to the system, got 1.00 GB"),
    ],
    ids=str,
)
def test_machines_that_cannot_be_are_refused(
    more: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(*LINE, "--stored", "int8", *more) == code
    assert told in capsys.readouterr().err


def test_a_free_card_may_offer_more_than_its_datasheet() -> None:
    """What is free is counted with the driver's share, which the datasheet's memory is less than."""
    gpu, config = GPUS["4090"], T2V_A14B
    plan = make_plan(config, Request("a"), precision="exact", device="cuda")
    sizes = weight_sizes(config, "exact", parse_stored("int8"))
    assert make_forecast(config, plan, sizes, gpu=gpu, vram=gpu.memory + 500_000_000, ram=10**11).budget.fits


def test_files_are_planned_for_this_machine_or_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("plan", "a ball", "--json", "--device", "cpu") == 0
    here = json.loads(capsys.readouterr().out)
    assert here["device"] == "cpu"
    assert 0 < here["memory"]["peak"] < here["memory"]["limit"]
    assert _run("plan", "a ball", "--json", "--gpu", "4090") == 0
    there = json.loads(capsys.readouterr().out)
    assert there["device"] == "cuda"
    assert there["seconds"]["total"] > 0
    assert _run("plan", "a ball", "--stored", "fp8") == 2
    assert "stored: must not be given for files" in capsys.readouterr().err


def test_without_a_model_the_first_lines_say_which_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("plan", "a ball", "--device", "cpu") == 0
    first, second, blank, *page = capsys.readouterr().out.splitlines()
    assert first.startswith("wan-tiny") and "no --model" in first and "wanfast plan --model t2v-a14b" in second
    assert blank == "" and page[0].startswith("model ") and max(map(len, (first, second))) <= 120
    assert _run(*LINE) == 0
    assert "wan-tiny" not in capsys.readouterr().out


def test_loras_are_counted_with_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = loras.linear_layers(wanfast.load().loaded.config.dit)
    factors = loras.random_factors(layers)
    style = loras.write_lora(tmp_path / "style.safetensors", factors)
    assert _run("plan", "a ball", "--json", "--device", "cpu", "--precision", "fp32", "--lora", style, "--quiet") == 0
    stages = json.loads(capsys.readouterr().out)["memory"]["stages"]
    (steps,) = (stage for name, stage in stages.items() if name.startswith("steps"))
    numbers = sum(tensor.numel() for pair in factors.values() for tensor in pair)
    assert steps["LoRAs"] == 4 * numbers


def test_generate_refuses_before_it_loads(capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run("generate", "a ball", "--device", "cpu", "--ram", "1MB") == 1
    message = capsys.readouterr().err
    assert "wanfast generate: ram: " in message
    assert "needs" in message
    assert list(tmp_path.iterdir()) == []


def test_strips_are_shown_with_what_they_save_and_what_they_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """Of few frames, whose steps take less than decoding them."""
    line = (*LINE, "--stored", "fp8", "--size", "720p", "--num-frames", "5", "--gpu", "4090")
    assert _run(*line, "--vram", "5GB") == 0
    shown = capsys.readouterr().out
    assert re.search(r"decode: in \d strips without a seam; whole pictures need [\d.]+ GB", shown)
    assert f"{'pixels of strips':<38}{'0.01 GB':>10}" in shown
    assert _run(*line) == 0
    assert "strips" not in capsys.readouterr().out
    seconds = {}
    for vram in ("24GB", "5GB"):
        assert _run(*line, "--vram", vram, "--json") == 0
        plan = json.loads(capsys.readouterr().out)
        seconds[plan["memory"]["tiles"]["decode"]] = plan["seconds"]["stages"]["decode"]
    few, many = seconds
    assert few == 1 < many
    assert 1.05 < seconds[many] / seconds[few] < 2
