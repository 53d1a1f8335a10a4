"""The plan: every shape, sigma, expert, guidance and seed of a generation, before any weight is touched."""

import json
import math
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, Literal, get_args

from wanfast.config import (
    NUM_TRAIN_TIMESTEPS,
    DiTConfig,
    Expert,
    ExpertName,
    ModelConfig,
    SolverName,
    Task,
    TextConfig,
)
from wanfast.errors import RequestError
from wanfast.kernels import KEY_BLOCK, blocks_kept_at_most
from wanfast.request import (
    Mode,
    Request,
    resolve_attention_density,
    resolve_fps,
    resolve_guidance,
    resolve_mode,
    resolve_num_frames,
    resolve_num_inference_steps,
    resolve_prompts,
    resolve_seed,
    resolve_shift,
    resolve_size,
    resolve_solver,
    video_size,
)
from wanfast.schedule import sigmas_and_timesteps
from wanfast.solvers import Step

Precision = Literal["fp32", "exact", "fp8", "int8"]
# Of a run with sparse attention, whose first DiT block is dense throughout. Source: SVG2 and Sol-Attn (Sana) keep a
# fifth of the steps dense, Radial Attention 11 of 40 for Wan 2.2; all three keep the first block.
DENSE_STEPS = 0.2
EIGHT_BIT: tuple[Precision, ...] = ("fp8", "int8")  # those that multiply in 8 bits


@dataclass(frozen=True, slots=True)
class Wish:
    """What precision a model shall compute in."""

    precision: Precision
    may_round: bool = False  # whether int8 may take its place where it does not fit
    reason: str | None = None  # why it is this one, for the user, where that does not go without saying


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the model and what its weights take: computed from its sizes, not measured."""

    name: str
    parameters: int
    bytes: int  # in the dtypes it computes in


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything about one generation that can be known before it starts."""

    model: str
    task: Task
    mode: Mode
    precision: Precision
    device: str
    prompt: str
    negative_prompt: str
    image_size: tuple[int, int] | None  # (width, height) of the conditioning image
    asked_size: tuple[int, int]  # (width, height) as asked; with an image only its area counts
    width: int  # pixels of the video
    height: int
    num_frames: int
    fps: int
    seed: int
    solver: SolverName
    shift: float
    latent_shape: tuple[int, int, int, int]  # (C, F, H, W)
    token_grid: tuple[int, int, int]  # patches: frames, rows, columns
    experts: tuple[Expert, ...]  # with the guidance of this run
    steps: tuple[Step, ...]
    parts: tuple[Part, ...]
    flops_per_forward: int  # computed, 2 per multiply-add; of dense attention
    attention_density: float  # share of the blocks of keys that each block of queries attends to, in sparse steps
    sparse_flops_per_forward: int  # of a step with sparse attention, at most; as much as dense at density 1

    @property
    def num_tokens(self) -> int:
        """Length of the DiT's sequence."""
        return math.prod(self.token_grid)

    @property
    def num_forwards(self) -> int:
        """DiT evaluations in all."""
        return sum(step.num_forwards for step in self.steps)

    @property
    def num_dense_steps(self) -> int:
        """How many steps, from the first on, have dense attention in every block."""
        return len(self.steps) if self.attention_density == 1 else math.ceil(DENSE_STEPS * len(self.steps))

    @property
    def flops(self) -> int:
        """Operations of all steps."""
        return sum(self.flops_of(step) for step in self.steps)

    def density_of(self, step: Step) -> float:
        """Tell how dense attention is in a step, in all blocks but the first."""
        return 1.0 if step.index < self.num_dense_steps else self.attention_density

    def flops_of(self, step: Step) -> int:
        """Count the operations of a step."""
        is_dense = self.density_of(step) == 1
        return step.num_forwards * (self.flops_per_forward if is_dense else self.sparse_flops_per_forward)

    @property
    def steps_per_expert(self) -> dict[ExpertName, int]:
        """How many steps each expert takes, in the order they run; an expert that takes none is left out."""
        return {expert: len(list(steps)) for expert, steps in groupby(self.steps, key=lambda step: step.expert)}


