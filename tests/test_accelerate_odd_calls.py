"""Odd things that people do to an accelerated pipeline give what they give in diffusers, or are refused by name."""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from reference.pipelines import USES, Case, furthest, make_case
from test_accelerate_lora import lora_state
from torch import Tensor

import wanfast
from wanfast.errors import RequestError

SAME = 3e-5  # of latents of up to 6, or values in [0, 1]
CALL = {"output_type": "latent"}  # of three steps the last is the low-noise expert's


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {use: make_case(use, tmp_path_factory.mktemp("family")) for use in USES}


@pytest.fixture
def case(cases: dict[str, Case]) -> Case:
    return copy.deepcopy(cases["t2v"])


@pytest.mark.parametrize("use", ["i2v", "ti2v", "ti2v with a picture"])
@pytest.mark.parametrize("what", ["two videos", "two prompts", "no guidance"])
def test_several_videos_of_every_family(cases: dict[str, Case], use: str, what: str) -> None:
    case = cases[use]
    image = case.arguments.get("image")
    changes: dict[str, Any] = {
        "two videos": {"num_videos_per_prompt": 2},
        "two prompts": {"prompt": ["a cat", "a red dog"], "negative_prompt": ["", "blurry"]},
        "no guidance": {"guidance_scale": 1.0},
    }[what]
    if image is not None and what == "two prompts":
        changes["image"] = [image, image.transpose(0)]
    try:
        want = case.run(**CALL, **changes)
    except (ValueError, RuntimeError) as error:  # what diffusers does not take, it still does not take
        with case.accelerated(), pytest.raises(type(error)):
            case.run(**CALL, **changes)
        return
    with case.accelerated():
        assert furthest(case.run(**CALL, **changes), want) <= SAME


def test_a_last_image_of_ti2v(cases: dict[str, Case]) -> None:
    case = cases["ti2v with a picture"]
    last = case.arguments["image"].transpose(0)
    want = case.run(**CALL, last_image=last)
    with case.accelerated():
        assert furthest(case.run(**CALL, last_image=last), want) <= SAME


def test_a_copied_pipeline_is_accelerated_by_itself(case: Case) -> None:
    want = case.run(**CALL)
    wanfast.accelerate(case.pipe)
    case.run(**CALL)
    twin = copy.deepcopy(case)
    wanfast.restore(case.pipe)
    assert isinstance(twin.pipe.transformer, wanfast.WanFastTransformer3DModel)
    assert furthest(twin.run(**CALL), want) <= SAME
    wanfast.restore(twin.pipe)
    assert furthest(twin.run(**CALL), want) == furthest(case.run(**CALL), want) == 0
    with pytest.raises(RequestError, match=r"^pipe: must have been given to wanfast.accelerate"):
        wanfast.restore(case.pipe)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"precision": "exact"}, {"precision": "fp32"}),
        ({"vram": "1KB"}, {}),
        ({}, {"vram": "1KB"}),
    ],
    ids=str,
)
def test_of_two_accelerates_the_last_counts(case: Case, first: dict[str, Any], second: dict[str, Any]) -> None:
    want = case.run(**CALL)
    wanfast.accelerate(case.pipe, **first)
    case.run(**CALL)
    wanfast.accelerate(case.pipe, **second)
    assert furthest(case.run(**CALL), want) <= SAME
    assert case.pipe.transformer._wanfast[0].budget == (None if "vram" not in second else 1000)
    wanfast.restore(case.pipe)
    assert furthest(case.run(**CALL), want) == 0


def test_a_transformer_put_in_later_is_diffusers_own(case: Case) -> None:
    other = copy.deepcopy(case.pipe.transformer_2)
    with torch.no_grad():
        other.proj_out.weight.mul_(0.5)
    before = case.run(**CALL)
    wanfast.accelerate(case.pipe)
    case.run(**CALL)
    case.pipe.transformer_2 = other
    got = case.run(**CALL)
    wanfast.restore(case.pipe)
    assert furthest(case.run(**CALL), got) <= SAME < furthest(before, got)


def test_the_low_noise_expert_alone(case: Case) -> None:
    case.pipe.register_modules(transformer=None)
    case.pipe.register_to_config(boundary_ratio=1.0)
    want = case.run(**CALL)
    with case.accelerated():
        assert furthest(case.run(**CALL), want) <= SAME


def test_another_pipeline_made_of_it(cases: dict[str, Case]) -> None:
    """diffusers' from_pipe takes over only what is of its own class, so the three modules are named."""
    case, wanted = cases["ti2v"], cases["ti2v with a picture"]
    others: dict[str, Any] = {"expand_timesteps": True, "image_encoder": None, "image_processor": None}
    with case.accelerated():
        with pytest.raises(ValueError, match="expected"):
            WanImageToVideoPipeline.from_pipe(case.pipe, **others)
        modules = {name: getattr(case.pipe, name) for name in ("transformer", "transformer_2", "vae")}
        pipe = WanImageToVideoPipeline.from_pipe(case.pipe, **others, **modules)
        pipe.set_progress_bar_config(disable=True)
        got = Case(case.family, pipe, wanted.arguments).run(**CALL)
    assert furthest(got, wanted.run(**CALL)) <= SAME


def load_another(case: Case) -> None:
    case.pipe.load_lora_weights(lora_state(case, 2), adapter_name="two", load_into_transformer_2=True)


def weigh(case: Case) -> None:
    case.pipe.transformer.set_adapters(["one"], [0.2])


def write(case: Case) -> None:
    with torch.no_grad():
        case.pipe.transformer_2.blocks[0].ffn.net[2].weight.mul_(-1)


def put_other_data(case: Case) -> None:
    weight = case.pipe.transformer_2.blocks[0].ffn.net[2].weight
    weight.data = weight.data * -1


