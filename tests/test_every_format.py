"""One model in every form: the same video, to the bit where nothing is lost, else as near as the form's steps allow."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from reference.formats import (
    LOSSLESS,
    QUANTISED,
    STEPS,
    Format,
    KindOf,
    Original,
    in_blocks,
    in_matrices,
    in_wide,
    make_original,
    write_files,
    write_official,
)
from reference.gguf_files import quantise, unpack
from reference.quantised import lightx2v
from torch import Tensor

import wanfast
from wanfast.checkpoint.bind import read_tensor
from wanfast.checkpoint.reader import Reader, memory_reader
from wanfast.errors import CheckpointError
from wanfast.loaded import LoadedModel

SMALL = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 3, "seed": 1}
PICTURE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
NUDGE = 0.01  # share of its size by which a weight is moved to see how much the video answers

State = Mapping[str, Tensor]
Run = tuple[Tensor, Tensor]  # latents, frames


@pytest.fixture(scope="module")
def original() -> Original:
    return make_original()


@pytest.fixture(scope="module")
def truth(original: Original, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """What the official bf16 checkpoint gives, by precision."""
    model = write_official(original, tmp_path_factory.mktemp("official"), torch.bfloat16)
    runs = {precision: run(wanfast.load(**model, precision=precision, device="cpu")) for precision in ("exact", "fp32")}
    assert all(run[0].std() > 0.1 and run[1].float().std() > 10 for run in runs.values()), (
        "a video with something in it"
    )
    return lambda precision: runs[precision]


def run(pipeline: wanfast.Pipeline, **more: Any) -> Run:
    steps: list[Tensor] = []
    video = pipeline.generate("a red ball", on_step=lambda _, latents: steps.append(latents), **SMALL, **more)
    return steps[-1], video.frames


def distance(got: Run, want: Run) -> tuple[float, float]:
    """Root mean squares: of the latents as a share of their own, of the frames in levels of 8 bits."""
    latents = (got[0] - want[0]).square().mean().sqrt() / want[0].square().mean().sqrt()
    return float(latents), float((got[1].float() - want[1].float()).square().mean().sqrt())


def check_numbers(reader: Reader, state: State, kind_of: KindOf) -> None:
    """Hold each tensor to the original: equal where its kind loses nothing, else off by what its steps come to."""
    assert reader.names() == state.keys()
    for name, want in state.items():
        got = read_tensor(reader, name, want.shape, dtype=torch.float32)
        step = STEPS[kind_of(name, want)]
        if step == 0:
            assert torch.equal(got, want), name
            continue
        error, sizes = (got - want).flatten(1), want.flatten(1).square().mean(1, keepdim=True).sqrt()
        share = float(error.square().mean().sqrt() / want.square().mean().sqrt())
        assert 0.6 * step < share < 1.25 * step, f"{name}: off by {share:.4f} of its size, {step:.4f} expected"
        # One wrong number hides in the mean of a matrix. The outermost of a row, at 4.5 sigma, is off by half a step.
        assert (error.abs() < 16 * step * sizes).all(), name


def check_model(pipeline: wanfast.Pipeline, original: Original, form: Format) -> None:
    model = pipeline.loaded.model
    for name, reader in model.experts.items():
        check_numbers(reader, original.experts[name], form.kind_of)
    check_numbers(model.text, original.text, form.text_kind_of)
    check_numbers(model.vae, original.vae, lambda name, tensor: "")


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_form_that_loses_nothing_gives_the_same_video_to_the_bit(
    name: str, original: Original, truth: Callable[[str], Run], tmp_path: Path
) -> None:
    pipeline = wanfast.load(**LOSSLESS[name].write(original, tmp_path), precision="exact", device="cpu")
    check_model(pipeline, original, LOSSLESS[name])
    for got, want in zip(run(pipeline), truth("exact"), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("task", ["i2v", "ti2v"])
def test_the_other_families(task: str, tmp_path: Path) -> None:
    model, runs = make_original(task), []
    forms = LOSSLESS | QUANTISED
    for name in ("official bf16", "ComfyUI bf16", "GGUF BF16", "ComfyUI fp8_scaled", "LightX2V int8", "GGUF Q4_K_M"):
        (tmp_path / name).mkdir()
        pipeline = wanfast.load(**forms[name].write(model, tmp_path / name), precision="exact", device="cpu")
        assert pipeline.loaded.config.task == task
        check_model(pipeline, model, forms[name])
        if name in LOSSLESS:
            runs.append(run(pipeline, image=PICTURE))
    for got in runs[1:]:
        assert torch.equal(got[0], runs[0][0]) and torch.equal(got[1], runs[0][1])


@pytest.fixture(scope="module")
def answers(
    original: Original, truth: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """By which share latents, and by how much frames, move per share by which weights of a place are moved."""
    model = write_official(original, tmp_path_factory.mktemp("nudged"), torch.float32)
    loaded = wanfast.load(**model, device="cpu").loaded.model
    answers = {}
    places = {"blocks": in_blocks("x"), "matrices": in_matrices("x"), "wide": in_wide("x"), "text": in_matrices("x")}
    for place, is_moved in places.items():
        if place == "text":
            changed = replace(loaded, text=memory_reader(nudged(original.text, is_moved)))
        else:
            experts = {key: memory_reader(nudged(state, is_moved)) for key, state in original.experts.items()}
            changed = replace(loaded, experts=experts)
        moved = run(wanfast.Pipeline(LoadedModel(changed, precision="fp32", device=torch.device("cpu"))))
        answers[place] = tuple(part / NUDGE for part in distance(moved, truth("fp32")))
    return answers


def nudged(state: State, is_moved: KindOf) -> dict[str, Tensor]:
    """Add noise to tensors, a share of each row's size."""
    draw = torch.Generator().manual_seed(5)

    def noise(tensor: Tensor) -> Tensor:
        size = tensor.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (tensor.dim() - 1))
        return NUDGE * size * torch.randn(tensor.shape, generator=draw)

    return {name: tensor + noise(tensor) if is_moved(name, tensor) else tensor for name, tensor in state.items()}


