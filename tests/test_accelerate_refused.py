"""What wanfast cannot honour in a diffusers pipeline is refused by name, and the pipeline stays as it was."""

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import accelerate as hf_accelerate
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from reference.dit import diffusers_dit, small_config
from reference.pipelines import Case, furthest, make_case
from torch import nn

import wanfast
from wanfast.diffusers_backend.experts import Experts
from wanfast.diffusers_backend.predict import split_timesteps
from wanfast.errors import CheckpointError, RequestError

CALL = {"output_type": "latent"}  # of three steps the last is the low-noise expert's


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case("t2v", tmp_path_factory.mktemp("family"))


@pytest.fixture
def case(shared: Case) -> Case:
    return copy.deepcopy(shared)


class OwnTransformer(WanTransformer3DModel):
    pass


class OwnProcessor:
    def __call__(self, *args: object) -> None: ...


def become(module: Any, kind: type) -> None:
    module.__class__ = kind


def group_offload(module: Any, kind: str) -> None:
    cpu = torch.device("cpu")
    more = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    with patch("torch.accelerator.current_accelerator", return_value=cpu):  # diffusers asks for its kind
        apply_group_offloading(module, cpu, cpu, offload_type=kind, **more)


def layerwise_casting(module: Any) -> None:
    apply_layerwise_casting(module, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("norm", "embed"))


def wrap_a_block(module: Any) -> None:
    module.blocks[1].forward = partial(type(module.blocks[1]).forward, module.blocks[1])


def another_processor(module: Any) -> None:
    module.blocks[0].attn1.processor = OwnProcessor()


def another_backend(module: Any) -> None:
    module.blocks[1].attn2.processor._attention_backend = "sage"


def quantise(module: Any) -> None:
    module.is_quantized = True


def compiled(module: Any) -> None:
    module.blocks[0]._compiled_call_impl = print


def int8_weight(module: Any) -> None:
    layer = module.blocks[0].ffn.net[2]
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)


def hook(module: Any) -> None:
    module.blocks[0].attn1.register_forward_hook(print)


IN_A_TRANSFORMER: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a derived class": (
        partial(become, kind=OwnTransformer),
        "transformer_2: must be diffusers' WanTransformer3DModel",
    ),
    "group offload of blocks": (partial(group_offload, kind="block_level"), r"blocks\.0 has a hook.*enable_group"),
    "group offload of leaves": (partial(group_offload, kind="leaf_level"), "has a hook.*enable_group_offload"),
    "layerwise casting": (layerwise_casting, "has a hook.*enable_layerwise_casting"),
    "sequential offload": (partial(hf_accelerate.cpu_offload, execution_device="cpu"), "enable_sequential_cpu_offload"),
    "a wrapped block": (wrap_a_block, r"blocks\.1 has a hook"),
    "a forward hook": (hook, r"blocks\.0\.attn1 has a hook"),
    "a processor": (another_processor, r"blocks\.0\.attn1 must have diffusers' own attention, got OwnProcessor"),
    "an attention backend": (another_backend, r"blocks\.1\.attn2 .* with the backend sage"),
    "quantisation": (quantise, "must not be quantised by diffusers; .*wanfast.load"),
    "a compiled block": (compiled, r"blocks\.0 has a hook, a compiled call"),
    "fused projections": (WanTransformer3DModel.fuse_qkv_projections, r"blocks\.0\.attn1 has fused projections"),
}


@pytest.mark.parametrize("name", IN_A_TRANSFORMER)
def test_before(case: Case, name: str) -> None:
    prepare, message = IN_A_TRANSFORMER[name]
    prepare(case.pipe.transformer_2)
    with pytest.raises(RequestError, match=rf"^transformer_2: .*{message.removeprefix('transformer_2: ')}"):
        wanfast.accelerate(case.pipe)
    assert type(case.pipe.transformer) is WanTransformer3DModel  # nothing was changed
    assert type(case.pipe.vae) is AutoencoderKLWan


# Those that change a layer inside without the model's own methods are seen when the weights change next.
BEFORE_ONLY = {"a derived class", "fused projections", "quantisation", "a processor", "an attention backend"}


