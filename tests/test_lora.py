"""LoRA on the small models: against merged weights in float64, against Diffusers with PEFT, and what is refused."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from reference import loras
from reference.families import NEGATIVE, PROMPT, Family, make_family, noise
from torch import Tensor

import wanfast
from wanfast.lora import open_lora, parse_lora

SIZE = 64


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family("t2v", tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def t2v(family: Family, tmp_path_factory: pytest.TempPathFactory) -> wanfast.Pipeline:
    return wanfast.load(family.write_official(tmp_path_factory.mktemp("t2v")), precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def layers(t2v: wanfast.Pipeline) -> dict[str, tuple[int, ...]]:
    return loras.linear_layers(t2v.loaded.config.dit)


@pytest.fixture(scope="module")
def factors(layers: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Tensor, Tensor]]:
    return loras.random_factors(layers)


def run(pipeline: wanfast.Pipeline, *used: object, **changes: object) -> Tensor:
    """Latents of a short run in which both experts have a part."""
    stride = pipeline.loaded.config.vae.spatial_stride
    latents = noise((pipeline.loaded.config.vae.z_dim, 3, SIZE // stride, SIZE // stride))
    usual = {"negative_prompt": NEGATIVE, "width": SIZE, "height": SIZE, "num_frames": 9, "num_inference_steps": 4}
    return pipeline.generate(PROMPT, output="latents", loras=used, **(usual | {"latents": latents} | changes))


def merged_run(pipeline: wanfast.Pipeline, states: Mapping[str, Mapping[str, Tensor]], **changes: object) -> Tensor:
    """The same run with an expert's weights replaced."""
    from wanfast.checkpoint.reader import memory_reader
    from wanfast.loaded import LoadedModel

    model = pipeline.loaded.model
    experts = {name: memory_reader(states[name]) if name in states else model.experts[name] for name in model.experts}
    changed = LoadedModel(replace(model, experts=experts), precision="fp32", device=torch.device("cpu"))
    return run(wanfast.Pipeline(changed), **changes)


def states(pipeline: wanfast.Pipeline) -> dict[str, dict[str, Tensor]]:
    readers = pipeline.loaded.model.experts
    return {name: {key: reader.load(key) for key in reader.names()} for name, reader in readers.items()}


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


CLOSE, FAR = 2e-5, 1e-2  # the same sums in another order; a run that is another one


@pytest.mark.parametrize("alpha", [None, 2.0, 16.0])
def test_lora_equals_merged_weights(
    t2v: wanfast.Pipeline, factors: dict[str, tuple[Tensor, Tensor]], alpha: float | None, tmp_path: Path
) -> None:
    path = loras.write_lora(tmp_path / "style.safetensors", factors, alpha=alpha)
    scale = 0.7 * (1 if alpha is None else alpha / loras.RANK)
    want = merged_run(t2v, {name: loras.merged(state, factors, scale) for name, state in states(t2v).items()})
    got = run(t2v, f"{path}:0.7")
    assert error(got, want) < CLOSE
    assert error(run(t2v), want) > FAR, "the LoRA must do something"
    assert error(run(t2v, f"{path}:0.6"), want) > FAR / 10, "another strength must be another video"


@pytest.mark.parametrize("task", ["i2v", "ti2v"])
def test_the_other_families(task: str, tmp_path: Path) -> None:
    pipeline = wanfast.load(
        make_family(task, tmp_path).write_official(tmp_path / "model"), precision="fp32", device="cpu"
    )
    factors = loras.random_factors(loras.linear_layers(pipeline.loaded.config.dit, blocks_only=False))
    path = loras.write_lora(tmp_path / "style.safetensors", factors, alpha=2.0)
    image = {"image": Image.linear_gradient("L").resize((SIZE, SIZE)).convert("RGB")}
    merged = {name: loras.merged(state, factors, 0.5) for name, state in states(pipeline).items()}
    want = merged_run(pipeline, merged, **image)
    assert error(run(pipeline, path, **image), want) < CLOSE
    assert error(run(pipeline, **image), want) > FAR