PLACES = {
    "ComfyUI fp8_scaled": ("matrices", "text"),
    "ComfyUI fp8, newer": ("matrices", "text"),
    "plain fp8": ("wide",),
}


def expected(name: str, form: Format, original: Original, answers: Mapping[str, Run]) -> tuple[float, float]:
    """How far latents and frames should move: the answer to a nudge, times the steps of the form."""
    total = [0.0, 0.0]
    for place in PLACES.get(name, ("text",) if name.startswith("umT5") else ("blocks",)):
        state, kind_of = original.experts["low_noise"], form.kind_of
        if place == "text":
            state, kind_of = original.text, form.text_kind_of
        steps = [(STEPS[kind_of(key, tensor)], tensor.numel()) for key, tensor in state.items() if kind_of(key, tensor)]
        step = (sum(step**2 * count for step, count in steps) / sum(count for _, count in steps)) ** 0.5
        total = [sum_ + (step * answer) ** 2 for sum_, answer in zip(total, answers[place], strict=True)]
    return total[0] ** 0.5, total[1] ** 0.5


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_form_gives_a_video_as_near_as_its_steps_allow(
    name: str, original: Original, truth: Callable[[str], Run], answers: Mapping[str, Run], tmp_path: Path
) -> None:
    form = QUANTISED[name]
    pipeline = wanfast.load(**form.write(original, tmp_path), precision="fp32", device="cpu")
    check_model(pipeline, original, form)
    assert is_near(distance(run(pipeline), truth("fp32")), expected(name, form, original, answers))


def is_near(got: tuple[float, float], want: tuple[float, float]) -> bool:
    """0.76 to 1.28 times what was expected was seen; 0.24 for umT5 in Q3_K, whose steps a context cannot follow."""
    return 0.15 * want[0] < got[0] < 1.6 * want[0] and got[1] < 1.6 * want[1] + 0.5  # frames are rounded to levels


