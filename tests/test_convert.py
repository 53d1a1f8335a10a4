"""Models written as wanfast's own folder: the same video, the quantisation promised, and nothing half-written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from reference.families import make_family
from reference.gguf_files import write_gguf
from reference.quantised import is_block_matrix, lightx2v, turbowan
from reference.single_files import TEXT, dit_state, text_state, vae_state, write, write_comfy
from torch import Tensor

import wanfast
from wanfast.__main__ import main
from wanfast.checkpoint.bind import read_tensor
from wanfast.checkpoint.inspect import describe
from wanfast.checkpoint.lookup import Sources
from wanfast.checkpoint.packed_format import PAGE_BYTES
from wanfast.convert import convert_model
from wanfast.dit import weights as dit_weights
from wanfast.errors import CheckpointError, RequestError
from wanfast.model import Model, open_model
from wanfast.open_file import origin
from wanfast.random_weights import byte_tokenizer
from wanfast.residency import map_tensors
from wanfast.stored import GGUFWeight, ScaledWeight, Weight
from wanfast.text import weights as text_weights
from wanfast.text.weights import embed_tokens

SMALL: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 3, "seed": 1}


def mixed_gguf(path: Path, word: str) -> Path:
    def kind(name: str, tensor: Tensor) -> str:
        if not is_block_matrix(name, tensor):
            return "F32" if name == "patch_embedding.weight" else "F16"
        return "Q8_0" if name.endswith("ffn.2.weight") else "Q4_0"

    write_gguf(path, dit_state("t2v", word), kind)
    return path


def sources(form: str, folder: Path) -> Sources:
    """One small model as people have it."""
    if form in ("t2v", "i2v", "ti2v"):
        return Sources(model=make_family(form, folder).write_official(folder / "model"))
    if form == "diffusers":
        return Sources(model=make_family("t2v", folder).write_diffusers(folder / "model"))
    models = write_comfy(folder / "models")
    if form == "comfy":
        return Sources(model=models)
    named = {}
    for word in ("high", "low"):
        state = dit_state("t2v", word)
        if form == "gguf":
            named[word] = mixed_gguf(folder / f"{word}.gguf", word)
        elif form == "turbowan":
            torch.save(turbowan(state)[0], folder / f"{word}-quant.pth")
            named[word] = folder / f"{word}-quant.pth"
        else:
            named[word] = write(folder / f"{word}.safetensors", lightx2v(state, torch.int8)[0])
    parts = {"vae": write(folder / "vae.safetensors", vae_state())}
    parts["text_encoder"] = write(folder / "text.safetensors", text_state())
    byte_tokenizer(TEXT.vocab_size).save(str(folder / "tokenizer.json"))
    return Sources(**named, **parts, tokenizer=folder / "tokenizer.json")


def latents(model: Sources | Path) -> Tensor:
    named = {"model": model} if isinstance(model, Path) else {n: getattr(model, n) for n in Sources.__slots__}
    pipeline = wanfast.load(**named, precision="exact", device="cpu")
    image = Image.new("RGB", (32, 32), (200, 30, 30)) if pipeline.loaded.config.task == "i2v" else None
    return pipeline.generate("a red ball", image=image, output="latents", **SMALL)


def weights(model: Model) -> list[Tensor]:
    """Every tensor that a run in the exact precision computes with."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor)
        return tensor

    for reader in model.experts.values():
        map_tensors(dit_weights.load_outer(reader, model.config.dit, torch.bfloat16), note)
        for index in range(model.config.dit.num_layers):
            map_tensors(dit_weights.load_block(reader, model.config.dit, index, torch.bfloat16), note)
    outer = text_weights.load_outer(model.text, model.config.text, torch.bfloat16)
    map_tensors(outer, note)
    note(embed_tokens(torch.arange(model.config.text.vocab_size), outer))
    for index in range(model.config.text.num_layers):
        map_tensors(text_weights.load_block(model.text, model.config.text, index, torch.bfloat16), note)
    for name in sorted(model.vae.names()):
        note(read_tensor(model.vae, name, model.vae.shape(name), dtype=torch.float32))
    return found


