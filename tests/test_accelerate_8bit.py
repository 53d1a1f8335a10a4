"""A diffusers pipeline accelerated in 8 bits: wanfast's own 8-bit arithmetic, bit for bit, and a way back."""

import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from reference.pipelines import USES, Case, cast, furthest, make_case
from test_accelerate_lora import load_both
from torch import Tensor

import wanfast
from wanfast.checkpoint.lookup import Sources
from wanfast.config import DiTConfig
from wanfast.diffusers_backend import experts as experts_module
from wanfast.diffusers_backend import predict
from wanfast.diffusers_backend.experts import Experts
from wanfast.dit import packed
from wanfast.dit.model import predict_velocities
from wanfast.errors import RequestError
from wanfast.pipeline import open_loaded

PRECISIONS = pytest.mark.parametrize("precision", ["int8", "fp8"])
LIMIT = {"exact": 0.006, "int8": 0.013, "fp8": 0.04}  # relative RMS of a velocity to fp32, as of the DiT by itself
CALL = {"output_type": "latent"}  # of three steps the last is the low-noise expert's


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {use: make_case(use, tmp_path_factory.mktemp("family")) for use in USES}


@pytest.fixture(params=["t2v", "i2v", "ti2v"])
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


@pytest.fixture
def t2v(cases: dict[str, Case]) -> Iterator[Case]:
    yield cases["t2v"]
    cases["t2v"].pipe.unload_lora_weights()


def inputs(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, model.config.in_channels, 3, 4, 6, generator=generator),
        "timestep": torch.tensor([611]),
        "encoder_hidden_states": torch.randn(1, 9, model.config.text_dim, generator=generator),
    }


def velocity(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs(model), return_dict=False)[0]
    return found


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


@PRECISIONS
@torch.no_grad()
def test_equals_wanfasts_own_run(case: Case, precision: Any, tmp_path: Path) -> None:
    folder = case.family.write_official(tmp_path / "model")
    loaded = open_loaded(Sources(model=str(folder)), precision=precision, vram=None, device="cpu")
    for name, model in zip(loaded.model.experts, case.transformers, strict=True):
        given = inputs(model)
        outer, blocks = loaded.expert(name)
        config = replace(loaded.config.dit, text_len=9)
        (want,) = predict_velocities(
            given["hidden_states"], 611.0, [given["encoder_hidden_states"]], outer, blocks, config
        )
        with case.accelerated(precision=precision):
            assert torch.equal(velocity(model), want)


def test_stays_near_the_original(case: Case) -> None:
    for model in case.transformers:
        want, errors = velocity(model), {}
        for precision in LIMIT:
            with case.accelerated(precision=precision):
                errors[precision] = relative_error(velocity(model), want)
        assert all(errors[precision] < limit for precision, limit in LIMIT.items()), errors
        assert 0 < errors["exact"] < errors["int8"] < errors["fp8"]


@PRECISIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_whole_call_and_the_way_back(cases: dict[str, Case], precision: Any, dtype: torch.dtype) -> None:
    case = copy.deepcopy(cases["ti2v with a picture"])
    for model in case.transformers:
        cast(model, dtype)
    want = case.run()
    models = [*case.transformers, case.pipe.vae]
    before = [(type(model), set(model.__dict__), [p.data_ptr() for p in model.parameters()]) for model in models]
    with case.accelerated(precision=precision):
        got = case.run()
        experts = case.pipe.transformer._wanfast[0]
        held = experts._held[case.pipe.transformer]
        rounded = weakref.ref(held.rounded[0].ffn_up.weight.values)
        experts = weakref.ref(experts)
        del held
    assert 0 < furthest(got, want) < 10 / 255  # 8 bits in three steps with guidance 4: 1 and 5 were seen
    assert experts() is None and rounded() is None  # at once, without the garbage collector
    assert [(type(m), set(m.__dict__), [p.data_ptr() for p in m.parameters()]) for m in models] == before
    np.testing.assert_array_equal(case.run(), want)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count blocks that are rounded from here on."""
    count, own = [0], packed.prepare_block

    def prepare(*arguments: Any) -> Any:
        count[0] += 1
        return own(*arguments)

    monkeypatch.setattr(packed, "prepare_block", prepare)
    return count


@pytest.mark.parametrize("vram", [None, "1GB", "1KB"])
def test_weights_are_rounded_once(t2v: Case, vram: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with t2v.accelerated(precision="int8"):
        want = t2v.run(**CALL)
    count = counted(monkeypatch)
    with t2v.accelerated(precision="int8", vram=vram):
        for _ in range(2):
            assert torch.equal(t2v.run(**CALL), want)
        assert count[0] == sum(model.config.num_layers for model in t2v.transformers)
        held = t2v.pipe.transformer._wanfast[0]._held[t2v.pipe.transformer]
        matrix = held.rounded[0].ffn_up.weight
        assert matrix.values.nbytes + matrix.scale.nbytes == matrix.shape.numel() + 4 * matrix.shape[0]


def test_without_room_each_use_rounds(t2v: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with t2v.accelerated(precision="fp8"):
        want = t2v.run(**CALL)
    monkeypatch.setattr(experts_module, "free_host_memory", lambda: 0)
    count = counted(monkeypatch)
    with t2v.accelerated(precision="fp8", vram="1KB"):
        assert torch.equal(t2v.run(**CALL), want)
        assert not t2v.pipe.transformer._wanfast[0]._held[t2v.pipe.transformer].rounded
    assert count[0] > sum(model.config.num_layers for model in t2v.transformers)


@pytest.mark.parametrize("write", ["load_state_dict", "in place", "cast", "a new parameter"])
def test_weights_that_change_are_rounded_anew(t2v: Case, write: str) -> None:
    case = copy.deepcopy(t2v)
    model = case.pipe.transformer
    layer = model.blocks[1].ffn.net[2]
    doubled = {name: 2 * tensor if "blocks.1.ffn" in name else tensor for name, tensor in model.state_dict().items()}
    with case.accelerated(precision="int8"):
        before = velocity(model)
        if write == "load_state_dict":
            model.load_state_dict(doubled)
        elif write == "in place":
            with torch.no_grad():
                layer.weight.mul_(2)
        elif write == "cast":
            model.to(torch.float16)
        else:
            layer.weight = torch.nn.Parameter(3 * layer.weight.detach())
        got = velocity(model)
    with case.accelerated(precision="int8"):  # from nothing
        assert torch.equal(velocity(model), got)
    assert not torch.equal(before, got)


@PRECISIONS
@pytest.mark.parametrize("order", ["accelerated first", "loaded first"])
def test_loras(t2v: Case, precision: Any, order: str) -> None:
    """Low-rank terms beside the 8-bit weights, which stay as they are."""
    with t2v.accelerated(precision=precision):
        plain = t2v.run(**CALL)
    steps: list[Callable[[], Any]] = [
        lambda: wanfast.accelerate(t2v.pipe, precision=precision),
        lambda: load_both(t2v),
    ]
    for step in steps if order == "accelerated first" else steps[::-1]:
        step()
    held = t2v.pipe.transformer._wanfast[0]
    got = t2v.run(**CALL)
    first = held._held[t2v.pipe.transformer].rounded[0].self_attn.q.weight.values
    scaled = t2v.run(**CALL, attention_kwargs={"scale": 0.0})
    assert held._held[t2v.pipe.transformer].rounded[0].self_attn.q.weight.values is first
    wanfast.restore(t2v.pipe)
    want = t2v.run(**CALL)
    assert torch.equal(scaled, plain)
    assert relative_error(got, want) < 0.5 * relative_error(plain, want)
    assert relative_error(got, want) < 0.1


@pytest.mark.parametrize("factor", [1e6, float("nan"), float("inf")])
@PRECISIONS
def test_what_runs_out_of_range_is_made_again_in_16_bits(
    t2v: Case, precision: Any, factor: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = predict.predict_velocities

    def broken(*arguments: Any, **options: Any) -> list[Tensor]:
        *before, blocks, config = arguments
        blocks = list(blocks)
        velocities = own(*before, blocks, config, **options)
        return [factor * one if isinstance(blocks[0], packed.PackedBlock) else one for one in velocities]

    model = t2v.pipe.transformer
    with t2v.accelerated(precision=precision):
        good = velocity(model)
        monkeypatch.setattr(predict, "predict_velocities", broken)
        with caplog.at_level(logging.WARNING, "wanfast"):
            got = velocity(model)
    assert "8-bit numbers ran out of range" in caplog.text and "high_noise" in caplog.text
    assert got.isfinite().all()
    assert relative_error(got, good) < 2 * LIMIT[precision]  # the same 8-bit weights, multiplied in 16 bits
    assert not torch.equal(got, good)


def test_a_model_without_groups_is_refused_on_a_gpu(t2v: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))  # an RTX 4090's
    config = DiTConfig(
        in_channels=16,
        out_channels=16,
        dim=96,
        ffn_dim=256,
        num_heads=2,
        num_layers=1,
        text_dim=8,
        text_len=0,
        freq_dim=8,
        patch_size=(1, 2, 2),
        eps=1e-6,
    )
    experts = Experts({"single": t2v.pipe.transformer}, "int8", None)
    experts.check_fit(config, torch.device("cpu"))
    with pytest.raises(
        RequestError, match=r"^precision: fp8 and int8 need channels in multiples of 128 on a GPU, got 96"
    ):
        experts.check_fit(config, torch.device("cuda"))
    Experts({"single": t2v.pipe.transformer}, "exact", None).check_fit(config, torch.device("cuda"))


def test_a_transformer_by_hand(t2v: Case, tmp_path: Path) -> None:
    model = t2v.pipe.transformer
    with t2v.accelerated(precision="int8"):
        want = velocity(model)
    model.save_pretrained(tmp_path)
    by_hand = wanfast.WanFastTransformer3DModel.from_pretrained(tmp_path, precision="int8")
    assert torch.equal(velocity(by_hand), want)
    assert by_hand.to("meta").device == torch.device("meta")  # where it computes; the weights stay
    assert {parameter.device.type for parameter in by_hand.parameters()} == {"cpu"}


def test_another_acceleration_leaves_weights_in_host_memory(t2v: Case) -> None:
    """The meta device stands in for a GPU: a weight that was there for a moment would be lost."""
    want = velocity(t2v.pipe.transformer)
    model = t2v.pipe.transformer
    with t2v.accelerated(vram="1GB"):
        model.to("meta")
        wanfast.accelerate(t2v.pipe, precision="int8")
        assert model.device == torch.device("meta")
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        model.to("cpu")
        assert relative_error(velocity(model), want) < LIMIT["int8"]
    assert torch.equal(velocity(model), want)


def test_what_does_not_fit_the_device_is_restored_in_host_memory(t2v: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    want = t2v.run(**CALL)
    wanfast.accelerate(t2v.pipe, precision="int8")
    with monkeypatch.context() as patch:
        patch.setattr(WanTransformer3DModel, "to", full)
        with pytest.raises(torch.OutOfMemoryError):
            wanfast.restore(t2v.pipe)
    assert {type(model) for model in (*t2v.transformers, t2v.pipe.vae)} == {WanTransformer3DModel, AutoencoderKLWan}
    assert torch.equal(t2v.run(**CALL), want)
