"""LoRA merged on request: into copies of plain weights, rounded once, gone after it, refused where quantised."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import loras
from reference.dit import golden_state, small_config
from reference.families import NEGATIVE, PROMPT, make_family, noise
from reference.gguf_files import write_gguf
from reference.quantised import comfy_fp8, is_block_matrix, lightx2v
from reference.single_files import dit_state, write, write_comfy
from safetensors.torch import save_file
from torch import Tensor

import wanfast
from wanfast.__main__ import main
from wanfast.adapter import attach, make_adapter
from wanfast.checkpoint.part import open_part
from wanfast.checkpoint.reader import memory_reader
from wanfast.config import MODELS
from wanfast.dit.weights import dit_config, load_block, load_outer
from wanfast.errors import RequestError
from wanfast.linear import Linear
from wanfast.loaded import LoadedModel
from wanfast.lora import LoraSpec, open_lora, open_loras
from wanfast.video import read_settings, read_video

SIZE = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 3}
FLAGS = ["--size", "32x32", "--num-frames", "5", "--steps", "3", "--seed", "1"]
CONFIG = small_config("t2v", dim=64, ffn_dim=128, text_dim=32)
MODEL = replace(MODELS["t2v-A14B"], dit=CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("t2v")
    return make_family("t2v", place).write_official(place / "model")


@pytest.fixture(scope="module")
def style(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers = loras.linear_layers(wanfast.load(folder).loaded.config.dit, blocks_only=False)
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    return loras.write_lora(path, loras.random_factors(layers), alpha=2.0)


def run(pipeline: wanfast.Pipeline, *used: object, **changes: object) -> Tensor:
    usual = {"negative_prompt": NEGATIVE, "latents": noise((16, 2, 4, 4)), "output": "latents"}
    return pipeline.generate(PROMPT, loras=used, **(SIZE | usual | changes))


def states(pipeline: wanfast.Pipeline) -> dict[str, dict[str, Tensor]]:
    readers = pipeline.loaded.model.experts
    return {name: {key: reader.load(key).clone() for key in reader.names()} for name, reader in readers.items()}


def factors_of(folder: Path) -> Mapping[str, tuple[Tensor, Tensor]]:
    return loras.random_factors(loras.linear_layers(wanfast.load(folder).loaded.config.dit, blocks_only=False))


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def test_a_merged_run_is_that_of_weights_added_in_float64(folder: Path, style: Path) -> None:
    pipeline = wanfast.load(folder, precision="fp32", device="cpu")
    factors = factors_of(folder)
    changed = {name: memory_reader(loras.merged(state, factors, 0.7 * 0.5)) for name, state in states(pipeline).items()}
    model = replace(pipeline.loaded.model, experts=changed)
    want = run(wanfast.Pipeline(LoadedModel(model, precision="fp32", device=torch.device("cpu"))))
    assert error(run(pipeline, f"{style}:0.7", merge_loras=True), want) < 2e-5
    assert error(run(pipeline, LoraSpec(style, 0.7, is_merged=True)), want) < 2e-5
    assert error(run(pipeline), want) > 1e-2


@pytest.mark.parametrize("precision", ["fp32", "exact"])
def test_the_next_generation_has_the_old_weights_to_the_bit(folder: Path, style: Path, precision: str) -> None:
    pipeline = wanfast.load(folder, precision=precision, device="cpu")
    stored = states(pipeline)
    before = run(pipeline)
    merged = run(pipeline, style, merge_loras=True)
    assert error(merged, before) > 1e-2
    assert torch.equal(run(pipeline), before)
    assert torch.equal(run(pipeline, style, merge_loras=True), merged)
    for name, state in states(pipeline).items():
        assert all(torch.equal(tensor, stored[name][key]) for key, tensor in state.items()), "the file's pages"
    assert torch.equal(run(wanfast.load(folder, precision=precision, device="cpu")), before)


def merged_layers(paths: list[Path], state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Linear]:
    opened = open_loras([LoraSpec(path, 0.6) for path in paths], MODEL, merge=True)
    adapter = make_adapter(opened, "low_noise", CONFIG, dtype, torch.device("cpu"))
    reader = memory_reader(state)
    blocks = [attach(load_block(reader, CONFIG, index, dtype), adapter.blocks[index]) for index in range(2)]
    outer = attach(load_outer(reader, CONFIG, dtype), adapter.outer)
    named = {"patch_embedding": outer.patch_embedding, "head.head": outer.head, "time_embedding.2": outer.time_out}
    for index, block in enumerate(blocks):
        for attention in ("self_attn", "cross_attn"):
            named |= {f"blocks.{index}.{attention}.{p}": getattr(getattr(block, attention), p) for p in "qkvo"}
        named |= {f"blocks.{index}.ffn.0": block.ffn_up, f"blocks.{index}.ffn.2": block.ffn_down}
    return named


@pytest.mark.parametrize("is_fp16_file", [False, True])
def test_weights_are_rounded_once_from_the_exact_sum(is_fp16_file: bool, tmp_path: Path) -> None:
    """bf16 weights, LoRAs in fp32 or fp16: float64 and one rounding, but for sums in fp32 that fall on a tie."""
    held = torch.float16 if is_fp16_file else torch.float32
    layers = loras.linear_layers(CONFIG, blocks_only=False)
    both = [loras.random_factors(layers, seed=seed) for seed in (1, 2)]
    both = [{name: (down.to(held), up.to(held)) for name, (down, up) in factors.items()} for factors in both]
    paths = [
        loras.write_lora(tmp_path / f"{index}.safetensors", factors, alpha=2.0, dtype=held)
        for index, factors in enumerate(both)
    ]
    state = {name: tensor.bfloat16() for name, tensor in golden_state(CONFIG).items()}
    wide = {name: tensor.double() for name, tensor in state.items()}
    exact = loras.merged(loras.merged(wide, both[0], 0.3), both[1], 0.3)
    named = merged_layers(paths, state, torch.bfloat16)
    assert named["head.head"].weight.dtype == torch.float32, "the head computes in fp32"
    for name, layer in named.items():
        assert layer.low_rank == ()
        want = exact[f"{name}.weight"].flatten(1).to(layer.weight.dtype)
        assert torch.equal(layer.bias, state[f"{name}.bias"].to(layer.bias.dtype))
        if layer.weight.dtype == torch.float32:
            torch.testing.assert_close(layer.weight, want, rtol=1e-5, atol=1e-6)
            continue
        assert (layer.weight == want).float().mean() > 0.999, name
        torch.testing.assert_close(layer.weight, want, rtol=2**-7, atol=1e-6)


def test_products_and_differences_are_one_sum(tmp_path: Path) -> None:
    """Three changes of a third of a step each: rounded one by one they would all be lost."""
    name, step = "blocks.0.ffn.0", 2**-7  # bf16 at 1
    state = golden_state(CONFIG) | {f"{name}.weight": torch.ones(128, 64)}
    state = {key: tensor.bfloat16() for key, tensor in state.items()}
    third = step / 3 / 0.6
    down, up = torch.full((1, 64), third), torch.ones(128, 1)
    one = loras.write_lora(tmp_path / "one.safetensors", {name: (down, up)})
    two = loras.write_lora(tmp_path / "two.safetensors", {name: (down, up)})
    three = tmp_path / "three.safetensors"
    save_file({f"{name}.diff": torch.full((128, 64), third)}, three)
    got = merged_layers([one, two, three], state, torch.bfloat16)[name].weight
    assert (got == 1 + step).all()


@pytest.mark.parametrize("form", ["fp8", "int8", "Q8_0"])
def test_merging_into_quantised_weights_is_refused(form: str, tmp_path: Path) -> None:
    models = write_comfy(tmp_path / "models")
    paths = {}
    for word in ("high", "low"):
        state = dit_state("t2v", word)
        paths[word] = tmp_path / f"{word}.{'gguf' if form == 'Q8_0' else 'safetensors'}"
        if form == "Q8_0":
            write_gguf(paths[word], state, lambda name, tensor: form if is_block_matrix(name, tensor) else "F16")
        else:
            write(paths[word], (comfy_fp8 if form == "fp8" else lambda s: lightx2v(s, torch.int8))(state)[0])
    near = {
        "vae": models / "vae" / "wan_2.1_vae.safetensors",
        "text_encoder": models / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        "tokenizer": models / "text_encoders" / "tokenizer.json",
    }
    pipeline = wanfast.load(**paths, **near, device="cpu")
    layers = loras.linear_layers(pipeline.loaded.config.dit)
    path = loras.write_lora(tmp_path / "a.safetensors", loras.random_factors(layers))
    kind = {"fp8": "float8_e4m3fn", "int8": "int8"}.get(form, form)
    with pytest.raises(RequestError, match=rf"merge_loras: must be left out .*, got .*{paths['low'].name} in {kind};"):
        run(pipeline, f"{path}@low", merge_loras=True)
    run(pipeline, path, num_inference_steps=1)  # beside the weights it runs
    outside = loras.random_factors({"patch_embedding": (128, 16, 1, 2, 2)})  # plain in every one of these files
    path = loras.write_lora(tmp_path / "b.safetensors", outside)
    run(pipeline, path, merge_loras=True, num_inference_steps=1)


def test_a_gguf_of_16_bits_is_merged_into(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, dit_state("t2v"), lambda name, tensor: "BF16" if tensor.dim() == 2 else "F32")
    reader = open_part(path, "dit").reader
    config = dit_config(reader)
    lora = loras.write_lora(tmp_path / "a.safetensors", loras.random_factors(loras.linear_layers(config)))
    experts = {"high_noise": reader, "low_noise": reader}
    (opened,) = open_loras([lora], replace(MODEL, dit=config), experts, merge=True)
    assert opened.spec.is_merged and not open_lora(LoraSpec(lora), replace(MODEL, dit=config)).spec.is_merged


def test_the_command_line_says_records_and_repeats(
    folder: Path, style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["generate", "a ball", "--model", folder, *FLAGS, "--precision", "exact", "--lora", style]
    for name, more in (("beside", []), ("merged", ["--merge-loras"])):
        assert main([str(word) for word in [*line, *more, "-o", f"{name}.mp4"]]) == 0
        assert (", merged" in capsys.readouterr().err) == (name == "merged")
        assert [lora["is_merged"] for lora in read_settings(f"{name}.mp4")["loras"]] == [name == "merged"]
        assert main(["rerun", f"{name}.mp4", "-o", f"{name}-again.mp4"]) == 0
    beside, merged, again = (read_video(f"{name}.mp4") for name in ("beside", "merged", "merged-again"))
    assert torch.equal(torch.as_tensor(merged), torch.as_tensor(again))
    assert not torch.equal(torch.as_tensor(merged), torch.as_tensor(beside)), "bf16 rounds the two differently"
    video = wanfast.load(folder, precision="exact").generate("a ball", seed=1, loras=[style], merge_loras=True, **SIZE)
    assert video.settings["loras"] == read_settings("merged.mp4")["loras"]
