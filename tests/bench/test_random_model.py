"""Random models: the sizes of a real one, the memory of one block, and a video that is computed from it."""

import pytest
import torch
from reference.tiny import random_tiny

from wanfast.bench import random_model as module
from wanfast.bench.random_model import random_model, tiny_of
from wanfast.checkpoint.bind import check_names
from wanfast.config import MODELS, ModelConfig
from wanfast.dit.weights import expected_tensors as dit_tensors
from wanfast.dit.weights import is_fp32
from wanfast.generation import Inputs, draw_noise, generate_frames
from wanfast.loaded import LoadedModel
from wanfast.model import open_model
from wanfast.plan import make_plan
from wanfast.request import Request
from wanfast.text.weights import expected_tensors as text_tensors
from wanfast.vae.sizes import expected_tensors as vae_tensors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return open_model(random_tiny(tmp_path_factory.mktemp("tiny") / "wan-tiny")).config


@pytest.mark.parametrize("name", list(MODELS))
def test_a_full_size_model_has_every_tensor_and_draws_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_draw", lambda *_: pytest.fail("drawn"))
    config = MODELS[name]
    model = random_model(config, torch.bfloat16, is_shared=True)
    assert list(model.experts) == [expert.name for expert in config.experts]
    for reader in model.experts.values():
        check_names(reader, dit_tensors(config.dit), part="DiT")
        assert reader.dtype("blocks.3.ffn.0.weight") == torch.bfloat16
        assert reader.dtype("blocks.3.norm3.weight") == reader.dtype("head.head.weight") == torch.float32
    check_names(model.vae, vae_tensors(config.vae), part="VAE")
    check_names(model.text, text_tensors(config.text), part="text encoder")
    assert model.found_at is None and all(not reader.path.exists() for reader in model.readers)


def test_blocks_share_their_memory_and_nothing_else_does(tiny: ModelConfig) -> None:
    model = random_model(tiny, torch.bfloat16, is_shared=True)
    high, low = model.experts["high_noise"], model.experts["low_noise"]

    def place(reader: object, name: str) -> int:
        tensor = reader.load(name)  # type: ignore[attr-defined]
        return int(tensor.data_ptr())

    assert (
        place(high, "blocks.0.ffn.0.weight")
        == place(high, "blocks.3.ffn.0.weight")
        == place(low, "blocks.1.ffn.0.weight")
    )
    inside = [name for name in high.names() if name.startswith("blocks.2.")]
    assert len({place(high, name) for name in inside}) == len(inside) == 27
    table = model.text.load("token_embedding.weight")
    assert isinstance(table, torch.Tensor)
    assert (tuple(table.shape), table.stride(0)) == ((tiny.text.vocab_size, tiny.text.dim), 0)


@pytest.mark.parametrize("is_shared", [True, False])
def test_values_are_of_healthy_size(is_shared: bool, tiny: ModelConfig) -> None:
    reader = random_model(tiny, torch.float32, is_shared=is_shared).experts["low_noise"]

    def values(name: str) -> torch.Tensor:
        tensor = reader.load(name)
        assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32
        return tensor

    assert float(values("blocks.1.ffn.2.weight").std()) == pytest.approx(tiny.dit.ffn_dim**-0.5, rel=0.02)
    assert float(values("blocks.1.norm3.weight").mean()) == pytest.approx(1, abs=0.03)
    assert float(values("blocks.1.self_attn.q.bias").std()) == pytest.approx(0.1, rel=0.2)


def test_dtypes_are_those_of_the_precision(tiny: ModelConfig) -> None:
    for is_shared in (True, False):
        reader = random_model(tiny, torch.bfloat16, is_shared=is_shared).experts["high_noise"]
        for name in reader.names():
            tensor = reader.load(name)
            assert isinstance(tensor, torch.Tensor)
            assert tensor.dtype == (torch.float32 if is_fp32(name) else torch.bfloat16) == reader.dtype(name), name


@pytest.mark.parametrize("precision", ["fp32", "exact"])
def test_a_shared_model_makes_a_video(precision: str, tiny: ModelConfig) -> None:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = random_model(tiny, dtype, is_shared=True)
    loaded = LoadedModel(model, precision=precision, device=torch.device("cpu"))  # type: ignore[arg-type]
    request = Request("a ball", width=32, height=32, num_frames=5, num_inference_steps=2, seed=0)
    plan = make_plan(model.config, request, precision=loaded.precision)
    inputs = Inputs(latents=draw_noise(plan)[0])
    first, again = (torch.cat(list(generate_frames(loaded, plan, inputs))) for _ in range(2))
    assert first.shape == (5, 32, 32, 3) and torch.equal(first, again)
    assert first.float().std() > 1


@pytest.mark.parametrize("name", list(MODELS))
def test_a_small_one_of_a_family_is_still_of_it(name: str, tiny: ModelConfig) -> None:
    row = MODELS[name]
    small = tiny_of(row, tiny)
    assert (small.task, small.experts, small.boundary, small.shift) == (row.task, row.experts, row.boundary, row.shift)
    assert (small.dit.in_channels, small.dit.out_channels) == (row.dit.in_channels, row.dit.out_channels)
    assert (small.vae.version, small.vae.z_dim, small.vae.patch_size) == (
        row.vae.version,
        row.vae.z_dim,
        row.vae.patch_size,
    )
    assert small.dit.dim == tiny.dit.dim and small.vae.encoder_dim == 16
