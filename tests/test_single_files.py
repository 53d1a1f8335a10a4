"""Whole runs from ComfyUI's single files: the video is the one of the plain weights the files stand for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
from reference import checkpoints, single_files
from reference.gguf_files import write_gguf
from reference.quantised import comfy_fp8, is_block_matrix
from reference.single_files import TEXT, dit_state, text_state, vae_state, write_comfy
from reference.vocabulary import train_spiece

import wanfast
from wanfast.__main__ import main
from wanfast.checkpoint.reader import memory_reader
from wanfast.random_weights import byte_tokenizer
from wanfast.text import weights as text_weights
from wanfast.text.tokenizer import tokenize
from wanfast.text.umt5 import encode_text
from wanfast.video import read_settings, read_video

SMALL = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 3, "seed": 1}
FLAGS = ["--size", "32x32", "--num-frames", "5", "--steps", "3", "--seed", "1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comfy(tmp_path_factory.mktemp("comfy") / "models")


def official(folder: Path, experts: dict[str, dict[str, torch.Tensor]], *, text: dict, vae: dict) -> Path:
    byte_tokenizer(TEXT.vocab_size).save(str(folder.parent / "tokenizer.json"))
    tokenizer = folder.parent / "tokenizer.json"
    return checkpoints.write_official(
        folder, task="t2v", experts=experts, vae=vae, text=text, num_heads=1, tokenizer=tokenizer
    )


def plain_vae() -> dict[str, torch.Tensor]:
    return {name: tensor.half().float() for name, tensor in vae_state().items()}


def test_comfy_files_give_the_video_of_their_plain_weights(models: Path, tmp_path: Path) -> None:
    experts = {f"{word}_noise": comfy_fp8(dit_state("t2v", word))[1] for word in ("high", "low")}
    text = comfy_fp8(text_state(), has_input_scales=False)[1]
    plain = wanfast.load(official(tmp_path / "model", experts, text=text, vae=plain_vae()), device="cpu")
    stored = wanfast.load(models, device="cpu")
    assert stored.loaded.config == plain.loaded.config
    for output in ("latents", "video"):
        got, want = (pipeline.generate("a red ball", output=output, **SMALL) for pipeline in (stored, plain))
        got, want = (video.frames.float() if output == "video" else video for video in (got, want))
        # Tensors at other addresses are summed in another order: 1e-6 was seen, and a pixel may round the other way.
        torch.testing.assert_close(got, want, rtol=0, atol=1.0 if output == "video" else 1e-4)
        assert want.std() > 0.1


def test_a_comfy_text_encoder_brings_its_vocabulary(tmp_path: Path) -> None:

    spiece = train_spiece()
    file, plain = single_files.comfy_text_encoder(text_state(), spiece)
    assert file["spiece_model"].shape == (len(spiece),)
    models = write_comfy(tmp_path / "models", spiece=spiece)
    model = wanfast.load(models, device="cpu").loaded.model
    own = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    ids = tokenize(model.tokenizer, "a red ball rolling left", 512).ids
    assert ids == (*own.encode("a red ball rolling left"), 1)
    assert model.tokenizer.path == models / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    config = replace(TEXT, num_layers=2)
    encoded = []
    for reader in (model.text, memory_reader(plain)):
        outer = text_weights.load_outer(reader, config, torch.float32)
        blocks = [text_weights.load_block(reader, config, index, torch.float32) for index in range(2)]
        encoded.append(encode_text(ids, outer, blocks, config))
    torch.testing.assert_close(*encoded, rtol=1e-5, atol=1e-5)


def run(*words: object) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_the_command_line_finds_says_and_repeats(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    high = models / "diffusion_models" / "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"
    low = models / "diffusion_models" / "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"
    vae = models / "vae" / "wan_2.1_vae.safetensors"
    assert run("generate", "a red ball", "--model", high, *FLAGS, "-o", "one.mp4") == 0
    said = capsys.readouterr().err
    assert f"low-noise expert: {low} (by its name)" in said
    assert f"VAE: {vae}" in said
    assert run("generate", "a red ball", "--high", high, "--low", low, "--vae", vae, *FLAGS, "-o", "two.mp4") == 0
    assert run("generate", "a red ball", "--model", models, *FLAGS, "-o", "three.mp4", "--json") == 0
    capsys.readouterr()
    one, two, three = (torch.as_tensor(read_video(name)) for name in ("one.mp4", "two.mp4", "three.mp4"))
    assert torch.equal(one, two) and torch.equal(one, three)
    recorded = read_settings("two.mp4")
    assert recorded["model_path"] is None
    assert recorded["model_files"] == {"high": str(high), "low": str(low), "vae": str(vae)}
    for name in ("one", "two", "three"):
        assert run("rerun", f"{name}.mp4", "-o", f"{name}-again.mp4") == 0
        assert torch.equal(one, torch.as_tensor(read_video(f"{name}-again.mp4")))


def test_inspect_describes_files_and_folders(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = models / "diffusion_models" / "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"
    assert run("inspect", file, "--json") == 0
    (part,) = json.loads(capsys.readouterr().out)["parts"].values()
    assert (part["kind"], part["expert"], part["task"]) == ("dit", "high_noise", "t2v")
    assert list(part["bytes_by_dtype"]) == ["float8_e4m3fn", "float16"]
    assert run("inspect", models, "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["layout"], described["task"]) == ("files", "t2v")


def test_a_pair_of_gguf_files_is_found_and_runs(models: Path, tmp_path: Path) -> None:
    paths = {}
    for word in ("high", "low"):
        folder = tmp_path / f"{word.capitalize()}Noise"
        folder.mkdir()
        paths[word] = folder / f"Wan2.2-T2V-A14B-{word.capitalize()}Noise-Q8_0.gguf"
        state = dit_state("t2v", word)
        write_gguf(paths[word], state, lambda name, tensor: "Q8_0" if is_block_matrix(name, tensor) else "F16")
    near = {
        "vae": models / "vae" / "wan_2.1_vae.safetensors",
        "text_encoder": models / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        "tokenizer": models / "text_encoders" / "tokenizer.json",
    }
    pipeline = wanfast.load(paths["low"], device="cpu", **near)
    assert [reader.path for reader in pipeline.loaded.model.experts.values()] == [paths["high"], paths["low"]]
    got = pipeline.generate("a red ball", output="latents", **SMALL)
    fp8 = wanfast.load(models, device="cpu").generate("a red ball", output="latents", **SMALL)
    assert 1e-5 < ((got - fp8).square().mean() / fp8.square().mean()).sqrt() < 0.1  # the same weights, in 8 bits each