@pytest.mark.parametrize("form", ["t2v", "i2v", "ti2v", "diffusers", "comfy", "lightx2v", "turbowan", "gguf"])
def test_exact_gives_the_same_latents_to_the_bit(form: str, tmp_path: Path) -> None:
    given = sources(form, tmp_path)
    model = open_model(given)
    folder = convert_model(model, tmp_path / "ready")
    again = open_model(folder)
    assert again.config == model.config
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["tokenizer.json", "vae.safetensors", "text_encoder.safetensors", "wanfast-model.json"]
        + [f"{name}.safetensors" for name in model.experts]
    )
    assert all(map(torch.equal, weights(again), weights(model)))
    assert torch.equal(latents(folder), latents(given))


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("form", ["t2v", "ti2v"])
def test_eight_bits_are_those_of_each_channel(form: str, precision: str, tmp_path: Path) -> None:
    """Against float64 on the original's tensors: each block matrix to half a step, everything else untouched."""
    model = open_model(sources(form, tmp_path))
    folder = convert_model(model, tmp_path / "ready", precision)
    again = open_model(folder)
    largest, dtype = {"fp8": (28, torch.float8_e4m3fn), "int8": (127, torch.int8)}[precision]
    for name, reader in model.experts.items():
        for tensor_name in reader.names():
            original, stored = reader.load(tensor_name), again.experts[name].load(tensor_name)
            assert isinstance(original, Tensor)
            if not is_block_matrix(tensor_name, original):
                assert isinstance(stored, Tensor)
                assert torch.equal(original.to(stored.dtype), stored) and stored.dtype.itemsize >= 2
                continue
            assert isinstance(stored, ScaledWeight) and stored.values.dtype == dtype
            assert not stored.is_rotated  # narrower than a rotation
            scale = original.double().abs().amax(1, keepdim=True) / largest
            torch.testing.assert_close(stored.scale.double(), scale, rtol=1e-6, atol=0)
            error = (stored.values.double() * stored.scale.double() - original.double()).abs()
            step = scale if precision == "int8" else (original.double().abs() / 8).clamp_min(scale * 2**-9)
            assert (error <= 0.501 * step).all()
    got, want = latents(folder), latents(Sources(model=tmp_path / "model"))
    error = ((got - want).square().mean() / want.square().mean()).sqrt()
    assert 1e-5 < error < 0.1


def test_what_has_eight_bits_keeps_them(tmp_path: Path) -> None:
    model = open_model(sources("lightx2v", tmp_path))
    again = open_model(convert_model(model, tmp_path / "ready", "int8"))
    name = "blocks.1.ffn.0.weight"
    got, want = (one.experts["low_noise"].load(name) for one in (again, model))
    assert isinstance(got, ScaledWeight) and isinstance(want, ScaledWeight)
    assert torch.equal(got.values, want.values) and torch.equal(got.scale, want.scale)


def test_a_second_rounding_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = open_model(sources("gguf", tmp_path))
    again = open_model(convert_model(model, tmp_path / "ready", "fp8"))
    assert "40 matrices are stored as Q" in caplog.text and "fp8 rounds them a second time" in caplog.text
    assert isinstance(again.experts["high_noise"].load("blocks.0.ffn.0.weight"), ScaledWeight)
    caplog.clear()
    exact = open_model(convert_model(model, tmp_path / "exact"))
    assert isinstance(exact.experts["high_noise"].load("blocks.0.ffn.0.weight"), GGUFWeight)
    assert not caplog.text


def _place(weight: Weight) -> tuple[int, int]:
    """The first byte of its file, and the one behind its last."""
    values = weight.values if isinstance(weight, ScaledWeight) else weight
    assert isinstance(values, Tensor)
    at = origin(values)
    assert at is not None, "cast or copied"
    return at.offset, at.offset + values.nbytes


@pytest.mark.parametrize("precision", ["exact", "fp8", "int8"])
def test_a_loaded_block_is_the_file_itself(precision: str, tmp_path: Path) -> None:
    """No tensor of a block is cast or copied, and together they are one run of the file from a page on."""
    model = open_model(convert_model(open_model(sources("t2v", tmp_path)), tmp_path / "ready", precision))
    reader = model.experts["low_noise"]
    spans: list[tuple[int, int]] = []

    def note(tensor: Tensor) -> Tensor:
        spans.append(_place(tensor))
        return tensor

    block = dit_weights.load_block(reader, model.config.dit, 1, torch.bfloat16)
    map_tensors(block, note)
    attn = block.self_attn
    begin, end = min(spans)[0], max(end for _, end in spans)
    assert begin % PAGE_BYTES == 0
    assert end - begin == sum(last - first for first, last in spans)
    first, second, third = (_place(projection.weight) for projection in (attn.q, attn.k, attn.v))
    assert first[1] == second[0] and second[1] == third[0], "the three are one matrix"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return make_family("t2v", folder).write_official(folder / "model")


def test_a_distilled_model_stays_known_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = sources("lightx2v", tmp_path)
    for word in ("high", "low"):
        (tmp_path / f"{word}.safetensors").rename(tmp_path / f"wan_{word}_noise_lightx2v_4step.safetensors")
    named = {word: tmp_path / f"wan_{word}_noise_lightx2v_4step.safetensors" for word in ("high", "low")}
    folder = convert_model(open_model(replace(given, **named)), tmp_path / "rdy")
    again = convert_model(open_model(folder), tmp_path / "once-more")
    for path in (folder, again):
        assert main(["plan", "x", "--model", str(path), "--quiet"]) == 0
        assert "4step.safetensors seems to be distilled to few steps" in capsys.readouterr().err


