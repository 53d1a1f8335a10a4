"""What people do with a Wan pipeline of diffusers beside calling it works on an accelerated one."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from reference.dit import diffusers_dit, small_config
from reference.pipelines import USES, Case, cast, furthest, make_case
from torch import Tensor, nn

import wanfast
from wanfast.errors import RequestError

SAME = 3e-5  # of latents of up to 4
CALL = {"output_type": "latent"}  # of three steps the last is the low-noise expert's


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {use: make_case(use, tmp_path_factory.mktemp("family")) for use in USES}


@pytest.fixture
def t2v(cases: dict[str, Case]) -> Case:
    return cases["t2v"]


@pytest.fixture
def model() -> Iterator[Any]:
    """A transformer of its own class, as a user makes it by hand."""
    model = diffusers_dit(small_config("ti2v"))
    yield model


def fast(model: Any) -> Any:
    """The same transformer through from_pretrained's class."""
    twin = copy.deepcopy(model)
    twin.__class__ = wanfast.WanFastTransformer3DModel
    return twin


def inputs(batch: int = 1, *, frames: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 48, frames, 4, 6, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 9, 24, generator=generator),
    }


TIMESTEPS: dict[str, Tensor] = {
    "one": torch.tensor([500]),
    "of a batch": torch.tensor([500.5, 20.0]),
    "of a batch, the same": torch.tensor([500, 500]),
    "per token, the same": torch.full((1, 18), 321.0),
    "per token, the first frame's own": torch.cat([torch.zeros(1, 6), torch.full((1, 12), 321.0)], dim=1),
    "per token, of a batch": torch.cat([torch.tensor([[0.0], [5.0]]).expand(2, 6), torch.full((2, 12), 9.0)], dim=1),
    "in 16 bits": torch.tensor([500], dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", TIMESTEPS)
def test_timesteps(model: Any, name: str) -> None:
    timestep = TIMESTEPS[name]
    with torch.no_grad():
        want = model(timestep=timestep, **inputs(len(timestep))).sample
    got = fast(model)(timestep=timestep, **inputs(len(timestep))).sample
    assert furthest(got, want) <= 10 * SAME
    assert want.std() > 0.1


def test_one_frame_with_timesteps_per_token(model: Any) -> None:
    timestep = torch.full((1, 6), 7.0)
    with torch.no_grad():
        want = model(timestep=timestep, return_dict=False, **inputs(frames=1))[0]
    assert furthest(fast(model)(timestep=timestep, return_dict=False, **inputs(frames=1))[0], want) <= 10 * SAME


@pytest.mark.parametrize("arguments", [("cond",), ("uncond",)], ids=str)
def test_cache_context_in_both_signatures(model: Any, arguments: tuple[str]) -> None:
    with fast(model).cache_context(*arguments), fast(model).cache_context(*arguments, step_index=1, sigma=0.5):
        pass


def test_the_result_is_fp32_without_a_gradient(model: Any) -> None:
    model.to(torch.bfloat16)
    arguments = {name: tensor.bfloat16() for name, tensor in inputs().items()}
    sample = fast(model)(timestep=torch.tensor([5]), **arguments).sample
    assert sample.dtype == torch.float32 and not sample.requires_grad


def test_autocast_and_inference_mode_change_nothing(model: Any) -> None:
    twin = fast(model)
    want = twin(timestep=torch.tensor([5]), **inputs()).sample
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert furthest(twin(timestep=torch.tensor([5]), **inputs()).sample, want) == 0


def write_to_a_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model.blocks[0].attn1.to_q.weight.mul_(-2)


def write_to_a_norm(model: nn.Module) -> None:
    with torch.no_grad():
        model.blocks[1].norm2.weight.mul_(3)


def replace_a_parameter(model: nn.Module) -> None:
    model.proj_out.weight = nn.Parameter(model.proj_out.weight * 2)


def replace_data(model: nn.Module) -> None:
    model.scale_shift_table.data = model.scale_shift_table.data + 1


def load_state(model: nn.Module) -> None:
    model.load_state_dict({name: tensor * 1.2 for name, tensor in model.state_dict().items()})


def replace_a_layer(model: nn.Module) -> None:
    layer = nn.Linear(48, 48)
    layer.load_state_dict({name: tensor * 1.5 for name, tensor in model.blocks[0].attn2.to_v.state_dict().items()})
    model.blocks[0].attn2.to_v = layer


def round_to_16_bits(model: nn.Module) -> None:
    cast(model, torch.bfloat16)
    cast(model, torch.float32)


CHANGES: list[Callable[[Any], None]] = [
    write_to_a_weight,
    write_to_a_norm,
    replace_a_parameter,
    replace_data,
    load_state,
    replace_a_layer,
    round_to_16_bits,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("vram", [None, "1GB"])
def test_changes_of_the_module_count(model: Any, change: Callable[[Any], None], vram: str | None) -> None:
    twin = fast(model)._prepared("auto", vram)
    arguments = {"timestep": torch.tensor([700]), **inputs()}
    before = twin(**arguments).sample
    change(model)
    change(twin)
    with torch.no_grad():
        want = model(**arguments).sample
    assert furthest(twin(**arguments).sample, want) <= 10 * SAME
    assert furthest(want, before) > 1e-3


@pytest.mark.parametrize("vram", [None, "1KB"])
@pytest.mark.parametrize(
    "name", ["blocks.0.attn1.norm_q.weight", "condition_embedder.time_proj.weight", "proj_out.bias"]
)
def test_writes_to_what_is_copied_count(model: Any, name: str, vram: str | None) -> None:
    """In 16 bits these are copied into fp32; what was copied once must not be used for ever."""
    cast(model, torch.bfloat16)
    twin = fast(model)._prepared("auto", vram)
    arguments = {"timestep": torch.tensor([700]), **inputs()}
    before = twin(**arguments).sample
    with torch.no_grad():
        for changed in (model, twin):
            changed.get_parameter(name).mul_(3)
    got = twin(**arguments).sample
    assert furthest(got, fast(model)(**arguments).sample) == 0
    assert furthest(got, before) > 1e-3


def test_a_cast_is_followed(model: Any) -> None:
    twin = fast(model)
    want = twin(timestep=torch.tensor([5]), **inputs()).sample
    got = twin.to(torch.bfloat16)(timestep=torch.tensor([5]), **inputs()).sample
    assert next(twin._wanfast[0].open("single", torch.device("cpu")).blocks()).ffn_up.weight.dtype == torch.bfloat16
    assert 1e-4 < furthest(got, want) < 0.1


def test_a_copy_has_its_own_weights(model: Any) -> None:
    twin = fast(model)
    arguments = {"timestep": torch.tensor([5]), **inputs()}
    want = twin(**arguments).sample
    other = copy.deepcopy(twin)
    write_to_a_weight(other)
    assert furthest(other(**arguments).sample, want) > 1e-3
    assert furthest(twin(**arguments).sample, want) == 0


@pytest.mark.parametrize("vram", [1, "1KB", "100KB", "1GB"])
def test_a_bound_on_memory_changes_nothing(t2v: Case, vram: int | str) -> None:
    with t2v.accelerated():
        want = t2v.run(**CALL)
    with t2v.accelerated(vram=vram):
        assert furthest(t2v.run(**CALL), want) == 0
        assert furthest(t2v.run(**CALL), want) == 0


def test_under_a_bound_weights_stay_in_host_memory(t2v: Case) -> None:
    """The meta device stands in for a GPU: had a weight been moved there, it would be lost."""
    t2v = copy.deepcopy(t2v)
    want = t2v.run(**CALL)
    with t2v.accelerated(vram="1GB"):
        model = t2v.pipe.transformer
        for move in (lambda: model.to("meta"), lambda: model.to(device="meta"), lambda: model.to(torch.device("meta"))):
            assert move() is model
            assert model.device == torch.device("meta")
            assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
            assert model.cpu().device == torch.device("cpu")
        assert model.to(torch.bfloat16).dtype == torch.bfloat16
        model.to(torch.float32)
        assert furthest(t2v.run(**CALL), want) < 0.1
    assert t2v.pipe.transformer.device == torch.device("cpu")


@pytest.mark.parametrize("vram", ["", "much", 0, -1])
def test_a_bound_must_be_memory(t2v: Case, vram: Any) -> None:
    with pytest.raises(RequestError, match=r"^vram: must be an amount of memory"):
        wanfast.accelerate(t2v.pipe, vram=vram)


@pytest.mark.parametrize("order", ["before", "after", "before, and removed"])
@pytest.mark.parametrize("vram", [None, "1GB"])
def test_model_offload(t2v: Case, order: str, vram: str | None) -> None:
    want = t2v.run(**CALL)
    if order.startswith("before"):
        t2v.pipe.enable_model_cpu_offload(device="cpu")
    with t2v.accelerated(vram=vram):
        if order == "after":
            t2v.pipe.enable_model_cpu_offload(device="cpu")
        assert hasattr(t2v.pipe.transformer, "_hf_hook")
        if order.endswith("removed"):
            t2v.pipe.remove_all_hooks()
        assert furthest(t2v.run(**CALL), want) <= SAME
        assert t2v.pipe.transformer._wanfast[0]._held  # it was wanfast that ran
    assert furthest(t2v.run(**CALL), want) == 0
    t2v.pipe.remove_all_hooks()
    assert furthest(t2v.run(**CALL), want) == 0
    with t2v.accelerated():
        assert furthest(t2v.run(**CALL), want) <= SAME


def test_components_shared_with_another_pipeline(t2v: Case) -> None:
    want = t2v.run(**CALL)
    with t2v.accelerated():
        other = WanPipeline(**t2v.pipe.components, boundary_ratio=t2v.pipe.config.boundary_ratio)
        other.set_progress_bar_config(disable=True)
        assert furthest(Case(t2v.family, other, t2v.arguments).run(**CALL), want) <= SAME


def test_another_scheduler(t2v: Case) -> None:
    original = t2v.pipe.scheduler
    t2v.pipe.scheduler = UniPCMultistepScheduler.from_config(original.config, flow_shift=1.0)
    want = t2v.run(**CALL)
    with t2v.accelerated():
        assert furthest(t2v.run(**CALL), want) <= SAME
    t2v.pipe.scheduler = original


def test_without_a_vae(t2v: Case) -> None:
    want = t2v.run(**CALL)
    t2v = copy.deepcopy(t2v)
    t2v.pipe.vae = None
    with t2v.accelerated():
        assert furthest(t2v.run(**CALL), want) <= SAME


@pytest.mark.parametrize("use", ["t2v", "ti2v"])
class TestVAE:
    def video(self, case: Case, batch: int = 2, side: int = 32) -> Tensor:
        return torch.rand(batch, 3, 5, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def latents(self, case: Case, batch: int = 2, side: int = 4) -> Tensor:
        shape = (batch, case.pipe.vae.config.z_dim, 3, side, side)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize("read", ["mode", "sample", "logvar", "mean", "kl"])
    def test_encode(self, cases: dict[str, Case], use: str, read: str) -> None:
        case, vae = cases[use], cases[use].pipe.vae

        def encode() -> Tensor:
            with torch.no_grad():
                found = getattr(vae.encode(self.video(case)).latent_dist, read)
            torch.manual_seed(0)
            value: Tensor = found() if callable(found) else found
            return value

        want = encode()
        with case.accelerated():
            got = encode()
        scale = float(want.abs().max())
        assert furthest(got / scale, want / scale) <= SAME

    @pytest.mark.parametrize("slicing", [False, True])
    def test_decode(self, cases: dict[str, Case], use: str, slicing: bool) -> None:
        case, vae = cases[use], cases[use].pipe.vae
        with torch.no_grad():
            want = vae.decode(self.latents(case)).sample
        with case.accelerated():
            if slicing:
                vae.enable_slicing()
            assert furthest(vae.decode(self.latents(case)).sample, want) <= SAME
            assert furthest(vae.decode(self.latents(case), return_dict=False)[0], want) <= SAME
            vae.disable_slicing()

    def test_tiling_is_diffusers_own(self, cases: dict[str, Case], use: str) -> None:
        case, vae = cases[use], cases[use].pipe.vae
        if use == "ti2v" and not hasattr(type(vae), "_skip_keys"):
            pytest.skip("diffusers before 0.36 cannot tile this VAE")
        latents = self.latents(case, 1, 8)

        def decode() -> np.ndarray:
            vae.enable_tiling(64, 64, 48, 48)
            with torch.no_grad():
                frames: np.ndarray = vae.decode(latents).sample.numpy()
            vae.disable_tiling()
            return frames

        want = decode()
        with case.accelerated():
            np.testing.assert_array_equal(decode(), want)

    def test_16_bits(self, cases: dict[str, Case], use: str) -> None:
        case = copy.deepcopy(cases[use])
        vae = case.pipe.vae.to(torch.bfloat16)
        with case.accelerated():
            frames = vae.decode(self.latents(case).bfloat16()).sample
        assert frames.dtype == torch.bfloat16
        with torch.no_grad():
            truth = vae.float().decode(self.latents(case).bfloat16().float()).sample
        assert furthest(frames, truth) < 0.1


def test_model_made_by_hand(t2v: Case, tmp_path: Path) -> None:
    want = t2v.run(**CALL)
    t2v.pipe.save_pretrained(tmp_path / "saved")
    models = {
        name: wanfast.WanFastTransformer3DModel.from_pretrained(tmp_path / "saved", subfolder=name, vram="1GB")
        for name in ("transformer", "transformer_2")
    }
    pipe = WanPipeline.from_pretrained(tmp_path / "saved", **models)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer is models["transformer"]
    assert furthest(Case(t2v.family, pipe, t2v.arguments).run(**CALL), want) <= 10 * SAME
    pipe.save_pretrained(tmp_path / "again")
    again = WanPipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    assert furthest(Case(t2v.family, again, t2v.arguments).run(**CALL), want) <= 10 * SAME