@pytest.mark.parametrize("name", sorted(set(IN_A_TRANSFORMER) - BEFORE_ONLY - {"a forward hook"}))
def test_after(case: Case, name: str) -> None:
    prepare, message = IN_A_TRANSFORMER[name]
    wanfast.accelerate(case.pipe)
    case.run(**CALL)
    prepare(case.pipe.transformer_2)
    with pytest.raises(RequestError, match=message):
        case.run(**CALL)


def test_weights_in_other_forms(case: Case) -> None:
    wanfast.accelerate(case.pipe)
    int8_weight(case.pipe.transformer)
    with pytest.raises(
        RequestError, match=r"weights must be float32, .* got blocks\.0\.ffn\.net\.2\.weight as torch.int8"
    ):
        case.run(**CALL)


METHODS: dict[str, tuple[Any, ...]] = {
    "compile": (),
    "compile_repeated_blocks": (),
    "enable_cache": (None,),
    "enable_gradient_checkpointing": (),
    "enable_group_offload": (torch.device("cpu"),),
    "enable_layerwise_casting": (torch.float8_e4m3fn,),
    "enable_parallelism": (),
    "enable_xla_flash_attention": (),
    "fuse_qkv_projections": (),
    "set_attention_backend": ("sage",),
    "set_attn_processor": (None,),
    "set_use_memory_efficient_attention_xformers": (True,),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(case: Case, name: str) -> None:
    with case.accelerated(), pytest.raises(RequestError, match=rf"^{name}: must not be called on an accelerated"):
        getattr(case.pipe.transformer, name)(*METHODS[name])
    if hasattr(WanTransformer3DModel, name):
        assert getattr(type(case.pipe.transformer), name) is getattr(WanTransformer3DModel, name)


def test_the_pipelines_xformers_call(case: Case) -> None:
    with case.accelerated(), pytest.raises(RequestError, match="set_use_memory_efficient_attention_xformers: must not"):
        case.pipe.enable_xformers_memory_efficient_attention()


def test_group_offload_of_the_vae(case: Case) -> None:
    group_offload(case.pipe.vae, "leaf_level")
    with pytest.raises(RequestError, match=r"^vae: nothing may hang on the layers inside"):
        wanfast.accelerate(case.pipe)


def another(model: Any, **changes: Any) -> Any:
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return WanTransformer3DModel.from_config(config | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_dim": 32},
        {"added_kv_proj_dim": 48},
        {"pos_embed_seq_len": 10, "image_dim": 32},
        {"qk_norm": "layer_norm"},
    ],
    ids=str,
)
def test_other_architectures(case: Case, changes: dict[str, Any]) -> None:
    case.pipe.transformer = another(case.pipe.transformer, **changes)
    with pytest.raises(RequestError, match=r"^transformer: .*(must be of Wan 2\.2|qk_norm must be)"):
        wanfast.accelerate(case.pipe)


def test_no_norm_before_cross_attention(case: Case) -> None:
    case.pipe.transformer = another(case.pipe.transformer, cross_attn_norm=False)
    wanfast.accelerate(case.pipe)
    with pytest.raises(CheckpointError, match=r"missing .*norm3"):
        case.run(**CALL)


@pytest.mark.parametrize("pipe", [None, "a pipeline", nn.Linear(1, 1)], ids=lambda pipe: type(pipe).__name__)
def test_other_things_than_pipelines(pipe: Any) -> None:
    with pytest.raises(RequestError, match=r"^pipe: must be a WanPipeline or WanImageToVideoPipeline"):
        wanfast.accelerate(pipe)
    with pytest.raises(RequestError, match=r"^pipe: must have been given to wanfast.accelerate"):
        wanfast.restore(pipe)


def test_a_pipeline_without_transformers(case: Case) -> None:
    parts = {**case.pipe.components, "transformer": None, "transformer_2": None}
    with pytest.raises(RequestError, match=r"^pipe: must have a transformer"):
        wanfast.accelerate(WanPipeline(**parts))


def test_another_vae(case: Case) -> None:
    case.pipe.vae = nn.Identity()
    with pytest.raises(RequestError, match=r"^vae: must be diffusers' AutoencoderKLWan itself, got Identity"):
        wanfast.accelerate(case.pipe)


