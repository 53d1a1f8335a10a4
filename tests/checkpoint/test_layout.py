import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from reference.checkpoints import (
    TOKENIZER,
    dit_shapes,
    random_state,
    text_shapes,
    vae_shapes,
    write_diffusers,
    write_json,
    write_official,
    write_safetensors,
)
from transformers import UMT5Config, UMT5EncoderModel

from wanfast.checkpoint.bind import check_names
from wanfast.checkpoint.defaults import SamplingDefaults
from wanfast.checkpoint.layout import DiTSettings, dit_settings, open_checkpoint
from wanfast.checkpoint.names import dit_to_diffusers, text_to_transformers, vae_to_diffusers
from wanfast.errors import CheckpointError

CHANNELS = {"t2v": (4, 4), "i2v": (12, 4), "ti2v": (6, 6)}
EXPERTS = {"t2v": ("high_noise", "low_noise"), "i2v": ("high_noise", "low_noise"), "ti2v": ("single",)}
HEADS = 2


def _dit(task: str, *, seed: str = "", dim: int = 24, layers: int = 2) -> dict[str, torch.Tensor]:
    in_dim, out_dim = CHANNELS[task]
    shapes = dit_shapes(dim=dim, ffn_dim=20, in_dim=in_dim, out_dim=out_dim, layers=layers, text_dim=10, freq_dim=8)
    return random_state(shapes, seed=seed)


def _vae(task: str) -> dict[str, torch.Tensor]:
    version = "2.2" if task == "ti2v" else "2.1"
    return random_state(vae_shapes(version, z=CHANNELS[task][1], encoder_dim=4, decoder_dim=4))


def _text(dim: int = 10) -> dict[str, torch.Tensor]:
    return random_state(text_shapes(vocab=7, dim=dim, ffn_dim=12, heads=2, layers=2), dtype=torch.bfloat16)


def official(folder: Path, task: str, **changes) -> Path:
    experts = {name: _dit(task, seed=name) for name in EXPERTS[task]}
    parts = {"experts": experts, "vae": _vae(task), "text": _text(), "num_heads": HEADS, "shards": 3}
    return write_official(folder, task=task, **(parts | changes))


def diffusers(folder: Path, task: str, **changes) -> Path:
    version = "2.2" if task == "ti2v" else "2.1"
    states = [{dit_to_diffusers(n): t for n, t in _dit(task, seed=name).items()} for name in EXPERTS[task]]
    text = {text_to_transformers(n): t for n, t in _text().items()}
    parts = {
        "transformer": states[0],
        "transformer_2": states[1] if len(states) == 2 else None,
        "vae": {vae_to_diffusers(n, version): t for n, t in _vae(task).items()},
        "text": text | {"encoder.embed_tokens.weight": text["shared.weight"]},
        "num_heads": HEADS,
        "boundary": None if task == "ti2v" else 0.875,
        "shards": 2,
        "vae_config": {"z_dim": CHANNELS[task][1]},
    }
    return write_diffusers(folder, task=task, **(parts | changes))


def _edit(path: Path, **values) -> None:
    write_json(path, json.loads(path.read_text()) | values)


WRITERS = {"official": official, "diffusers": diffusers}


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("task", CHANNELS)
def test_both_layouts_give_the_same_model_by_official_names(tmp_path, task, layout):
    checkpoint = open_checkpoint(WRITERS[layout](tmp_path / "model", task))
    assert (checkpoint.layout, checkpoint.task) == (layout, task)
    assert tuple(checkpoint.experts) == EXPERTS[task]
    wanted = {name: _dit(task, seed=name) for name in EXPERTS[task]}
    readers = {**checkpoint.experts, "vae": checkpoint.vae, "text": checkpoint.text}
    for part, state in (wanted | {"vae": _vae(task), "text": _text()}).items():
        assert readers[part].names() == state.keys()
        for name, tensor in state.items():
            loaded = readers[part].load(name)
            assert loaded.dtype == tensor.dtype
            assert torch.equal(loaded, tensor), name
    assert checkpoint.vae_version == ("2.2" if task == "ti2v" else "2.1")
    assert checkpoint.tokenizer.name == "tokenizer.json" and checkpoint.tokenizer.is_file()
    assert checkpoint.boundary == (0.875 if layout == "diffusers" and task != "ti2v" else None)
    assert checkpoint.defaults == SamplingDefaults()
    for expert in checkpoint.experts:
        assert dit_settings(checkpoint, expert) == DiTSettings(num_heads=HEADS, eps=1e-6, text_len=512)