FAULTS: dict[str, Callable[[dict[str, Tensor], str], Tensor]] = {
    "a scale forgotten": lambda file, layer: torch.ones_like(file[f"{layer}.weight_scale"]),
    "one scale for all rows": lambda file, layer: file[f"{layer}.weight_scale"].mean().expand(256, 1),
    "scales one row off": lambda file, layer: file[f"{layer}.weight_scale"].roll(1, 0),
    "a neighbour's scales": lambda file, layer: file["blocks.0.self_attn.k.weight_scale"].clone(),
}


@pytest.mark.parametrize("fault", [*FAULTS, "two layers swapped"])
def test_these_limits_see_a_fault_in_one_layer(
    fault: str, original: Original, truth: Callable[[str], Run], answers: Mapping[str, Run], tmp_path: Path
) -> None:
    layer = "blocks.1.ffn.2"

    def faulty(state: State) -> dict[str, Tensor]:
        file = lightx2v(state, torch.int8)[0]
        if fault in FAULTS:
            return file | {f"{layer}.weight_scale": FAULTS[fault](file, layer)}
        swapped = {"blocks.0.self_attn.o": "blocks.1.self_attn.o", "blocks.1.self_attn.o": "blocks.0.self_attn.o"}
        return {name.replace(stem, swapped.get(stem, stem)): file[name] for name in file for stem in [stem_of(name)]}

    form = QUANTISED["LightX2V int8"]
    pipeline = wanfast.load(**write_files(original, tmp_path, faulty), precision="fp32", device="cpu")
    with pytest.raises(AssertionError, match="off by"):
        check_model(pipeline, original, form)
    want = expected("LightX2V int8", form, original, answers)
    assert not is_near(distance(run(pipeline), truth("fp32")), want)


def stem_of(name: str) -> str:
    return name.rpartition(".")[0]


TWICE = (
    "official bf16",
    "official fp32 shards",
    "ComfyUI fp8_scaled",
    "LightX2V int8",
    "TurboWan",
    "plain fp8",
    "GGUF Q4_0",
)


@pytest.mark.parametrize("name", TWICE)
def test_one_expert_under_both_names_is_refused(name: str, original: Original, tmp_path: Path) -> None:
    same = dict.fromkeys(original.experts, original.experts["low_noise"])
    sources = (LOSSLESS | QUANTISED)[name].write(replace(original, experts=same), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"high_noise.* holds the same numbers as .*low_noise.*, one expert twice"
    ):
        wanfast.load(**sources, device="cpu")


@pytest.mark.parametrize("name", ["official bf16", "LightX2V int8", "GGUF Q4_0"])
def test_experts_that_differ_in_one_matrix_are_two(name: str, original: Original, tmp_path: Path) -> None:
    """As where one was trained from the other in few layers."""
    low = original.experts["low_noise"]
    high = low | {"blocks.1.cross_attn.v.weight": -low["blocks.1.cross_attn.v.weight"]}
    changed = replace(original, experts={"high_noise": high, "low_noise": low})
    wanfast.load(**(LOSSLESS | QUANTISED)[name].write(changed, tmp_path), device="cpu")


def test_files_of_zeros_are_not_taken_for_one_expert(original: Original, tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in original.experts["low_noise"].items()}
    changed = replace(original, experts=dict.fromkeys(original.experts, zeros))
    wanfast.load(**write_official(changed, tmp_path, torch.bfloat16), device="cpu")


@pytest.mark.parametrize("kind", ["Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_the_quantisers_of_these_files_are_read_by_gguf_as_they_are_meant(kind: str) -> None:
    values = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 64)[:, None]
    error = (unpack(quantise(values, kind), kind) - values) / values.square().mean(1, keepdim=True).sqrt()
    assert (error.square().mean(1).sqrt() < 1.25 * STEPS[kind]).all()
    assert (error.abs() < 8 * STEPS[kind]).all()
