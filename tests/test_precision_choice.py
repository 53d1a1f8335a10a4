"""What precision `auto` is: the files' own, else exact where it fits, else int8 and never in silence; once for all."""

import json
import logging
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import wanfast
from wanfast import pipeline as door
from wanfast import precision
from wanfast.__main__ import main
from wanfast.batch import Job, generate_batch
from wanfast.budget import make_budget
from wanfast.checkpoint.lookup import Sources
from wanfast.config import T2V_A14B
from wanfast.convert import convert_model
from wanfast.errors import MemoryBudgetError
from wanfast.generation import Inputs, generate_latents
from wanfast.model import open_model
from wanfast.plan import Wish, make_plan
from wanfast.precision import auto_without_files, plan_within, ready_precision, wish_of_auto
from wanfast.request import Request
from wanfast.tiny import tiny_folder
from wanfast.weight_sizes import weight_sizes

GB = 10**9
LINE = ("plan", "a ball", "--model", "t2v-a14b", "--seed", "1", "--gpu", "4090")
SMALL: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 1, "num_inference_steps": 2, "seed": 1}


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plan


def test_exact_where_it_fits_and_beside_it_what_int8_would_take(capsys: pytest.CaptureFixture[str]) -> None:
    line = (*LINE, "--vram", "24GB", "--ram", "64GB")
    plan, asked = told(capsys, *line), told(capsys, *line, "--precision", "int8")
    assert plan["precision"] == "exact" and plan["precision_reason"] is None
    assert plan["instead"] == {"precision": "int8", "memory": asked["memory"], "seconds": asked["seconds"]}
    assert "instead" not in asked
    assert main(list(line)) == 0
    page = capsys.readouterr().out.splitlines()
    (beside,) = (words for words in page if words.startswith("instead"))
    seconds, peak = asked["seconds"]["total"], asked["memory"]["peak"] / GB
    assert f"--precision int8: {seconds:,.1f} s, {peak:.2f} GB at the peak, " in beside
    assert "; computed; " in beside and "`wanfast verify`" in beside
    assert max(map(len, page)) <= 120


def test_int8_where_exact_does_not_fit_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    line = (*LINE, "--vram", "7.4GB", "--ram", "64GB")
    plan = told(capsys, *line)
    assert plan["precision"] == "int8" and plan["memory"]["peak"] <= 7.4 * GB
    assert "exact needs 7.76 GB of the GPU at its peak, 7.40 GB are there" in plan["precision_reason"]
    assert main(list(line)) == 0
    page = capsys.readouterr().out
    assert f"int8: {plan['precision_reason']}\n" in page and "--precision exact refuses instead" in page
    assert max(map(len, page.splitlines())) <= 120
    assert main([*line, "--precision", "exact"]) == 1
    assert "needs 7.76 GB at its peak" in capsys.readouterr().err
    assert main([*LINE, "--vram", "6GB"]) == 1


def test_it_is_int8_for_as_little_memory_as_can_be() -> None:
    """At the byte where exact begins to fit, and at the one where int8 does."""
    wish, device = auto_without_files("cuda"), "cuda"
    plan = make_plan(T2V_A14B, Request("a"), precision="exact", device=device)

    def least(of: Literal["exact", "int8"]) -> int:
        rounded = precision.in_precision(T2V_A14B, plan, of)
        return make_budget(T2V_A14B, rounded, weight_sizes(T2V_A14B, of, "fp32"), vram=1).peak.total

    def chosen(vram: int) -> str:
        sizes = lambda one: weight_sizes(T2V_A14B, one.precision, "fp32")  # noqa: E731
        return plan_within(T2V_A14B, plan, wish, sizes, vram=vram, ram=None)[0].precision

    exact, int8 = least("exact"), least("int8")
    assert int8 < exact
    assert [chosen(vram) for vram in (exact, exact - 1, int8)] == ["exact", "int8", "int8"]
    with pytest.raises(MemoryBudgetError, match=r"^vram: .* at its peak"):
        chosen(int8 - 1)


