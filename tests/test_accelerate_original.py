"""Whatever in a model decides about its result and is not as diffusers makes it is refused by its dotted name."""

import copy
import time
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from reference.pipelines import Case, cast, furthest, make_case
from test_accelerate_lora import lora_state
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import wanfast
from wanfast.diffusers_backend.checks import check_module
from wanfast.errors import RequestError

SAME = 3e-5  # of latents of up to 6, or values in [0, 1]
CALL = {"output_type": "latent"}  # of three steps the last is the low-noise expert's


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {task: make_case(task, tmp_path_factory.mktemp("family")) for task in ("t2v", "ti2v")}


@pytest.fixture
def case(cases: dict[str, Case]) -> Case:
    return copy.deepcopy(cases["t2v"])


def refusal(part: str, module: Any) -> str:
    """What is said of a module, nothing if it is taken."""
    try:
        check_module(part, module)
    except RequestError as error:
        return str(error)
    return ""


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if value is None or isinstance(value, str):
        return "another"
    if isinstance(value, tuple | list):
        return type(value)([*value, 1])
    return not value if isinstance(value, bool) else value * 1.5 + 1


@pytest.fixture(params=["t2v transformer", "t2v vae", "ti2v vae"])
def model(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Any:
    task, part = request.param.split()
    model = getattr(cases[task].pipe, part)
    assert refusal(part, model) == ""
    return model


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """One of each class in each place."""
    found = {(type(layer), name.rpartition(".")[2]): (name, layer) for name, layer in model.named_modules() if name}
    yield from found.values()


def test_every_setting_of_every_kind_of_layer(model: Any) -> None:
    seen = set()
    machinery = {*nn.Module().__dict__, "processor", "gradient_checkpointing"}
    for name, layer in layers(model):
        for attribute in layer.__dict__.keys() - machinery:
            if (type(layer), attribute) in seen:
                continue
            seen.add((type(layer), attribute))
            value = layer.__dict__[attribute]
            layer.__dict__[attribute] = other(value)
            told = refusal("model", model)
            del layer.__dict__[attribute]
            missing = refusal("model", model)
            layer.__dict__[attribute] = value
            assert told.startswith(f"model: {name} must be as diffusers makes it"), (name, attribute, told)
            assert f" {attribute} = " in told, told
            assert f"{name} must be" in missing and f"no {attribute}" in missing, (name, attribute, missing)
    assert len(seen) > 30
    assert refusal("model", model) == ""


def test_every_layer_replaced_missing_or_too_much(model: Any) -> None:
    for name, layer in list(layers(model)):
        place, _, child = name.rpartition(".")
        owner = model.get_submodule(place)
        told = {}
        for what, value in (("gone", None), ("replaced", nn.Identity()), ("derived", type("Mine", (type(layer),), {}))):
            if what == "derived":
                kind, layer.__class__ = type(layer), value
                told[what] = refusal("model", model)
                layer.__class__ = kind
                continue
            if isinstance(layer, nn.Identity) and what == "replaced":
                continue
            owner._modules[child] = value
            told[what] = refusal("model", model)
            owner._modules[child] = layer
        assert all(text.startswith(f"model: {name} must be a {type(layer).__name__} ") for text in told.values()), told
        layer._modules["more"] = nn.Identity()
        assert f"model: {name} must be" in (text := refusal("model", model)) and "a layer more" in text
        del layer._modules["more"]
    assert refusal("model", model) == ""


def test_every_parameter_missing_too_much_or_of_another_shape(model: Any) -> None:
    for name, layer in [("", model), *layers(model)]:
        for own, parameter in list(layer._parameters.items()):
            for value in (None, nn.Parameter(torch.zeros(1, 2, 3))):
                if value is parameter:  # a norm without a weight
                    continue
                layer._parameters[own] = value
                told = refusal("model", model)
                assert told.startswith(f"model: {name or 'it'} must be") and f"parameter {own} of shape " in told
            layer._parameters[own] = parameter
        layer._parameters["more"] = nn.Parameter(torch.zeros(2))
        assert "parameter more of shape [2] instead of none" in refusal("model", model)
        del layer._parameters["more"]
        layer.register_buffer("mask", torch.ones(2))
        told = refusal("model", model)
        assert bool(told) == bool(name), name  # nothing reads a buffer of the whole model
        del layer._buffers["mask"]
        layer._non_persistent_buffers_set.discard("mask")
    assert refusal("model", model) == ""


def no_norm(pipe: Any) -> None:
    pipe.transformer_2.blocks[1].norm1 = nn.Identity()


def other_eps(pipe: Any) -> None:
    pipe.transformer_2.blocks[0].attn1.norm_q.eps = 1e-3


def scaled_table(pipe: Any) -> None:
    pipe.transformer_2.rope.freqs_cos *= 1.001


def shifted_table(pipe: Any) -> None:
    pipe.transformer_2.rope.freqs_sin = pipe.transformer_2.rope.freqs_sin.roll(1, 0)


def fewer_places(pipe: Any) -> None:
    pipe.transformer_2.rope.freqs_sin = pipe.transformer_2.rope.freqs_sin[:64]


def one_more_block(pipe: Any) -> None:
    pipe.transformer_2.blocks.append(copy.deepcopy(pipe.transformer_2.blocks[0]))


def one_block_less(pipe: Any) -> None:
    del pipe.transformer_2.blocks[1]


def swapped_blocks(pipe: Any) -> None:
    pipe.transformer_2.blocks._modules["0"] = pipe.transformer_2.blocks._modules.pop("0")


def an_attribute(pipe: Any) -> None:
    pipe.transformer_2.blocks[0].attn1.scale = 2.0


def a_method(pipe: Any) -> None:
    layer = pipe.transformer_2.blocks[0].ffn
    layer._call_impl = lambda *call: 2 * type(layer)._call_impl(layer, *call)


def a_method_of_another(pipe: Any) -> None:
    layer = pipe.transformer_2.blocks[0].ffn
    layer.forward = MethodType(nn.Identity.forward, layer)


def a_weight_in_front(pipe: Any) -> None:
    layer = pipe.transformer_2.proj_out
    layer.__dict__["weight"] = 2 * layer.weight.detach()


def a_parametrisation(pipe: Any) -> None:
    nn.utils.parametrize.register_parametrization(pipe.transformer_2.proj_out, "weight", nn.Tanh())


def another_config(pipe: Any) -> None:
    pipe.transformer_2.register_to_config(eps=1e-3)


def vae_scale(pipe: Any) -> None:
    pipe.vae.decoder.norm_out.scale *= 1.01


def vae_nearest(pipe: Any) -> None:
    pipe.vae.decoder.up_blocks[0].upsamplers[0].resample[0].mode = "bilinear"


def vae_padding(pipe: Any) -> None:
    """As for videos without a seam at their sides."""
    pipe.vae.decoder.conv_in.padding_mode = "circular"


def vae_activation(pipe: Any) -> None:
    pipe.vae.decoder.nonlinearity = nn.GELU()


def vae_decode(pipe: Any) -> None:
    pipe.vae._decode = lambda z, return_dict=True: AutoencoderKLWan._decode(pipe.vae, 2 * z, return_dict)


ODD: dict[Callable[[Any], None], str] = {
    no_norm: "transformer_2: blocks.1.norm1 must be a FP32LayerNorm as diffusers makes it, .* got a Identity",
    other_eps: "transformer_2: blocks.0.attn1.norm_q must be .* but has eps = 0.001 instead of 1e-06",
    scaled_table: "transformer_2: rope must be .* other values in its table freqs_cos",
    shifted_table: "transformer_2: rope must be .* other values in its table freqs_sin",
    fewer_places: "transformer_2: rope must be .* other values in its table freqs_sin",
    one_more_block: "transformer_2: blocks must be .* a layer 2, which diffusers has not",
    one_block_less: "transformer_2: blocks must be .* no layer 1",
    swapped_blocks: "transformer_2: blocks must be .* its layers in another order",
    an_attribute: "transformer_2: blocks.0.attn1 must be .* scale = 2.0 which diffusers has not",
    a_method: "transformer_2: blocks.0.ffn must be .* _call_impl = ",
    a_method_of_another: "transformer_2: .* blocks.0.ffn has a hook",
    a_weight_in_front: "transformer_2: proj_out must be .* weight = a Tensor instead of",
    a_parametrisation: "transformer_2: proj_out must be a Linear as diffusers makes it, .* got a ParametrizedLinear",
    another_config: "transformer_2: blocks.0.norm1 must be .* eps = 1e-06 instead of 0.001",
    vae_scale: "vae: decoder.norm_out must be .* scale = ",
    vae_nearest: r"vae: decoder.up_blocks.0.upsamplers.0.resample.0 must be .* mode = 'bilinear' instead of 'nearest-e",
    vae_padding: "vae: decoder.conv_in must be .* padding_mode = 'circular' instead of 'zeros'",
    vae_activation: "vae: decoder.nonlinearity must be a SiLU as diffusers makes it, .* got a GELU",
    vae_decode: "vae: its _decode must be diffusers' own",
}


@pytest.mark.parametrize("change", ODD, ids=lambda change: change.__name__)
def test_what_people_change(case: Case, change: Callable[[Any], None]) -> None:
    change(case.pipe)
    with pytest.raises(RequestError, match=f"^{ODD[change]}"):
        wanfast.accelerate(case.pipe)
    assert type(case.pipe.transformer) is WanTransformer3DModel  # nothing was changed
    assert type(case.pipe.vae) is AutoencoderKLWan


def test_a_patched_method_of_the_vae(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    own = AutoencoderKLWan._decode
    monkeypatch.setattr(AutoencoderKLWan, "_decode", lambda self, *call, **more: own(self, *call, **more))
    with pytest.raises(RequestError, match=r"^vae: its _decode must be diffusers' own"):
        wanfast.accelerate(case.pipe)


def test_a_patched_constructor(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """It might have changed the original too."""
    own = WanAttention.__init__
    monkeypatch.setattr(WanAttention, "__init__", lambda self, *call, **more: own(self, *call, **more))
    with pytest.raises(RequestError, match=r"^transformer: its layers must compute .* put into WanAttention"):
        wanfast.accelerate(case.pipe)


def test_hooks_on_all_modules(case: Case) -> None:
    handle = register_module_forward_hook(lambda module, inputs, output: None)
    try:
        with pytest.raises(RequestError, match=r"^transformer: there must be no hooks on all modules"):
            wanfast.accelerate(case.pipe)
    finally:
        handle.remove()
    wanfast.accelerate(case.pipe)


def test_a_lora_is_not_taken_for_a_change_but_what_is_done_to_it_is(case: Case) -> None:
    case.pipe.load_lora_weights(lora_state(case, 1), adapter_name="one")
    layer = case.pipe.transformer.blocks[0].attn1.to_q
    layer.base_layer.in_features += 1
    with pytest.raises(RequestError, match=r"^transformer: blocks\.0\.attn1\.to_q must be .* in_features = "):
        wanfast.accelerate(case.pipe)
    layer.base_layer.in_features -= 1
    handle = layer.lora_A["one"].register_forward_hook(print)
    with pytest.raises(RequestError, match=r"^transformer: .*blocks\.0\.attn1\.to_q\.lora_A\.one has a hook"):
        wanfast.accelerate(case.pipe)
    handle.remove()
    layer.lora_B["one"].__class__ = type("Mine", (nn.Linear,), {"__module__": "mine"})
    with pytest.raises(RequestError, match=r"^transformer: blocks\.0\.attn1\.to_q\.lora_B\.one must be"):
        wanfast.accelerate(case.pipe)
    layer.lora_B["one"].__class__ = nn.Linear
    wanfast.accelerate(case.pipe)


def offload_and_stop(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.remove_all_hooks()


def load_and_unload(pipe: Any) -> None:
    state = {f"transformer.blocks.0.attn1.to_q.lora_{ab}.weight": torch.ones(shape) for ab, shape in SHAPES.items()}
    pipe.load_lora_weights(state, adapter_name="one")
    pipe.unload_lora_weights()


SHAPES: dict[str, tuple[int, int]] = {}


def fuse_and_unfuse(pipe: Any) -> None:
    pipe.transformer.fuse_qkv_projections()
    pipe.transformer.unfuse_qkv_projections()


def train(pipe: Any) -> None:
    pipe.transformer.enable_gradient_checkpointing()
    pipe.transformer.train()


def note(pipe: Any) -> None:
    pipe.transformer.blocks[0]._seen_by = "a library"
    pipe.transformer.mine = pipe.vae.mine = "what its owner calls it"


def same_values(pipe: Any) -> None:
    pipe.transformer.blocks[0].norm1.eps = float(str(pipe.transformer.config.eps))
    pipe.transformer.rope.freqs_cos = pipe.transformer.rope.freqs_cos.clone()


def one_block_less_by_config(pipe: Any) -> None:
    del pipe.transformer.blocks[1]
    pipe.transformer.register_to_config(num_layers=1)


def the_same_block_twice(pipe: Any) -> None:
    pipe.transformer.blocks[1] = pipe.transformer.blocks[0]


def the_same_weight_twice(pipe: Any) -> None:
    pipe.transformer.blocks[1].ffn.net[2].weight = pipe.transformer.blocks[0].ffn.net[2].weight


USUAL = [
    offload_and_stop,
    load_and_unload,
    fuse_and_unfuse,
    train,
    note,
    same_values,
    one_block_less_by_config,
    the_same_block_twice,
    the_same_weight_twice,
]


@pytest.mark.parametrize("change", USUAL, ids=lambda change: change.__name__)
def test_what_changes_no_result_or_is_computed(case: Case, change: Callable[[Any], None]) -> None:
    out, inside = case.pipe.transformer.blocks[0].attn1.to_q.weight.shape
    SHAPES.update(A=(2, inside), B=(out, 2))
    case.run(**CALL)
    change(case.pipe)
    want = case.run(**CALL)
    with case.accelerated():
        assert furthest(case.run(**CALL), want) <= SAME


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_table_that_a_cast_has_rounded(case: Case, dtype: torch.dtype) -> None:
    """As `pipe.to(dtype)` did in diffusers 0.35; back in fp32 it stays rounded."""
    for model in case.transformers:
        table = model.rope.freqs_cos
        model.rope.to(dtype)
        cast(model, dtype)
        assert refusal("transformer", model) == ""
        model.rope.to(torch.float32)
        assert not torch.equal(model.rope.freqs_cos, table)
        assert refusal("transformer", model) == ""


def test_no_number_is_drawn(case: Case) -> None:
    """Scripts seed torch and let the pipeline draw."""
    case.pipe.transformer.register_to_config(_new="so that its original is made anew")
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    wanfast.accelerate(case.pipe)
    assert torch.equal(torch.rand(2), want)


def test_it_takes_no_time_at_full_size() -> None:
    """Sizes of A14B, on the meta device: once to make the original, and at each change of the weights thereafter."""
    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=40)
    clocks = [time.thread_time()]
    for _ in range(3):
        model.rope = type(model.rope)(128, (1, 2, 2), 1024)
        clocks.append(time.thread_time())
        assert refusal("transformer", model) == ""
        clocks.append(time.thread_time())
    assert clocks[2] - clocks[1] < 2
    assert min(clocks[4] - clocks[3], clocks[6] - clocks[5]) < 0.2