def test_a_wrong_alpha_is_seen(
    t2v: wanfast.Pipeline, factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    right = loras.write_lora(tmp_path / "right.safetensors", factors, alpha=2.0)
    wrong = loras.write_lora(tmp_path / "wrong.safetensors", factors, alpha=2.5)
    want = merged_run(t2v, {name: loras.merged(state, factors, 0.5) for name, state in states(t2v).items()})
    assert error(run(t2v, right), want) < CLOSE
    assert error(run(t2v, wrong), want) > FAR / 10


@pytest.mark.parametrize("dialect", list(loras.DIALECTS))
def test_every_dialect_says_the_same(
    t2v: wanfast.Pipeline, factors: dict[str, tuple[Tensor, Tensor]], dialect: str, tmp_path: Path
) -> None:
    path = loras.write_lora(tmp_path / "a.safetensors", factors, dialect=dialect, alpha=2.0)
    lora = open_lora(parse_lora(path), t2v.loaded.config)
    assert lora.report.unmatched == ()
    assert len(lora.report.matched) == 3 * len(factors)
    for expert in ("high_noise", "low_noise"):
        assert lora.layers[expert].keys() == factors.keys()
        for name, layer in lora.layers[expert].items():
            assert layer.scale == 0.5
            assert torch.equal(lora.reader.load(layer.keys["down"]), factors[name][0])
            assert torch.equal(lora.reader.load(layer.keys["up"]), factors[name][1])


def test_layers_around_the_blocks_take_part(t2v: wanfast.Pipeline, tmp_path: Path) -> None:
    everywhere = loras.linear_layers(t2v.loaded.config.dit, blocks_only=False)
    outside = {name: shape for name, shape in everywhere.items() if not name.startswith("blocks.")}
    assert len(outside) == 7
    for name, shape in outside.items():
        factors = loras.random_factors({name: shape})
        path = loras.write_lora(tmp_path / f"{name}.safetensors", factors)
        want = merged_run(t2v, {key: loras.merged(state, factors, 1.0) for key, state in states(t2v).items()})
        got = run(t2v, path)
        assert error(got, want) < CLOSE, name
        assert error(run(t2v), want) > 1e-3, name


def test_differences_of_whole_tensors(t2v: wanfast.Pipeline, tmp_path: Path) -> None:
    """The lightx2v form: norms, biases, modulation, patch embedding and head as differences, scaled by the strength."""
    keys = {
        "blocks.1.norm3.weight": "blocks.1.norm3.diff",
        "blocks.1.norm3.bias": "blocks.1.norm3.diff_b",
        "blocks.0.self_attn.norm_q.weight": "blocks.0.self_attn.norm_q.diff",
        "blocks.0.modulation": "blocks.0.diff_m",
        "head.modulation": "head.diff_m",
        "head.head.weight": "head.head.diff",
        "patch_embedding.weight": "patch_embedding.diff",
        "patch_embedding.bias": "patch_embedding.diff_b",
        "blocks.0.ffn.0.bias": "blocks.0.ffn.0.diff_b",
        "blocks.1.self_attn.o.weight": "blocks.1.self_attn.o.diff",
    }
    before = states(t2v)
    generator = torch.Generator().manual_seed(1)
    base = before["high_noise"]
    changes = {name: 0.2 * torch.randn(base[name].shape, generator=generator) for name in keys}
    for chosen in [*({name} for name in keys), set(keys)]:
        path = loras.write_lora(
            tmp_path / "d.safetensors", {}, more={f"diffusion_model.{keys[name]}": changes[name] for name in chosen}
        )
        want = merged_run(
            t2v,
            {
                expert: state | {name: (state[name].double() + 0.5 * changes[name].double()).float() for name in chosen}
                for expert, state in before.items()
            },
        )
        assert error(run(t2v, f"{path}:0.5"), want) < CLOSE, chosen
        assert error(run(t2v), want) > 1e-4, chosen
    for expert, state in states(t2v).items():
        for name, tensor in state.items():
            assert torch.equal(tensor, before[expert][name]), "the base must not be written to"


def test_two_at_once_add_up(
    t2v: wanfast.Pipeline, layers: dict[str, tuple[int, ...]], factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    other = loras.random_factors({name: layers[name] for name in list(layers)[::2]}, seed=9, rank=3)
    one = loras.write_lora(tmp_path / "one.safetensors", factors, alpha=2.0)
    two = loras.write_lora(tmp_path / "two.safetensors", other, dialect="musubi")
    both = {
        expert: loras.merged(loras.merged(state, factors, 0.4), other, -0.5) for expert, state in states(t2v).items()
    }
    got = run(t2v, f"{one}:0.8", f"{two}:-0.5")
    assert error(got, merged_run(t2v, both)) < CLOSE


@pytest.mark.parametrize("target", ["high", "low"])
@pytest.mark.parametrize("by", ["spec", "name", "diffusers prefix"])
def test_one_expert_alone(
    t2v: wanfast.Pipeline, factors: dict[str, tuple[Tensor, Tensor]], target: str, by: str, tmp_path: Path
) -> None:
    name = {"spec": "x.safetensors", "name": f"Wan22_{target.title()}Noise.safetensors"}.get(by, "y.safetensors")
    path = loras.write_lora(tmp_path / name, factors, dialect="diffusers")
    if by == "diffusers prefix":  # both experts in one file: the named one first, the other one without effect
        from safetensors.torch import load_file, save_file

        first, second = ("transformer.", "transformer_2.") if target == "high" else ("transformer_2.", "transformer.")
        tensors = load_file(path)
        renamed = {key.replace("transformer.", first): tensor for key, tensor in tensors.items()}
        silent = {key.replace("transformer.", second): torch.zeros_like(tensor) for key, tensor in tensors.items()}
        save_file(renamed | silent, path)
    expert = f"{target}_noise"
    want = merged_run(t2v, {expert: loras.merged(states(t2v)[expert], factors, 1.0)})
    steps: list[tuple[str, Tensor]] = []
    got = run(t2v, f"{path}@{target}" if by == "spec" else path, on_step=lambda step, x: steps.append((step.expert, x)))
    assert error(got, want) < CLOSE
    plain: list[tuple[str, Tensor]] = []
    run(t2v, on_step=lambda step, x: plain.append((step.expert, x)))
    assert {expert for expert, _ in steps} == {"high_noise", "low_noise"}
    for (expert_name, with_lora), (_, without) in zip(steps, plain, strict=True):
        if target == "low" and expert_name == "high_noise":
            assert torch.equal(with_lora, without)


def test_removal_restores_every_bit_and_reads_nothing_anew(
    t2v: wanfast.Pipeline, factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanfast.dit import weights

    pipeline = wanfast.load(t2v.loaded.model.path, precision="fp32", device="cpu")
    path = loras.write_lora(tmp_path / "a.safetensors", factors, alpha=2.0)
    single = {"num_inference_steps": 1}
    before = run(pipeline, **single)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a weight of the model was read again")

    monkeypatch.setattr(weights, "load_block", fail)
    monkeypatch.setattr(weights, "load_outer", fail)
    changed = run(pipeline, path, **single)
    assert error(changed, before) > FAR
    assert torch.equal(run(pipeline, **single), before)
    assert torch.equal(run(pipeline, f"{path}:0", **single), before)
    assert torch.equal(run(pipeline, path, **single), changed)


@pytest.mark.parametrize(("dialect", "alpha"), [("comfyui", 2.0), ("musubi", 2.0), ("diffusers", None)])
def test_against_diffusers_with_peft(
    layers: dict[str, tuple[int, ...]],
    factors: dict[str, tuple[Tensor, Tensor]],
    dialect: str,
    alpha: float | None,
    tmp_path: Path,
) -> None:
    family = make_family("t2v", tmp_path / "family")
    path = loras.write_lora(tmp_path / "a.safetensors", factors, dialect=dialect, alpha=alpha)
    low = loras.write_lora(
        tmp_path / "b.safetensors", loras.random_factors(layers, seed=5), dialect=dialect, alpha=alpha
    )
    pipeline = wanfast.load(family.write_official(tmp_path / "model"), precision="fp32", device="cpu")
    got = run(pipeline, f"{path}@high", f"{low}@low")
    want = diffusers_latents(family, path, low)
    assert error(got, want) < 1e-4
    assert error(run(pipeline), want) > FAR


def diffusers_latents(family: Family, high: Path, low: Path) -> Tensor:
    theirs = family.pipeline()
    theirs.load_lora_weights(str(high), adapter_name="high")
    theirs.load_lora_weights(str(low), adapter_name="low", load_into_transformer_2=True)
    first, second = (expert.guidance for expert in family.row.experts)
    latents = noise((16, 3, SIZE // 8, SIZE // 8))[None]
    size = {"width": SIZE, "height": SIZE, "num_frames": 9, "num_inference_steps": 4}
    return theirs(
        PROMPT,
        NEGATIVE,
        guidance_scale=first,
        guidance_scale_2=second,
        latents=latents,
        output_type="latent",
        **size,
    ).frames[0]


@pytest.mark.parametrize("source", ["diffusers", "peft", "option"])
@pytest.mark.parametrize("is_stabilised", [True, False])
def test_alpha_and_rank_stabilisation_as_stated_beside_the_factors(
    t2v: wanfast.Pipeline,
    factors: dict[str, tuple[Tensor, Tensor]],
    source: str,
    is_stabilised: bool,
    tmp_path: Path,
) -> None:
    config = {"lora_alpha": 8, "use_rslora": is_stabilised, "r": loras.RANK}
    of_diffusers = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    path = loras.write_lora(
        tmp_path / "adapter_model.safetensors",
        factors,
        dialect="diffusers" if source != "option" else "comfyui",
        metadata=of_diffusers if source == "diffusers" else None,
        alpha=8.0 if source == "option" else None,
    )
    if source == "peft":
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    spec = replace(parse_lora(path), is_rank_stabilised=source == "option" and is_stabilised)
    lora = open_lora(spec, t2v.loaded.config)
    want = 8 / math.sqrt(loras.RANK) if is_stabilised else 8 / loras.RANK
    assert {layer.scale for layer in lora.layers["low_noise"].values()} == {want}


def test_peft_itself_agrees_on_rank_stabilisation(t2v: wanfast.Pipeline, tmp_path: Path) -> None:
    """A file that Diffusers writes, settings in its header, gives what the PEFT model it was written from gives."""
    family = make_family("t2v", tmp_path / "family")
    model = family.transformers[0]
    settings = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["to_q", "to_out.0", "net.2"])
    model.add_adapter(settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    state = peft.get_peft_model_state_dict(model)
    stated = model.peft_config["default"].to_dict()
    WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=state, transformer_lora_adapter_metadata=stated)
    lora = open_lora(parse_lora(tmp_path / "pytorch_lora_weights.safetensors"), t2v.loaded.config)
    assert lora.report.unmatched == ()
    want = model.blocks[0].attn1.to_q.scaling["default"]
    assert want == 6 / 2
    assert {layer.scale for layer in lora.layers["high_noise"].values()} == {want}


def test_bias_of_a_peft_factor(
    t2v: wanfast.Pipeline, factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    name = "blocks.0.ffn.2"
    bias = torch.randn(factors[name][1].shape[0], generator=torch.Generator().manual_seed(0))
    more = {"transformer.blocks.0.ffn.net.2.lora_B.bias": bias}
    only = {name: factors[name]}
    path = loras.write_lora(tmp_path / "a.safetensors", only, dialect="diffusers", alpha=2.0, more=more)
    want = merged_run(
        t2v,
        {
            expert: (new := loras.merged(state, only, 0.5)) | {f"{name}.bias": new[f"{name}.bias"] + 0.5 * bias}
            for expert, state in states(t2v).items()
        },
    )
    assert error(run(t2v, path), want) < CLOSE


def test_bf16_stays_near_fp32(t2v: wanfast.Pipeline, factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    path = loras.write_lora(tmp_path / "a.safetensors", factors, alpha=2.0, dtype=torch.bfloat16)
    exact = wanfast.load(t2v.loaded.model.path, precision="exact", device="cpu")
    got, want = run(exact, path), run(t2v, path)
    assert 0 < float(((got - want).square().mean() / want.square().mean()).sqrt()) < 0.05