def transpose(case: Case) -> None:
    weight = case.pipe.transformer_2.blocks[0].attn1.to_v.weight
    weight.data = weight.data.t()  # begins at the same address


def restore(case: Case) -> None:
    if isinstance(case.pipe.transformer, wanfast.WanFastTransformer3DModel):
        wanfast.restore(case.pipe)


@pytest.mark.parametrize(
    ("change", "step"),
    [(load_another, 1), (weigh, 0), (write, 1), (put_other_data, 1), (transpose, 1), (restore, 0), (restore, 1)],
)
def test_a_callback_that_changes_the_model(case: Case, change: Callable[[Case], None], step: int) -> None:
    def run(case: Case, *, changed: bool) -> Any:
        case = copy.deepcopy(case)
        if isinstance(case.pipe.transformer, wanfast.WanFastTransformer3DModel):
            case.run(**CALL)  # both experts have been looked at before they change

        def callback(pipe: Any, at: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if changed and at == step:
                change(case)
            return {}

        return case.run(**CALL, callback_on_step_end=callback)

    case.pipe.load_lora_weights(lora_state(case, 1), adapter_name="one")
    want, unchanged = run(case, changed=True), run(case, changed=False)
    wanfast.accelerate(case.pipe)
    assert furthest(run(case, changed=True), want) <= 3 * SAME
    assert (furthest(want, unchanged) > 1e-3) == (change is not restore)


def own_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As scripts have it that skip steps: the model's forward, but for something."""
    return WanTransformer3DModel.forward(self, *args, **kwargs)


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_a_replaced_forward(case: Case, is_offloaded: bool) -> None:
    case.pipe.transformer.forward = MethodType(own_forward, case.pipe.transformer)
    if is_offloaded:
        case.pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(RequestError, match=r"^transformer: its forward must be diffusers' own"):
        wanfast.accelerate(case.pipe)
    assert type(case.pipe.transformer) is WanTransformer3DModel


class ScaledLinear(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


def test_a_layer_of_a_class_of_ones_own(case: Case) -> None:
    case.pipe.transformer.blocks[0].attn1.to_v.__class__ = ScaledLinear
    with pytest.raises(RequestError, match=r"^transformer: blocks\.0\.attn1\.to_v must be a Linear .* a ScaledLinear"):
        wanfast.accelerate(case.pipe)


PATCHED = {
    "model": (WanTransformer3DModel, "forward", "^transformer: its forward must be diffusers' own"),
    "block": (
        WanTransformerBlock,
        "forward",
        "^transformer: its layers .* another method .* WanTransformerBlock",
    ),
    "attention": (WanAttnProcessor, "__call__", "^transformer: .* must have diffusers' own attention"),
}


@pytest.mark.parametrize("name", PATCHED)
def test_a_patched_class(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, method, message = PATCHED[name]
    own = getattr(kind, method)

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    patched.__module__ = own.__module__  # as functools.wraps does
    monkeypatch.setattr(kind, method, patched)
    with pytest.raises(RequestError, match=message):
        wanfast.accelerate(case.pipe)
    monkeypatch.undo()
    wanfast.accelerate(case.pipe)


def test_torch_compile(case: Case) -> None:
    with case.accelerated():
        for module in (case.pipe.transformer, case.pipe.vae):
            with pytest.raises(RequestError, match=r"^torch.compile: must not be called on an accelerated module"):
                torch.compile(module, backend="eager")
    assert torch.compile(case.pipe.transformer, backend="eager") is not case.pipe.transformer


def test_moves_and_casts_of_the_pipeline(case: Case) -> None:
    want = case.run(**CALL)
    with case.accelerated():
        assert furthest(case.pipe.to("cpu") and case.run(**CALL), want) <= SAME
        case.pipe.to(torch.float64)
        with pytest.raises(RequestError, match=r"weights must be float32, .* as torch.float64"):
            case.run(**CALL)
        case.pipe.to(torch.float32)
        assert furthest(case.run(**CALL), want) <= SAME


def test_tiles_of_the_encoder(cases: dict[str, Case]) -> None:
    case = copy.deepcopy(cases["i2v"])
    changes = {"height": 64, "width": 48, "image": case.arguments["image"].resize((48, 64))}
    case.pipe.vae.enable_tiling(32, 32, 24, 24)
    want = case.run(**changes)
    case.pipe.vae.disable_tiling()
    with case.accelerated():
        case.pipe.vae.enable_tiling(32, 32, 24, 24)
        assert furthest(case.run(**changes), want) <= SAME
    assert furthest(case.run(**changes), want) == 0


def test_hooks_on_the_whole_module(case: Case) -> None:
    seen: list[str] = []
    case.pipe.transformer.register_forward_pre_hook(lambda *call: seen.append("before"))
    case.pipe.transformer.register_forward_hook(lambda module, arguments, output: (output[0] * 0.5,))
    want, count = case.run(**CALL), len(seen)
    with case.accelerated():
        assert furthest(case.run(**CALL), want) <= SAME
    assert len(seen) == 2 * count > 0


def test_fused_before_and_taken_out_after(case: Case) -> None:
    plain = case.run(**CALL)
    case.pipe.load_lora_weights(lora_state(case, 1), adapter_name="one")
    case.pipe.fuse_lora(components=["transformer"])
    want = case.run(**CALL)
    wanfast.accelerate(case.pipe)
    assert furthest(case.run(**CALL), want) <= 2 * SAME
    case.pipe.unfuse_lora(components=["transformer"])
    case.pipe.unload_lora_weights()
    assert furthest(case.run(**CALL), plain) <= 10 * SAME < 0.01 < furthest(want, plain)