def test_configs_are_kept_as_they_are(tmp_path):
    checkpoint = open_checkpoint(diffusers(tmp_path, "t2v", text_config={"num_heads": 2}))
    assert set(checkpoint.configs) == {"high_noise", "low_noise", "vae", "text", "model_index"}
    assert checkpoint.configs["vae"]["z_dim"] == 4
    assert checkpoint.configs["text"]["num_heads"] == 2
    official_one = open_checkpoint(official(tmp_path / "official", "i2v"))
    assert set(official_one.configs) == {"high_noise", "low_noise"}
    assert official_one.configs["low_noise"]["model_type"] == "i2v"


def test_settings_are_the_configs_own(tmp_path):
    folder = official(tmp_path / "a", "ti2v", text_len=16)
    _edit(folder / "config.json", eps=1e-5, num_heads=4)
    assert dit_settings(open_checkpoint(folder), "single") == DiTSettings(num_heads=4, eps=1e-5, text_len=16)
    for wrong in (0, -1, 2.5, True, "2", None):
        _edit(folder / "config.json", num_heads=wrong)
        with pytest.raises(CheckpointError, match=r"config\.json: num_heads: must be a number above 0"):
            dit_settings(open_checkpoint(folder), "single")
    other = diffusers(tmp_path / "b", "ti2v")
    _edit(other / "transformer" / "config.json", num_attention_heads=3)
    with pytest.raises(CheckpointError, match=r"config\.json: num_attention_heads x .* is 3 x 12, but .* is 24 wide"):
        dit_settings(open_checkpoint(other), "single")


def test_experts_with_different_settings_are_refused(tmp_path):
    folder = official(tmp_path, "t2v")
    _edit(folder / "low_noise_model" / "config.json", num_heads=4)
    with pytest.raises(CheckpointError, match=r"the experts' config\.json differ .*num_heads=2.*num_heads=4"):
        open_checkpoint(folder)


@pytest.mark.parametrize("task", ["t2v", "ti2v"])
def test_a_pipeline_saved_by_diffusers_itself_is_read(tmp_path, task):
    in_dim, out_dim = CHANNELS[task]
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": in_dim, "out_channels": out_dim}
    sizes |= {"text_dim": 10, "freq_dim": 8, "ffn_dim": 20, "num_layers": 2}
    transformers = [WanTransformer3DModel(**sizes) for _ in EXPERTS[task]]
    residual = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 4}
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=7, d_model=10, d_kv=5, d_ff=12, num_layers=2, num_heads=2)),
        vae=AutoencoderKLWan(base_dim=4, z_dim=out_dim, **(residual if task == "ti2v" else {})),
        scheduler=UniPCMultistepScheduler(),
        transformer=transformers[0],
        transformer_2=transformers[1] if len(transformers) == 2 else None,
        boundary_ratio=0.875 if task == "t2v" else None,
        expand_timesteps=task == "ti2v",
    )
    pipeline.save_pretrained(tmp_path, max_shard_size="20KB")
    write_json(tmp_path / "tokenizer" / "tokenizer.json", TOKENIZER)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.task, tuple(checkpoint.experts)) == (task, EXPERTS[task])
    assert checkpoint.boundary == pipeline.config.boundary_ratio
    assert dit_settings(checkpoint, EXPERTS[task][0]).num_heads == 2
    check_names(checkpoint.vae, {name: tuple(t.shape) for name, t in _vae(task).items()}, part="VAE")
    for name, module in zip(EXPERTS[task], transformers, strict=True):
        state, reader = module.state_dict(), checkpoint.experts[name]
        assert len({reader.file_of(n) for n in reader.names()}) > 1
        assert reader.names() == _dit(task).keys()
        assert all(torch.equal(reader.load(n), state[dit_to_diffusers(n)]) for n in reader.names())
    state = pipeline.text_encoder.state_dict()
    assert all(torch.equal(checkpoint.text.load(n), state[text_to_transformers(n)]) for n in checkpoint.text.names())


def test_stray_values_in_a_diffusers_config_are_passed_over(tmp_path):
    folder = diffusers(tmp_path, "i2v")
    _edit(folder / "transformer" / "config.json", in_channels=99, num_layers=7, ffn_dim=1, added_kv_proj_dim=5)
    assert open_checkpoint(folder).task == "i2v"


def test_a_home_relative_or_text_path_will_do(tmp_path, monkeypatch):
    official(tmp_path / "model", "ti2v")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/model").path == tmp_path / "model"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such folder; name a folder as published; `hf download"),
        (lambda p: p.write_bytes(b""), "is a file"),
        (lambda p: p.mkdir(), "is an empty folder"),
        (lambda p: (p / "other").mkdir(parents=True), "holds neither the official layout .* nor the Diffusers layout"),
    ],
)
def test_what_is_no_checkpoint_folder_is_told_in_one_line(tmp_path, make, message):
    make(tmp_path / "model")
    with pytest.raises(CheckpointError, match=rf"model: {message}") as caught:
        open_checkpoint(tmp_path / "model")
    assert "\n" not in str(caught.value)


