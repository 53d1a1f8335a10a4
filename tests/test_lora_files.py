"""LoRA files that do not fit: what is refused, what is left out with a word, and how the file is asked for."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import loras
from reference.dit import small_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanfast.adapter import make_adapter
from wanfast.config import MODELS, ModelConfig
from wanfast.dit.weights import expected_tensors
from wanfast.errors import CheckpointError, RequestError
from wanfast.lora import LoraSpec, describe_lora, open_lora, open_loras, parse_lora
from wanfast.lora_names import module_names, read_key
from wanfast.lora_summary import lora_summary

T2V, TI2V = (replace(MODELS[name], dit=small_config(MODELS[name].task)) for name in ("t2v-A14B", "ti2v-5B"))
LAYER = "blocks.1.cross_attn.k"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good file; tests spoil it."""
    return loras.write_lora(tmp_path / "a.safetensors", loras.random_factors(loras.linear_layers(T2V.dit)), alpha=4.0)


def change(path: Path, changes: Mapping[str, Tensor | None]) -> Path:
    tensors = load_file(path) | changes
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)
    return path


DOWN, UP, ALPHA = (f"diffusion_model.{LAYER}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha"))
FAULTS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "half a pair": ({UP: None}, rf"{LAYER}\.lora_down\.weight has no counterpart"),
    "other half": ({DOWN: None}, rf"{LAYER}\.lora_up\.weight has no counterpart"),
    "another width in": (
        {DOWN: torch.zeros(4, 40)},
        r"lora_down\.weight has shape \[4, 40\].*\[4, 48\].*another model",
    ),
    "another width out": ({UP: torch.zeros(40, 4)}, r"lora_up\.weight has shape \[40, 4\].*\[48, 4\].*another model"),
    "ranks differ": ({UP: torch.zeros(48, 3)}, r"lora_up\.weight has shape \[48, 3\]"),
    "rank 0": ({DOWN: torch.zeros(0, 48), UP: torch.zeros(48, 0)}, r"lora_down\.weight has shape \[0, 48\]"),
    "a scalar factor": ({DOWN: torch.zeros([])}, r"lora_down\.weight has shape \[\]"),
    "alpha of two": ({ALPHA: torch.ones(2)}, r"alpha must be one finite number"),
    "alpha not finite": ({ALPHA: torch.tensor(float("nan"))}, r"alpha must be one finite number"),
    "on a norm": (
        {f"blocks.0.norm3.{part}.weight": torch.zeros(48, 1) for part in ("lora_up",)}
        | {"blocks.0.norm3.lora_down.weight": torch.zeros(1, 1)},
        "blocks.0.norm3",
    ),
    "difference of another shape": ({"diffusion_model.blocks.0.norm3.diff": torch.zeros(40)}, r"norm3\.diff.*\[40\]"),
    "modulation of another shape": ({"diffusion_model.blocks.0.diff_m": torch.zeros(6, 48)}, r"diff_m.*\[1, 6, 48\]"),
    "twice": ({f"transformer.{LAYER}.lora_A.weight": torch.zeros(4, 48)}, f"both mean {LAYER}"),
    "DoRA": ({f"diffusion_model.{LAYER}.dora_scale": torch.zeros(48, 1)}, "dora_scale.*DoRA"),
    "DoRA of PEFT": ({f"transformer.{LAYER}.lora_magnitude_vector": torch.zeros(48)}, "DoRA"),
    "LoHa": ({f"lora_unet_{LAYER}.hada_w1_a": torch.zeros(48, 4)}, "LoHa"),
    "LoKr": ({f"lycoris_{LAYER}.lokr_w1": torch.zeros(4, 4)}, "LoKr"),
    "weights replaced": ({"diffusion_model.patch_embedding.set_weight": torch.zeros(4, 4)}, "replaces weights"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_file_that_cannot_be_right_is_refused_by_name(path: Path, fault: str) -> None:
    assert open_lora(LoraSpec(path), T2V).report.unmatched == ()
    changes, said = FAULTS[fault]
    with pytest.raises(CheckpointError, match=said) as caught:
        open_lora(LoraSpec(change(path, changes)), T2V)
    assert str(path) in str(caught.value)


def test_lora_of_another_model_is_refused_by_name(path: Path) -> None:
    wide = replace(T2V, dit=small_config("t2v", dim=96))
    with pytest.raises(CheckpointError, match=r"a\.safetensors.*blocks\.0.*\[4, 48\].*t2v-A14B.*another model"):
        open_lora(LoraSpec(path), wide)


def test_nothing_matched_is_refused(tmp_path: Path) -> None:
    save_file({"lora_unet_single_blocks_0_linear1.lora_down.weight": torch.zeros(4, 4)}, tmp_path / "flux.safetensors")
    with pytest.raises(CheckpointError, match=r"flux\.safetensors: no tensor fits.*single_blocks"):
        open_lora(LoraSpec(tmp_path / "flux.safetensors"), T2V)
    save_file({ALPHA: torch.ones([])}, tmp_path / "alphas.safetensors")
    with pytest.raises(CheckpointError, match=r"alphas\.safetensors: no tensor fits"):
        open_lora(LoraSpec(tmp_path / "alphas.safetensors"), T2V)
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no tensor fits.*empty"):
        open_lora(LoraSpec(tmp_path / "none.safetensors"), T2V)


def test_a_model_file_is_no_lora(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in expected_tensors(T2V.dit).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no tensor fits"):
        open_lora(LoraSpec(tmp_path / "model.safetensors"), T2V)


def test_unmatched_keys_are_a_warning_that_names_them(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    strange = {"diffusion_model.blocks.7.ffn.0.lora_down.weight": torch.zeros(4, 48), "text_encoder.x": torch.zeros(1)}
    with caplog.at_level(logging.WARNING, "wanfast"):
        lora = open_loras([LoraSpec(change(path, strange))], T2V)[0]
    assert lora.report.unmatched == tuple(sorted(strange))
    assert "2 of 62 tensors" in caplog.text
    assert all(key in caplog.text for key in strange)
    assert "2 ignored" in describe_lora(lora)


def test_image_attention_is_skipped_with_a_reason_and_no_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {
        "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": torch.zeros(4, 48),
        "diffusion_model.blocks.0.cross_attn.norm_k_img.diff": torch.zeros(48),
        "transformer.blocks.0.attn2.add_v_proj.lora_A.weight": torch.zeros(4, 48),
        "diffusion_model.img_emb.proj.0.diff": torch.zeros(48),
    }
    with caplog.at_level(logging.WARNING, "wanfast"):
        lora = open_loras([LoraSpec(change(path, extra))], T2V)[0]
    assert lora.report.skipped.keys() == extra.keys()
    assert len(lora.report.matched) == 60
    assert caplog.text == ""
    assert "60 tensors, 4 skipped (image attention" in describe_lora(lora)


@pytest.mark.parametrize(
    ("written", "strength", "target"),
    [
        ("{}", 1.0, None),
        ("{}:0.8", 0.8, None),
        ("{}:-1", -1.0, None),
        ("{}:.5@high", 0.5, "high_noise"),
        ("{}@low", 1.0, "low_noise"),
        ("{}@both", 1.0, "both"),
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "a b@2:1.safetensors", "x:0.5.safetensors"])
def test_how_a_lora_is_asked_for(written: str, strength: float, target: str | None, name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    spec = parse_lora(written.format(tmp_path / name))
    assert (spec.path, spec.strength, spec.target) == (tmp_path / name, strength, target)


def test_what_cannot_be_asked_for(path: Path) -> None:
    for text in (f"{path}:strong", f"{path}@hgih", f"{path}:1:2", "", "missing.safetensors", LoraSpec("gone.pth")):
        with pytest.raises(RequestError, match=r"^lora: must be FILE\[:strength\]"):
            parse_lora(text)
    for spec in (LoraSpec(path, float("nan")), LoraSpec(path, 1.0, "middle")):
        with pytest.raises(RequestError, match=r"^lora: "):
            parse_lora(spec)
    with pytest.raises(RequestError, match=r"^loras: must be a list"):
        open_loras(str(path), T2V)


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("high_noise_model", ["high_noise"]),
        ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise", ["low_noise"]),
        ("Wan22-HighNoise-style", ["high_noise"]),
        ("style_low", ["low_noise"]),
        ("high_quality", ["high_noise", "low_noise"]),
        ("yellow", ["high_noise", "low_noise"]),
        ("style", ["high_noise", "low_noise"]),
    ],
)
def test_the_file_name_decides_the_expert_unless_told(name: str, experts: list[str], path: Path) -> None:
    path = path.rename(path.with_stem(name))
    assert list(open_lora(LoraSpec(path), T2V).experts) == experts
    assert list(open_lora(LoraSpec(path, target="both"), T2V).experts) == ["high_noise", "low_noise"]
    assert list(open_lora(LoraSpec(path, target="low_noise"), T2V).experts) == ["low_noise"]


def test_a_model_with_one_expert(tmp_path: Path) -> None:
    path = loras.write_lora(
        tmp_path / "high_noise.safetensors", loras.random_factors(loras.linear_layers(TI2V.dit)), dialect="diffusers"
    )
    assert open_lora(LoraSpec(path), TI2V).experts == ("single",)
    with pytest.raises(RequestError, match=r"^lora: .*ti2v-5B, which has only one"):
        open_lora(LoraSpec(path, target="high_noise"), TI2V)


def test_pth_files_are_read_too(path: Path) -> None:
    torch.save(load_file(path), path.with_suffix(".pth"))
    lora = open_lora(LoraSpec(path.with_suffix(".pth")), T2V)
    assert {layer.scale for layer in lora.layers["low_noise"].values()} == {1.0}


def _full_size_keys(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return loras.linear_layers(model.dit)


@pytest.mark.parametrize("model", list(MODELS.values()), ids=list(MODELS))
def test_every_layer_of_the_published_sizes_has_one_spelling_each(model: ModelConfig) -> None:
    names = module_names(expected_tensors(model.dit))
    layers = _full_size_keys(model)
    assert len(layers) == 10 * model.dit.num_layers
    for dialect in loras.DIALECTS:
        prefix, naming, suffixes = loras.DIALECTS[dialect]
        for layer in layers:
            key = prefix + loras.spelled(layer, naming) + loras.SUFFIXES[suffixes]["up"]
            found = read_key(key, names)
            assert (found.module, found.part) == (layer, "up"), key


@given(st.text(alphabet="abdfimnoqrtw_.0123lorA", max_size=60))
def test_no_key_breaks_the_reader(key: str) -> None:
    names = module_names(expected_tensors(T2V.dit))
    for prefix in ("", "diffusion_model.", "transformer.", "lora_unet_"):
        found = read_key(prefix + key, names)
        assert found.module is None or found.module in set(names.values())


_KEYS = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "diffusion_model.", "transformer.", "transformer_2.", "lora_unet_"]),
    st.sampled_from(["blocks.0.ffn.0", "blocks_0_ffn_0", "blocks.0.attn1.to_out", "blocks.0", "blocks.1.norm3", "x"]),
    st.sampled_from([".lora_down.weight", ".lora_B.x.weight", ".lora_B.bias", ".alpha", ".diff", ".diff_b", ".diff_m"]),
)
_SHAPES = st.lists(st.sampled_from([0, 1, 4, 48, 80]), max_size=4)
_SETTINGS = st.sampled_from(
    [
        "",
        "[]",
        "{",
        '{"transformer.lora_alpha": Infinity}',
        '{"transformer.lora_alpha": "8"}',
        '{"transformer.alpha_pattern": [1]}',
        '{"transformer.alpha_pattern": {"to_q": 4}}',
        '{"transformer.lora_alpha": 8, "transformer.use_rslora": 3}',
    ]
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(_KEYS, _SHAPES, max_size=5), _SETTINGS)
def test_any_file_is_opened_or_refused_by_name(shapes: dict[str, list[int]], stated: str) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "fuzzed.safetensors"
        tensors = {key: torch.ones(shape) for key, shape in shapes.items()}
        save_file(tensors, path, metadata={"lora_adapter_metadata": stated} if stated else None)
        try:
            lora = open_lora(LoraSpec(path), T2V)
            make_adapter([lora], "low_noise", T2V.dit, torch.float32, torch.device("cpu"))
        except CheckpointError as error:
            assert "fuzzed.safetensors" in str(error)
        lora_summary(path)


@pytest.mark.parametrize(("pattern", "scales"), [({"blocks.0.attn1.to_q": 16}, {2.0, 4.0}), ({}, {2.0})])
def test_alphas_of_single_layers_as_peft_states_them(
    pattern: dict[str, int], scales: set[float], tmp_path: Path
) -> None:
    stated = json.dumps({"transformer.lora_alpha": 8, "transformer.alpha_pattern": pattern})
    path = loras.write_lora(
        tmp_path / "a.safetensors",
        loras.random_factors(loras.linear_layers(T2V.dit)),
        dialect="diffusers",
        metadata={"lora_adapter_metadata": stated},
    )
    layers = open_lora(LoraSpec(path), T2V).layers["high_noise"]
    assert {layer.scale for layer in layers.values()} == scales
    assert layers["blocks.0.self_attn.q"].scale == max(scales)