def make_plan(
    config: ModelConfig,
    request: Request,
    *,
    precision: Precision,
    device: str = "cpu",
    vae_parameters: int | None = None,
) -> Plan:
    """Settle a generation.

    Args:
        config: the model.
        request: what was asked; None fields take the model's own values, a missing seed a new one.
        precision: tier the model computes in.
        device: where it computes, for the printed plan.
        vae_parameters: size of the VAE, if the plan shall list its bytes too.

    Returns:
        The plan. `request_of` turns it back into a request that gives the same plan.

    Raises:
        RequestError: an argument breaks a rule; the message names it, the rule, the value and what would work.
    """
    if precision not in get_args(Precision):
        raise RequestError(f"precision: must be one of {', '.join(get_args(Precision))}, got {precision!r}; try exact")
    mode = resolve_mode(request, config)
    prompt, negative_prompt = resolve_prompts(request)
    width, height = video_size(request, config)
    num_frames = resolve_num_frames(request, config)
    latent_shape = _latent_shape(config, width, height, num_frames)
    token_grid = _token_grid(config.dit, latent_shape)
    guidance = resolve_guidance(request, config)
    experts = tuple(replace(expert, guidance=guidance[expert.name]) for expert in config.experts)
    solver, shift = resolve_solver(request, config), resolve_shift(request, config)
    num_steps = resolve_num_inference_steps(request, config)
    density, num_tokens = resolve_attention_density(request, num_steps), math.prod(token_grid)
    return Plan(
        model=config.name,
        task=config.task,
        mode=mode,
        precision=precision,
        device=device,
        prompt=prompt,
        negative_prompt=negative_prompt,
        image_size=None if request.image_size is None else (int(request.image_size[0]), int(request.image_size[1])),
        asked_size=resolve_size(request, config),
        width=width,
        height=height,
        num_frames=num_frames,
        fps=resolve_fps(request, config),
        seed=resolve_seed(request),
        solver=solver,
        shift=shift,
        latent_shape=latent_shape,
        token_grid=token_grid,
        experts=experts,
        steps=_steps(experts, config.boundary, solver, num_steps, shift),
        parts=weight_parts(config, precision, vae_parameters=vae_parameters),
        flops_per_forward=forward_flops(config.dit, num_tokens),
        attention_density=density,
        sparse_flops_per_forward=forward_flops(config.dit, num_tokens, attention_density=density),
    )


def request_of(plan: Plan) -> Request:
    """Return the request, complete and with its seed, that gives this plan again on the same model."""
    guidance = {expert.name: expert.guidance for expert in plan.experts}
    return Request(
        plan.prompt or None,
        negative_prompt=plan.negative_prompt,
        image_size=plan.image_size,
        width=plan.asked_size[0],
        height=plan.asked_size[1],
        num_frames=plan.num_frames,
        num_inference_steps=len(plan.steps),
        guidance=guidance.get("single"),
        guidance_high=guidance.get("high_noise"),
        guidance_low=guidance.get("low_noise"),
        shift=plan.shift,
        solver=plan.solver,
        seed=plan.seed,
        fps=plan.fps,
        attention_density=plan.attention_density,
    )