OFFICIAL_PARTS = {
    "high_noise_model": "the high-noise expert",
    "low_noise_model": "the low-noise expert",
    "models_t5_umt5-xxl-enc-bf16.pth": "the text encoder",
    "Wan2.1_VAE.pth": "the VAE",
    "google/umt5-xxl/tokenizer.json": "the tokenizer",
}
DIFFUSERS_PARTS = {
    "transformer": "the high-noise expert",
    "transformer_2": "the low-noise expert",
    "text_encoder": "the text encoder",
    "vae": "the VAE",
    "tokenizer/tokenizer.json": "the tokenizer",
}


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(("layout", "parts"), [("official", OFFICIAL_PARTS), ("diffusers", DIFFUSERS_PARTS)])
def test_each_missing_part_is_named(tmp_path, layout, parts):
    whole = WRITERS[layout](tmp_path / "whole", "t2v")
    for part, about in parts.items():
        folder = tmp_path / "copy"
        shutil.copytree(whole, folder)
        _remove(folder / part)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(folder)
        assert str(caught.value) == f"{folder / part}: missing ({about})"
        shutil.rmtree(folder)


def test_all_that_is_wrong_is_listed_at_once(tmp_path):
    folder = official(tmp_path, "ti2v")
    for part in ("config.json", "Wan2.2_VAE.pth", "google/umt5-xxl/tokenizer.json"):
        _remove(folder / part)
    next(folder.glob("*00002-of*")).unlink()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: 4 problems: ")
    for part in (
        "config.json: missing",
        "Wan2.2_VAE.pth: missing",
        "tokenizer.json: missing",
        "-00002-of-00003.safetensors",
    ):
        assert part in message
    assert "\n" not in message