def test_a_cpu_never_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    line = (*LINE[:-2], "--device", "cpu")
    assert told(capsys, *line)["precision"] == "fp32"
    assert main([*line, "--ram", "8GB"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("wanfast plan: ram: ") and "int8" not in captured.err
    assert not auto_without_files("cpu").may_round and auto_without_files("cuda").may_round


def test_channels_that_no_kernel_multiplies_stay_exact() -> None:
    from dataclasses import replace

    narrow = replace(T2V_A14B, dit=replace(T2V_A14B.dit, ffn_dim=T2V_A14B.dit.ffn_dim + 8))
    plan = make_plan(narrow, Request("a"), precision="exact", device="cuda")
    sizes = lambda one: weight_sizes(narrow, one.precision, "fp32")  # noqa: E731
    with pytest.raises(MemoryBudgetError):
        plan_within(narrow, plan, auto_without_files("cuda"), sizes, vram=int(7.4 * GB), ram=None)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """wan-tiny, converted for each precision."""
    folder, model = tmp_path_factory.mktemp("ready"), open_model(tiny_folder())
    return {name: convert_model(model, folder / name, name) for name in ("exact", "fp8", "int8")}


def test_files_that_are_ready_say_what_they_are_ready_in(ready: dict[str, Path]) -> None:
    found = {name: ready_precision(open_model(folder)) for name, folder in ready.items()}
    assert found == {"exact": None, "fp8": "fp8", "int8": "int8"}
    assert ready_precision(open_model(tiny_folder())) is None
    named = {"vae": tiny_folder() / "Wan2.1_VAE.pth", "text_encoder": ready["int8"] / "text_encoder.safetensors"}
    if not named["vae"].exists():
        named["vae"] = ready["int8"] / "vae.safetensors"
    files = Sources(
        high=ready["int8"] / "high_noise.safetensors",
        low=ready["int8"] / "low_noise.safetensors",
        tokenizer=ready["int8"] / "tokenizer.json",
        **named,
    )
    assert ready_precision(open_model(files)) == "int8"  # by their tensors alone


@pytest.mark.parametrize(
    ("name", "device", "has_e4m3", "want"),
    [
        ("int8", "cpu", True, "int8"),
        ("int8", "cuda", False, "int8"),
        ("fp8", "cuda", True, "fp8"),
        ("fp8", "cuda", False, "exact"),
        ("exact", "cuda", True, "exact"),
        ("exact", "cpu", True, "fp32"),
    ],
)
def test_auto_is_what_files_are_ready_in(
    name: str, device: str, has_e4m3: bool, want: str, ready: dict[str, Path]
) -> None:
    wish = wish_of_auto(open_model(ready[name]), device, has_e4m3=has_e4m3)
    assert wish.precision == want
    assert (wish.reason is not None) == (want in ("int8", "fp8"))
    assert wish.may_round == (want == "exact")


def test_auto_leaves_8_bits_to_gpus_that_have_them(ready: dict[str, Path]) -> None:
    for name in ("int8", "exact"):
        wish = wish_of_auto(open_model(ready[name]), "cuda", has_e4m3=True, has_8_bit=False)
        assert (wish.precision, wish.may_round, wish.reason) == ("exact", False, None)


def test_ready_files_compute_as_asked_for_and_say_so(
    ready: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    auto, asked = (wanfast.load(ready["int8"], device="cpu", precision=name) for name in ("auto", "int8"))  # type: ignore[arg-type]
    assert torch.equal(auto.generate("a", output="latents", **SMALL), asked.generate("a", output="latents", **SMALL))  # type: ignore[arg-type]
    size = ("--size", "32x32", "--num-frames", "1", "--seed", "1")
    words = ("--model", str(ready["int8"]), *size, "--device", "cpu")
    assert main(["generate", "a", *words, "--num-inference-steps", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["settings"]["precision"] == "int8"
    assert "precision int8: the files are ready in it; --precision fp32 expands them" in captured.err
    assert told(capsys, "plan", "a", *words)["precision"] == "int8"
    assert told(capsys, "plan", "a", *words[:-2], "--gpu", "3090")["precision"] == "int8"
    assert told(capsys, "plan", "a", "--model", str(ready["exact"]), *size, "--gpu", "3090")["precision"] == "exact"
    assert told(capsys, "plan", "a", *words, "--precision", "fp32")["precision"] == "fp32"


@pytest.fixture
def small_for_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card on which one frame fits in exact and five do not; a CPU stands in for it, for which nothing is rounded."""
    own = precision.make_budget

    def budget(config: Any, plan: Any, sizes: Any, *, vram: int | None, ram: int | None) -> Any:
        is_large = plan.precision == "exact" and plan.num_frames > 1
        return own(config, plan, sizes, vram=vram, ram=2_100_000_000 if is_large else ram)

    monkeypatch.setattr(precision, "make_budget", budget)
    monkeypatch.setattr(door, "wish_of_auto", lambda *_, **__: Wish("exact", may_round=True))


def latents(pipeline: wanfast.Pipeline, num_frames: int, prompt: str = "a red ball") -> Tensor:
    made = pipeline.generate(prompt, output="latents", **SMALL | {"num_frames": num_frames})
    assert isinstance(made, Tensor)
    return made


@pytest.mark.usefixtures("small_for_exact")
def test_each_generation_has_its_own_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    auto = wanfast.load(device="cpu")
    exact, int8 = (wanfast.load(device="cpu", precision=name) for name in ("exact", "int8"))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        one, five, again = (latents(auto, frames) for frames in (1, 5, 1))
    assert torch.equal(five, latents(int8, 5)) and not torch.equal(five, latents(exact, 5))
    assert torch.equal(one, latents(exact, 1)) and torch.equal(again, one)
    (record,) = (record.getMessage() for record in caplog.records if "precision" in record.getMessage())
    assert record.startswith("precision int8: exact needs ") and "--precision exact refuses instead" in record


@pytest.mark.usefixtures("small_for_exact")
def test_plan_and_generate_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for frames, want in (("1", "exact"), ("5", "int8")):
        line = ("a", "--device", "cpu", "--size", "32x32", "--num-frames", frames, "--num-inference-steps", "1")
        planned = told(capsys, "plan", *line)
        assert main(["generate", *line, "--seed", "1", "--json", "-o", f"{want}.mp4"]) == 0
        captured = capsys.readouterr()
        assert planned["precision"] == json.loads(captured.out)["settings"]["precision"] == want
        assert (f"precision {want}: {planned['precision_reason']}" in captured.err) == (want == "int8")


@pytest.mark.usefixtures("small_for_exact")
def test_a_batch_keeps_every_clip_in_its_own() -> None:
    auto = wanfast.load(device="cpu")
    plans = [auto.plan(Request("a", **SMALL | {"num_frames": frames})) for frames in (1, 5, 5, 1)]
    assert [plan.precision for plan in plans] == ["exact", "int8", "int8", "exact"]
    alone = [generate_latents(auto.loaded, plan, Inputs()) for plan in plans]
    seen: list[str] = []
    ends: list[Tensor] = []

    def keep(state: Any) -> None:
        if state.next_step == SMALL["num_inference_steps"]:
            ends.append(state.latents[0].clone())
            seen.append(auto.loaded.precision)

    for made in generate_batch(auto.loaded, [Job(plan=plan, inputs=Inputs(), on_state=keep) for plan in plans]):
        assert made.error is None and made.frames is not None
        assert sum(map(len, made.frames)) == plans[made.index].num_frames
    assert seen == ["exact", "int8", "int8", "exact"]
    assert all(torch.equal(one, other) for one, other in zip(alone, ends, strict=True))