def ti2v_resize(
    image_width: int, image_height: int, width: int, height: int
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Place a window of (width, height) in the middle of an image scaled just to cover it, for TI2V.

    Returns:
        The scaled image's (width, height), and the window's (left, upper, right, lower) in it, all in pixels.

    Source: Wan-Video/Wan2.2, wan/textimage2video.py.
    """
    scale = max(width / image_width, height / image_height)
    scaled_width, scaled_height = round(image_width * scale), round(image_height * scale)
    left, upper = (scaled_width - width) // 2, (scaled_height - height) // 2
    return (scaled_width, scaled_height), (left, upper, left + width, upper + height)


def weight_parts(config: ModelConfig, precision: Precision, *, vae_parameters: int | None = None) -> tuple[Part, ...]:
    """Count the parameters and bytes of each part, in the order they are first used.

    exact keeps norms, modulation, the timestep's layers and the head in fp32, and the rest of the DiT and the text
    encoder in 16 bits; fp8 and int8 have the matrices of the DiT's blocks in 8. The VAE is listed in fp32, as its file
    has it, and is left out where its size is not given.
    """
    wide, narrow = 4, 4 if precision == "fp32" else 2
    text = text_parameters(config.text)
    in_fp32 = _fp32_dit_parameters(config.dit)
    in_all = dit_parameters(config.dit)
    dit_bytes = in_fp32 * wide + (in_all - in_fp32) * narrow
    if precision in EIGHT_BIT:
        dit_bytes -= config.dit.num_layers * _block_matrices(config.dit)  # their scales are a share of 1 / 1,000
    parts = [Part("text encoder", text, text * narrow)]
    parts += [Part(expert.name, in_all, dit_bytes) for expert in config.experts]
    if vae_parameters is not None:
        parts.append(Part("VAE", vae_parameters, vae_parameters * wide))
    return tuple(parts)


def _block_matrices(config: DiTConfig) -> int:
    """Count the parameters of one block's projections."""
    return 8 * config.dim * config.dim + 2 * config.dim * config.ffn_dim


def dit_parameters(config: DiTConfig) -> int:
    """Count the parameters of one diffusion transformer."""
    dim, patch = config.dim, math.prod(config.patch_size)
    attention = 4 * (dim * dim + dim)
    feed_forward = 2 * dim * config.ffn_dim + config.ffn_dim + dim
    patch_embedding = config.in_channels * patch * dim + dim
    text_embedding = config.text_dim * dim + dim + dim * dim + dim
    blocks = config.num_layers * (2 * attention + feed_forward)
    return blocks + patch_embedding + text_embedding + _fp32_dit_parameters(config)


def _fp32_dit_parameters(config: DiTConfig) -> int:
    """Count what the reference computes in fp32: norms and modulation of the blocks, timestep's layers, head."""
    dim, patch = config.dim, math.prod(config.patch_size)
    block_norms, block_modulation = 4 * dim + 2 * dim, 6 * dim
    time = (config.freq_dim * dim + dim) + (dim * dim + dim) + (6 * dim * dim + 6 * dim)
    head = 2 * dim + (dim + 1) * patch * config.out_channels
    return config.num_layers * (block_norms + block_modulation) + time + head


def text_parameters(config: TextConfig) -> int:
    """Count the parameters of the text encoder."""
    attention = 4 * config.dim * config.attention_dim + config.num_buckets * config.num_heads
    block = attention + 3 * config.dim * config.ffn_dim + 2 * config.dim
    return config.vocab_size * config.dim + config.num_layers * block + config.dim


def kept_keys(num_tokens: int, attention_density: float) -> int:
    """Count the keys that a token attends to in sparse attention, at most."""
    return min(num_tokens, KEY_BLOCK * blocks_kept_at_most(attention_density, -(-num_tokens // KEY_BLOCK)))


def forward_flops(config: DiTConfig, num_tokens: int, *, attention_density: float = 1.0) -> int:
    """Count the floating-point operations of one DiT evaluation, 2 per multiply-add, matrix products only.

    With an attention density below 1 the first block is dense, and the others attend to as many keys as they may.
    """
    dim, text_len, patch = config.dim, config.text_len, math.prod(config.patch_size)
    linears = 2 * num_tokens * (6 * dim * dim + 2 * dim * config.ffn_dim)  # q, k, v, o; cross q, o; feed-forward
    text_linears = 2 * text_len * 2 * dim * dim
    keys = num_tokens + (config.num_layers - 1) * kept_keys(num_tokens, attention_density)  # of all blocks
    attention = 4 * num_tokens * (keys + config.num_layers * text_len) * dim
    ends = 2 * num_tokens * patch * (config.in_channels + config.out_channels) * dim
    text_embedding = 2 * text_len * (config.text_dim * dim + dim * dim)
    time = 2 * (config.freq_dim * dim + 7 * dim * dim)
    return config.num_layers * (linears + text_linears) + attention + ends + text_embedding + time


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON-able values; `request` holds the arguments of the `Request` that repeats it."""
    derived = {
        "num_tokens": plan.num_tokens,
        "num_forwards": plan.num_forwards,
        "steps_per_expert": plan.steps_per_expert,
        "request": asdict(request_of(plan)),
    }
    plain: dict[str, Any] = json.loads(json.dumps(asdict(plan) | derived))
    return plain


def _steps(
    experts: tuple[Expert, ...], boundary: float | None, solver: SolverName, num_steps: int, shift: float
) -> tuple[Step, ...]:
    schedule = sigmas_and_timesteps(solver, num_steps, shift)
    steps = []
    for index, timestep in enumerate(schedule.timesteps):
        is_high = boundary is None or timestep >= boundary * NUM_TRAIN_TIMESTEPS
        expert = experts[0] if is_high else experts[1]
        steps.append(
            Step(
                index=index,
                num_steps=num_steps,
                sigma=schedule.sigmas[index],
                sigma_next=schedule.sigmas[index + 1],
                timestep=timestep,
                expert=expert.name,
                guidance=expert.guidance,
            )
        )
    return tuple(steps)


def _latent_shape(config: ModelConfig, width: int, height: int, num_frames: int) -> tuple[int, int, int, int]:
    stride = config.vae.spatial_stride
    return config.vae.z_dim, (num_frames - 1) // config.vae.temporal_stride + 1, height // stride, width // stride


def _token_grid(config: DiTConfig, latent_shape: tuple[int, int, int, int]) -> tuple[int, int, int]:
    (_, frames, rows, columns), (patch_frames, patch_rows, patch_columns) = latent_shape, config.patch_size
    return frames // patch_frames, rows // patch_rows, columns // patch_columns