def test_a_diffusers_folder_without_its_index_is_refused(tmp_path):
    _remove(diffusers(tmp_path, "t2v") / "model_index.json")
    with pytest.raises(CheckpointError, match=r"model_index\.json: missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("told", "truth"), [("t2v", "i2v"), ("i2v", "t2v")])
@pytest.mark.parametrize("layout", WRITERS)
def test_weights_of_another_variant_are_refused(tmp_path, layout, told, truth):
    folder = WRITERS[layout](tmp_path, truth)
    if layout == "official":
        for expert in ("high_noise_model", "low_noise_model"):
            _edit(folder / expert / "config.json", model_type=told)
    else:
        pipelines = {"t2v": "WanPipeline", "i2v": "WanImageToVideoPipeline"}
        _edit(folder / "model_index.json", _class_name=pipelines[told])
    with pytest.raises(
        CheckpointError, match=rf"tensor patch_embedding\.weight .* says {told}; .*another variant's weights"
    ):
        open_checkpoint(folder)


def test_one_expert_of_another_variant_is_refused(tmp_path):
    folder = official(tmp_path, "t2v")
    _remove(folder / "low_noise_model")
    write_safetensors(folder / "low_noise_model", _dit("i2v"))
    shutil.copy(folder / "high_noise_model" / "config.json", folder / "low_noise_model")
    with pytest.raises(CheckpointError, match=r"low_noise_model.*takes 12 channels and the head gives 4, as i2v does"):
        open_checkpoint(folder)


def test_experts_of_different_sizes_are_refused(tmp_path):
    high, low = _dit("t2v"), _dit("t2v", layers=3)
    folder = official(tmp_path / "a", "t2v", experts={"high_noise": high, "low_noise": low})
    with pytest.raises(
        CheckpointError, match=r"low_noise_model.*tensor blocks\.2\.\S+ is missing in .*high_noise_model"
    ):
        open_checkpoint(folder)
    folder = official(tmp_path / "b", "t2v", experts={"high_noise": high, "low_noise": _dit("t2v", dim=28)})
    with pytest.raises(CheckpointError, match=r"has shape \[24\], but \[28\] in .*low_noise_model"):
        open_checkpoint(folder)


def test_parts_that_do_not_fit_are_refused(tmp_path):
    folder = official(tmp_path / "a", "t2v", vae=_vae("ti2v"), vae_file="Wan2.2_VAE.pth")
    with pytest.raises(CheckpointError, match=r"Wan2\.2_VAE\.pth: tensor conv2\.weight is of a VAE with 6 .* has 4"):
        open_checkpoint(folder)
    folder = official(tmp_path / "b", "t2v", text=_text(dim=14))
    with pytest.raises(
        CheckpointError, match=r"token_embedding\.weight is 14 wide, but the DiT in .* takes text 10 wide"
    ):
        open_checkpoint(folder)


def test_of_two_vaes_the_models_own_is_taken(tmp_path):
    for task, own, other in (("t2v", "Wan2.1_VAE.pth", "Wan2.2_VAE.pth"), ("ti2v", "Wan2.2_VAE.pth", "Wan2.1_VAE.pth")):
        folder = official(tmp_path / task, task)
        torch.save(_vae("ti2v" if task == "t2v" else "t2v"), folder / other)
        assert open_checkpoint(folder).vae.path == folder / own


@pytest.mark.parametrize("key", ["dim", "ffn_dim", "freq_dim", "in_dim", "out_dim", "num_layers"])
def test_an_official_config_that_contradicts_the_tensors_is_refused(tmp_path, key):
    folder = official(tmp_path, "t2v")
    config = folder / "low_noise_model" / "config.json"
    right = json.loads(config.read_text())[key]
    _edit(config, **{key: right + 2})
    with pytest.raises(CheckpointError, match=rf"low_noise_model/config\.json: {key} is {right + 2}, but .*"):
        open_checkpoint(folder)


@pytest.mark.parametrize("told", ["s2v", None, 3, ["t2v"]])
def test_models_wanfast_does_not_run_are_refused(tmp_path, told):
    folder = official(tmp_path, "ti2v")
    _edit(folder / "config.json", model_type=told)
    with pytest.raises(CheckpointError, match=r"config\.json: model_type is .*; wanfast runs t2v, i2v, ti2v"):
        open_checkpoint(folder)
    folder = diffusers(tmp_path / "b", "ti2v")
    _edit(folder / "model_index.json", _class_name="WanAnimatePipeline")
    with pytest.raises(
        CheckpointError, match=r"_class_name is 'WanAnimatePipeline'; wanfast runs WanPipeline, WanImage"
    ):
        open_checkpoint(folder)


def test_a_model_type_that_does_not_go_with_the_folders_is_refused(tmp_path):
    folder = official(tmp_path / "a", "ti2v")
    _edit(folder / "config.json", model_type="t2v")
    with pytest.raises(CheckpointError, match=r"model_type is 't2v', which has two experts in high_noise_model/"):
        open_checkpoint(folder)
    folder = official(tmp_path / "b", "t2v")
    _edit(folder / "low_noise_model" / "config.json", model_type="i2v")
    with pytest.raises(
        CheckpointError, match=r"low_noise_model/config\.json: model_type is 'i2v', but the other .* 't2v'"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize("value", [1.5, 0.0, "0.9", True, 1])
def test_an_impossible_boundary_is_refused(tmp_path, value):
    _edit(diffusers(tmp_path, "t2v") / "model_index.json", boundary_ratio=value)
    with pytest.raises(CheckpointError, match=r"model_index\.json: boundary_ratio must be null or between 0 and 1"):
        open_checkpoint(tmp_path)


def test_a_file_of_two_naming_schemes_is_refused(tmp_path):
    state = {dit_to_diffusers(name): tensor for name, tensor in _dit("ti2v").items()}
    state["head.modulation"] = state["scale_shift_table"]
    folder = diffusers(tmp_path, "ti2v", transformer=state)
    with pytest.raises(CheckpointError, match=r"both mean head\.modulation; the file mixes two naming schemes"):
        open_checkpoint(folder)


def test_a_folder_may_bring_its_own_sampling_defaults(tmp_path):
    folder = official(tmp_path, "t2v")
    write_json(
        folder / "wanfast.json", {"name": "small", "width": 64, "shift": 3, "guidance_high": 1.5, "boundary": 0.5}
    )
    assert open_checkpoint(folder).defaults == SamplingDefaults(
        name="small", width=64, shift=3, guidance_high=1.5, boundary=0.5
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"widht": 64}, "widht: is not a setting, known are name, width"),
        ({"width": "64"}, "width: must be a whole number from 1 to 16384, got '64'"),
        ({"num_frames": True}, "num_frames: must be a whole number"),
        ({"fps": 0}, "fps: must be a whole number from 1 to 1000, got 0"),
        ({"shift": 0}, "shift: must be a number above 0"),
        ({"guidance_low": None}, "guidance_low: must be a number, got None"),
        ({"guidance": float("inf")}, "guidance: must be a number, got inf"),
        ({"boundary": 1}, "boundary: must be a number between 0 and 1"),
        ({"name": ""}, "name: must be a text"),
        ([1], "not a JSON object"),
    ],
)
def test_sampling_defaults_are_checked(tmp_path, content, message):
    folder = official(tmp_path, "ti2v")
    (folder / "wanfast.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"wanfast\.json: {message}"):
        open_checkpoint(folder)