def test_a_bad_number_is_refused_and_nothing_gets_the_name(tmp_path: Path) -> None:
    states = {word: dit_state("t2v", word) for word in ("high", "low")}
    states["low"]["blocks.1.ffn.0.weight"][3, 4] = torch.nan
    named = {word: write(tmp_path / f"{word}.safetensors", state) for word, state in states.items()}
    write_comfy(tmp_path / "models")
    byte_tokenizer(TEXT.vocab_size).save(str(tmp_path / "tokenizer.json"))
    parts = {"vae": tmp_path / "models" / "vae" / "wan_2.1_vae.safetensors"}
    model = open_model(Sources(**named, **parts, text_encoder=write(tmp_path / "text.safetensors", text_state())))
    for precision in ("exact", "int8"):
        with pytest.raises(CheckpointError, match=r"low\.safetensors: tensor blocks\.1\.ffn\.0\.weight.*\[3, 4\]"):
            convert_model(model, tmp_path / precision, precision)
        assert not (tmp_path / precision).exists()


def test_outputs_that_cannot_be(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(tiny)
    (tmp_path / "there").mkdir()
    with pytest.raises(RequestError, match="output: must not exist yet"):
        convert_model(model, tmp_path / "there")
    with pytest.raises(RequestError, match="output: must lie in a folder"):
        convert_model(model, tmp_path / "no" / "such")
    with pytest.raises(RequestError, match=r"precision: must be exact, fp8 or int8, got 'int4'"):
        convert_model(model, tmp_path / "ready", "int4")  # type: ignore[arg-type]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(RequestError, match=r"output: must have \d+ MB of room"):
        convert_model(model, tmp_path / "ready")


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "wanfast-model.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        section, _, inner = key.partition("__")
        if inner:
            content[section][inner] = value
        else:
            content[section] = value
    path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def ready(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_model(open_model(tiny), tmp_path_factory.mktemp("ready") / "model")


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": None},
        {"task": "i2v"},
        {"task": "vace"},
        {"boundary": None},
        {"boundary": 1.5},
        {"boundary": True},
        {"version": True},
        {"precision": "int4"},
        {"made_from": "x"},
        {"dit__text_len": 10**12},
        {"dit__eps": 1e308},
        {"vae__latents_std": [0.0] * 16},
        {"defaults__num_inference_steps": 10**9},
        {"defaults__width": 2**70},
        {"dit": []},
        {"dit__num_heads": 0},
        {"dit__eps": "1e-6"},
        {"dit__text_len": 1.5},
        {"text__relative_attention_max_distance": None},
        {"vae__latents_mean": [1.0]},
        {"vae__latents_std": "x"},
        {"defaults__num_frames": -1},
        {"defaults__unheard": 1},
        {"unheard": 1},
    ],
    ids=str,
)
def test_an_edited_manifest_is_refused_by_name(changes: dict[str, Any], ready: Path, tmp_path: Path) -> None:
    folder = edited(shutil.copytree(ready, tmp_path / "copy"), **changes)
    with pytest.raises(CheckpointError, match=r"copy/(wanfast-model\.json|vae\.safetensors)"):
        open_model(folder)


@pytest.mark.parametrize("name", ["vae.safetensors", "low_noise.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(name: str, ready: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(ready, tmp_path / "copy")
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        open_model(folder)


def test_parts_can_stand_in(ready: Path, tiny: Path) -> None:
    model: Model = open_model(Sources(model=ready, vae=tiny / "Wan2.1_VAE.pth"))
    assert model.vae.path == tiny / "Wan2.1_VAE.pth"


def test_an_expert_is_a_file_like_any_other(ready: Path) -> None:
    part = describe(ready / "high_noise.safetensors")["parts"]["file"]
    assert (part["kind"], part["task"], part["expert"]) == ("dit", "t2v", "high_noise")
    assert describe(ready)["layout"] == "ready"


def test_the_command_prints_the_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "--model", str(tiny), "--precision", "int8"]) == 0
    told = capsys.readouterr()
    assert told.out == "t2v-A14B-int8\n" and "high_noise.safetensors" in told.err
    assert main(["convert", "--model", str(tiny), "-o", "again", "--json", "--quiet"]) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert result["path"] == "again" and "holds fp32; the folder gets what precision exact rounds it to" in told.err
    assert result["bytes"] == sum(file.stat().st_size for file in Path("again").iterdir())
    assert main(["convert", "--model", str(tiny), "-o", "again"]) == 2
    assert "output: must not exist yet" in capsys.readouterr().err
    assert main(["convert"]) == 2
    assert "model: must be given" in capsys.readouterr().err
    assert main(["generate", "a ball", "--model", "again", "--size", "32x32", "--num-frames", "5", "--steps", "2"]) == 0
