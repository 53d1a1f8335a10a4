"""diffusers' pipeline over the tensors of an open wanfast model: the same weights, read from the same files.

Modules are made without memory and take the tensors as they are; only a tensor of another dtype than the reference
computes in is a copy, and one that is stored in 8 bits or fewer is expanded.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from wanfast.checkpoint.names import dit_to_diffusers, text_to_transformers, vae_to_diffusers
from wanfast.checkpoint.reader import Reader
from wanfast.config import DiTConfig, TextConfig, VAEConfig
from wanfast.errors import RequestError
from wanfast.linear import expand
from wanfast.model import Model
from wanfast.plan import Plan

_SCHEDULERS = {
    "unipc": "UniPCMultistepScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
}


def import_libraries() -> tuple[Any, Any]:
    """Import diffusers and transformers with all that building a pipeline takes; they import a class when asked.

    Returns:
        Both modules; as they are typed half-way, nothing is.
    """
    diffusers, transformers = import_module("diffusers"), import_module("transformers")
    for name in ("WanPipeline", "WanImageToVideoPipeline", *_SCHEDULERS.values()):
        getattr(diffusers, name)
    for name in ("PreTrainedTokenizerFast", "UMT5EncoderModel"):
        getattr(transformers, name)
    return diffusers, transformers


def build_pipeline(model: Model, plan: Plan, dtype: torch.dtype, *, takes_picture: bool) -> Any:
    """Build the pipeline of a model's family.

    Args:
        model: whose tensors it has.
        plan: whose solver, shift and boundary it has.
        dtype: of the transformers and the text encoder; what diffusers keeps in fp32 is fp32, as is the VAE.
        takes_picture: whether it starts from one.

    Returns:
        A WanPipeline or WanImageToVideoPipeline on the CPU, which shows no progress.
    """
    diffusers, transformers = import_libraries()
    kind = diffusers.WanImageToVideoPipeline if takes_picture else diffusers.WanPipeline
    experts = [_transformer(model.config.dit, reader, dtype) for reader in model.experts.values()]
    pipeline = kind(
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=model.tokenizer.vocabulary, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=_text_encoder(model.config.text, model.text, dtype),
        vae=_vae(model.config.vae, model.vae),
        scheduler=make_scheduler(plan),
        transformer=experts[0],
        transformer_2=experts[1] if len(experts) > 1 else None,
        boundary_ratio=model.config.boundary,
        expand_timesteps=model.config.task == "ti2v",
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_scheduler(plan: Plan) -> Any:
    """Make diffusers' scheduler of a plan's solver."""
    kind = getattr(import_libraries()[0], _SCHEDULERS[plan.solver])
    if plan.solver == "euler":
        return kind(shift=plan.shift)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": plan.shift}
    return kind(**flow)


def hold_to_schedule(scheduler: Any, plan: Plan) -> float:
    """Let a scheduler take the plan's own steps, wherever its release of diffusers would put them.

    Returns:
        The largest difference between a sigma of the plan and one of the scheduler's own.
    """
    own = scheduler.set_timesteps

    def set_timesteps(num_inference_steps: int, device: Any = None, **options: Any) -> None:
        own(num_inference_steps, device=device, **options)
        scheduler.sigmas[: len(plan.steps)] = torch.tensor([step.sigma for step in plan.steps])
        timesteps = torch.tensor([step.timestep for step in plan.steps], device=scheduler.timesteps.device)
        is_whole = bool((timesteps == timesteps.round()).all())
        scheduler.timesteps = timesteps.to(scheduler.timesteps.dtype if is_whole else torch.float32)

    own(len(plan.steps))
    ours = torch.tensor([step.sigma for step in plan.steps], dtype=torch.float64)
    distance = float((scheduler.sigmas[: len(ours)].double() - ours).abs().max())
    scheduler.set_timesteps = set_timesteps
    return distance


def place_pipeline(pipeline: Any, placement: str, device: torch.device) -> None:
    """Let the pipeline compute on a GPU, with its weights where `placement` says (`wanfast.bench.case.PLACEMENTS`).

    Raises:
        RequestError: the accelerate package, which offloading takes, is not installed.
    """
    if device.type == "cpu":
        return
    if placement == "resident":
        pipeline.to(device)
        return
    if importlib.util.find_spec("accelerate") is None:
        raise RequestError("reference: its offloading needs the accelerate package; pip install accelerate")
    if placement == "group":
        for transformer in (pipeline.transformer, pipeline.transformer_2):
            if transformer is not None:
                transformer.enable_group_offload(
                    onload_device=device, offload_type="block_level", num_blocks_per_group=1, use_stream=True
                )
        pipeline._exclude_from_cpu_offload += ["transformer", "transformer_2"]
    pipeline.enable_model_cpu_offload(device=device)


def _transformer(config: DiTConfig, reader: Reader, dtype: torch.dtype) -> Any:
    kind = import_libraries()[0].WanTransformer3DModel
    with torch.device("meta"):
        module = kind(
            patch_size=config.patch_size,
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            cross_attn_norm=True,
            eps=config.eps,
        )
    kept = kind._keep_in_fp32_modules

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if any(part in name.split(".") for part in kept) else dtype

    _fill(module, reader, dit_to_diffusers, dtype_of)
    rope = module.rope  # has buffers that no checkpoint holds
    module.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    return module


def _vae(config: VAEConfig, reader: Reader) -> Any:
    is_residual = config.version == "2.2"
    pixels = 3 * config.patch_size**2
    with torch.device("meta"):
        module = import_libraries()[0].AutoencoderKLWan(
            base_dim=config.encoder_dim,
            decoder_base_dim=config.decoder_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.multipliers),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temporal_downsample),
            latents_mean=list(config.latents_mean),
            latents_std=list(config.latents_std),
            is_residual=is_residual,
            in_channels=pixels,
            out_channels=pixels,
            patch_size=config.patch_size if is_residual else None,
            scale_factor_temporal=config.temporal_stride,
            scale_factor_spatial=config.spatial_stride,
        )

    def rename(name: str) -> str:
        return vae_to_diffusers(name, config.version, num_res_blocks=config.num_res_blocks)

    _fill(module, reader, rename, lambda name: torch.float32)
    return module


def _text_encoder(config: TextConfig, reader: Reader, dtype: torch.dtype) -> Any:
    transformers = import_libraries()[1]
    settings = transformers.UMT5Config(
        vocab_size=config.vocab_size,
        d_model=config.dim,
        d_kv=config.attention_dim // config.num_heads,
        d_ff=config.ffn_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        relative_attention_num_buckets=config.num_buckets,
        relative_attention_max_distance=config.max_distance,
        layer_norm_epsilon=config.eps,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        module = transformers.UMT5EncoderModel(settings)
    _fill(module, reader, text_to_transformers, lambda name: dtype, {"encoder.embed_tokens.weight": "shared.weight"})
    return module


def _fill(
    module: Any,
    reader: Reader,
    rename: Callable[[str], str],
    dtype_of: Callable[[str], torch.dtype],
    twins: Mapping[str, str] | None = None,
) -> None:
    """Give a module that has no memory a reader's tensors; `twins` names tensors that are another under a second name.

    Raises:
        RuntimeError: the module has other tensors than the reader.
    """
    tensors = {(theirs := rename(name)): _plain(reader, name, dtype_of(theirs)) for name in sorted(reader.names())}
    tensors |= {name: tensors[other] for name, other in (twins or {}).items()}
    module.load_state_dict(tensors, assign=True)
    module.eval().requires_grad_(False)


def _plain(reader: Reader, name: str, dtype: torch.dtype) -> Tensor:
    """Read one tensor as plain numbers of a dtype; one that has it already is not copied."""
    stored = reader.load(name)
    if not isinstance(stored, Tensor):
        stored = expand(replace(stored, dtype=dtype))
    return stored.to(dtype)