class TestForward:
    @pytest.fixture
    def call(self) -> Callable[..., Any]:
        model = diffusers_dit(small_config("t2v"))
        model.__class__ = wanfast.WanFastTransformer3DModel
        arguments: dict[str, Any] = {
            "hidden_states": torch.zeros(1, 16, 2, 4, 4),
            "timestep": torch.tensor([5]),
            "encoder_hidden_states": torch.zeros(1, 3, 24),
        }
        return lambda **changes: model(**(arguments | changes))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"encoder_hidden_states_image": torch.zeros(1, 4, 24)}, "encoder_hidden_states_image: must be None"),
            (
                {"attention_kwargs": {"scale": 1.0, "mask": 1}},
                "attention_kwargs: must hold nothing but scale, got mask",
            ),
            (
                {"hidden_states": torch.zeros(1, 16, 2, 4, 4, requires_grad=True)},
                "hidden_states: must need no gradient",
            ),
            ({"timestep": torch.tensor([5, 6])}, r"timestep: must be \[1\] or \[1, 8\].*got \[2\]"),
            ({"timestep": torch.arange(8.0)[None]}, "timestep: must be one value in the first latent frame"),
            ({"timestep": torch.tensor(5)}, r"timestep: must be .* got \[\]"),
            ({"hidden_states": torch.zeros(1, 15, 2, 4, 4)}, "latents: .*16 channels, got 15"),
            ({"hidden_states": torch.zeros(1, 16, 2, 5, 4)}, "latents: .*must be multiples"),
            ({"encoder_hidden_states": torch.zeros(1, 3, 25)}, "contexts: each must be"),
        ],
        ids=str,
    )
    def test_arguments(self, call: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
        with pytest.raises(RequestError, match=f"^{message}"):
            call(**changes)

    def test_a_gradient_through_the_vae(self, case: Case) -> None:
        vae = case.pipe.vae
        with case.accelerated():
            for name, call, shape in (("z", vae.decode, (1, 16, 1, 4, 4)), ("x", vae.encode, (1, 3, 1, 32, 32))):
                with pytest.raises(RequestError, match=f"^{name}: must need no gradient"):
                    call(torch.zeros(shape, requires_grad=True))

    def test_another_device(self) -> None:
        model = diffusers_dit(small_config("t2v"))
        with pytest.raises(RequestError, match=r"^transformer: must be on the device of its inputs, meta, got cpu"):
            Experts({"single": model}, "auto", None).open("single", torch.device("meta"))
        model.to("meta")
        with pytest.raises(RequestError, match=r"^transformer: its weights must be in memory, .* on the meta device"):
            Experts({"single": model}, "auto", None).open("single", torch.device("meta"))

    @pytest.mark.parametrize("kwargs", [None, {}, {"scale": None}, {"scale": 0.5}], ids=str)
    def test_attention_kwargs_that_are_honoured(self, call: Callable[..., Any], kwargs: Any) -> None:
        assert furthest(call(attention_kwargs=kwargs).sample, call().sample) == 0


def test_without_diffusers() -> None:
    program = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import wanfast, wanfast.pipeline, wanfast.commands\n"
        "from wanfast import *\n"
        "for name in ('accelerate', 'restore', 'WanFastTransformer3DModel'):\n"
        "    try: getattr(wanfast, name)\n"
        "    except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.count("need diffusers 0.35 or newer") == 3
    assert "pip install 'diffusers>=0.35'" in done.stdout


def test_a_folder_of_another_model(tmp_path: Path) -> None:
    another(diffusers_dit(small_config("i2v")), image_dim=32).save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=r"^transformer: must be of Wan 2\.2, got one with image_dim"):
        wanfast.WanFastTransformer3DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("place", [(0, 0), (0, 3), (0, 5), (0, 8), (0, 11), (1, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("value", [0.0, 700.0])
def test_one_other_timestep_in_a_frame_is_seen(place: tuple[int, int], value: float) -> None:
    """Wherever it stands and whichever way it differs; frames of 4 tokens, the first with a timestep of its own."""
    hidden = torch.zeros(2, 48, 3, 4, 4)
    timesteps = torch.cat([torch.full((2, 4), 20.0), torch.full((2, 8), 500.0)], dim=1)
    config = small_config("ti2v")
    assert split_timesteps(timesteps, hidden, config) == [(20.0, 500.0)]
    timesteps[place] = value
    with pytest.raises(RequestError, match=r"^timestep: must be one value in the first latent frame"):
        split_timesteps(timesteps, hidden, config)
