"""LoRAs that diffusers loads into an accelerated pipeline do what they do in diffusers."""

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from reference.pipelines import Case, cast, furthest, make_case
from torch import Tensor

from wanfast.errors import RequestError

SAME = 2e-5
CALL = {"output_type": "latent"}  # of three steps the last is the low-noise expert's


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case("t2v", tmp_path_factory.mktemp("family"))


@pytest.fixture
def case(shared: Case) -> Iterator[Case]:
    yield shared
    shared.pipe.unload_lora_weights()


LAYERS = ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ffn.net.0.proj", "ffn.net.2")


def lora_state(case: Case, seed: int, *, layers: tuple[str, ...] = LAYERS, bias: bool = False) -> dict[str, Tensor]:
    """A file's tensors, strong enough to change the video."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in case.pipe.transformer.named_modules():
        if not name.endswith(layers) or not hasattr(module, "weight"):
            continue
        out, inside = module.weight.shape[:2]
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(3, inside, generator=generator) / inside**0.5
        state[f"transformer.{name}.lora_B.weight"] = 0.7 * torch.randn(out, 3, generator=generator)
        if bias:
            state[f"transformer.{name}.lora_B.bias"] = 0.5 * torch.randn(out, generator=generator)
    assert state
    return state


def load_both(case: Case) -> None:
    case.pipe.load_lora_weights(lora_state(case, 1), adapter_name="one")
    case.pipe.load_lora_weights(lora_state(case, 2), adapter_name="low", load_into_transformer_2=True)


def load_two(case: Case) -> None:
    case.pipe.load_lora_weights(lora_state(case, 1), adapter_name="one")
    case.pipe.load_lora_weights(lora_state(case, 3, layers=("to_v", "to_q")), adapter_name="two")


def weigh(case: Case) -> None:
    load_two(case)
    case.pipe.set_adapters(["one", "two"], adapter_weights=[0.3, -1.5])


def choose(case: Case) -> None:
    load_two(case)
    case.pipe.set_adapters("two")


def weigh_by_block(case: Case) -> None:
    load_two(case)
    case.pipe.transformer.set_adapters(["one"], [0.4])


def fuse(case: Case) -> None:
    load_both(case)
    case.pipe.fuse_lora(components=["transformer", "transformer_2"], lora_scale=0.6)


def fuse_and_unload(case: Case) -> None:
    case.pipe.load_lora_weights(lora_state(case, 1, layers=("to_q", "proj_out", "time_proj")), adapter_name="one")
    case.pipe.fuse_lora(components=["transformer"])


def disable(case: Case) -> None:
    load_both(case)
    case.pipe.disable_lora()


def disable_and_enable(case: Case) -> None:
    disable(case)
    case.pipe.enable_lora()


def delete(case: Case) -> None:
    load_two(case)
    case.pipe.delete_adapters("one")


def hotswap(case: Case) -> None:
    case.pipe.load_lora_weights(lora_state(case, 1), adapter_name="one")
    case.pipe.load_lora_weights(lora_state(case, 7), adapter_name="one", hotswap=True)


def with_bias(case: Case) -> None:
    case.pipe.load_lora_weights(lora_state(case, 1, bias=True))


def around_the_blocks(case: Case) -> None:
    layers = ("time_proj", "time_embedder.linear_1", "text_embedder.linear_2", "proj_out")
    case.pipe.load_lora_weights(lora_state(case, 1, layers=layers))


def of_peft(case: Case) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "patch_embedding"], init_lora_weights=False)
    case.pipe.transformer.add_adapter(config, "trained")


STATES: dict[str, tuple[Callable[[Case], None], bool]] = {
    "both experts": (load_both, True),
    "two adapters": (load_two, True),
    "weights of adapters": (weigh, True),
    "one of two adapters": (choose, True),
    "adapter of one model": (weigh_by_block, True),
    "fused": (fuse, True),
    "fused, also around the blocks": (fuse_and_unload, True),
    "disabled": (disable, False),
    "enabled again": (disable_and_enable, True),
    "deleted": (delete, True),
    "swapped": (hotswap, True),
    "with biases": (with_bias, True),
    "around the blocks": (around_the_blocks, True),
    "added by peft": (of_peft, True),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("order", ["accelerated first", "loaded first"])
def test_lora_calls(case: Case, name: str, order: str) -> None:
    set_up, is_another = STATES[name]
    plain = case.run(**CALL)
    set_up(case)
    want = case.run(**CALL)
    if order == "loaded first":
        with case.accelerated():
            got = case.run(**CALL)
        assert furthest(case.run(**CALL), want) == 0
    else:
        case.pipe.unfuse_lora(components=["transformer", "transformer_2"])
        case.pipe.unload_lora_weights()
        with case.accelerated():
            assert furthest(case.run(**CALL), plain) <= SAME
            set_up(case)
            got = case.run(**CALL)
            case.pipe.unfuse_lora(components=["transformer", "transformer_2"])
            case.pipe.unload_lora_weights()
            assert furthest(case.run(**CALL), plain) <= 10 * SAME  # after fusing, weights are no longer quite the same
    case.pipe.unfuse_lora(components=["transformer", "transformer_2"])
    assert furthest(got, want) <= 10 * SAME
    assert (furthest(want, plain) > 0.01) == is_another


def test_disabled_after_fusing(case: Case) -> None:
    plain = case.run(**CALL)
    with case.accelerated():
        fuse_and_unload(case)
        assert furthest(case.run(**CALL), plain) > 0.01
        case.pipe.disable_lora()
        assert furthest(case.run(**CALL), plain) <= 10 * SAME


def test_fused_and_unloaded_stays(case: Case) -> None:
    case.pipe.load_lora_weights(lora_state(case, 1, layers=("to_q", "proj_out")), adapter_name="one")
    weights = {name: tensor.clone() for name, tensor in case.pipe.transformer.state_dict().items()}
    want = case.run(**CALL)
    with case.accelerated():
        case.pipe.fuse_lora(components=["transformer"])
        case.pipe.unload_lora_weights()
        assert furthest(case.run(**CALL), want) <= SAME
    plain = {re.sub(r"\.base_layer", "", name): tensor for name, tensor in weights.items() if ".lora_" not in name}
    case.pipe.transformer.load_state_dict(plain)


@pytest.mark.parametrize("scale", [0.0, 0.4, -1.0])
def test_scale_of_one_call(case: Case, scale: float) -> None:
    load_both(case)
    arguments: dict[str, Any] = {**CALL, "attention_kwargs": {"scale": scale}}
    want, full = case.run(**arguments), case.run(**CALL)
    with case.accelerated():
        assert furthest(case.run(**arguments), want) <= SAME
        assert furthest(case.run(**CALL), full) <= SAME  # and is forgotten after it
    assert furthest(want, full) > 0.01


def test_factors_are_taken_over(case: Case) -> None:
    with case.accelerated():
        load_both(case)
        case.run(**CALL)
        experts, name = case.pipe.transformer._wanfast
        (term,) = next(experts.open(name, torch.device("cpu")).blocks()).self_attn.q.low_rank
        layer = case.pipe.transformer.blocks[0].attn1.to_q
        assert term.down.data_ptr() == layer.lora_A["one"].weight.data_ptr()
        assert term.up.data_ptr() == layer.lora_B["one"].weight.data_ptr()
        assert next(experts.open(name, torch.device("cpu")).blocks()).self_attn.q.weight.data_ptr() == (
            layer.base_layer.weight.data_ptr()
        )


def test_16_bits(case: Case) -> None:
    case = copy.deepcopy(case)
    load_both(case)
    for model in case.transformers:
        cast(model, torch.bfloat16)
        cast(model, torch.float32)
    truth = case.run()
    for model in case.transformers:
        cast(model, torch.bfloat16)
    theirs = case.run()
    with case.accelerated():
        ours = case.run()
    error = [np.sqrt(np.mean((video - truth) ** 2)) for video in (ours, theirs)]
    assert 0 < error[0] < error[1]


@pytest.mark.parametrize(
    ("config", "kind"),
    [({"use_dora": True}, "Dora"), ({"use_rslora": True}, None)],
    ids=["DoRA", "rank-stabilised"],
)
def test_kinds_of_lora(case: Case, config: dict[str, Any], kind: str | None) -> None:
    torch.manual_seed(0)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False, **config)
    case.pipe.transformer.add_adapter(lora, "other")
    with torch.no_grad():
        for parameter_name, parameter in case.pipe.transformer.named_parameters():
            if "lora_B" in parameter_name:
                parameter.mul_(0.2)
    want = case.run(**CALL)
    with case.accelerated():
        if kind is None:
            assert furthest(case.run(**CALL), want) <= SAME
        else:
            with pytest.raises(RequestError, match=rf"^adapter other: must be a plain LoRA, got \w*{kind}"):
                case.run(**CALL)
