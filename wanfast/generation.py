"""One video, from plan to frames: the main path of wanfast, top to bottom.

    plan -> context, picture, noise -> denoise, step by step -> decode, chunk by chunk -> frames

What could be decided without a tensor was decided in the plan; where weights are is `LoadedModel`'s business.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from wanfast.denoise import Conditions, OnProgress, OnState, OnStep, Stretch, denoise, experts_of_passes
from wanfast.dit.condition import image_condition
from wanfast.errors import MemoryBudgetError, NotFiniteError, RequestError
from wanfast.forecast import bound_blocks, budget_here, tiles_here
from wanfast.images import image_to_tensor, resize_bicubic, resize_lanczos_crop
from wanfast.loaded import LoadedModel
from wanfast.lora import Lora
from wanfast.out_of_memory import OutOfMemory, attempt
from wanfast.plan import Plan, ti2v_resize
from wanfast.prompts import encode_prompts
from wanfast.rates import StageClock, note_rates
from wanfast.residency import free_memory, gigabytes
from wanfast.run_state import RunState
from wanfast.solvers import Step
from wanfast.vae.encode import encode_chunks
from wanfast.vae.pixels import decode_pixels
from wanfast.vae.preview import fit_factors, latents_to_rgb
from wanfast.vae.tiles import most_tiles
from wanfast.vae.weights import load_vae

_log = logging.getLogger("wanfast")

OnPreview = Callable[[Step, Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a generation starts from besides its plan."""

    image: Image.Image | None = None  # the picture of image to video, RGB, of the size the plan was made with
    latents: Tensor | None = None  # noise [C, F, H, W], fp32, instead of the one the seed gives
    context: Tensor | None = (
        None  # prompt and negative prompt encoded [2, T, text channels], instead of the plan's prompts
    )
    loras: tuple[Lora, ...] = ()  # opened for the model
    state: RunState | None = None  # of a run that was stopped, to go on from


@torch.no_grad()
def generate_frames(
    model: LoadedModel,
    plan: Plan,
    inputs: Inputs,
    *,
    on_step: OnStep | None = None,
    on_state: OnState | None = None,
    on_progress: OnProgress | None = None,
    on_preview: OnPreview | None = None,
) -> Iterator[Tensor]:
    """Make the video of a plan, chunk by chunk; arguments as in `generate_latents`.

    Yields:
        uint8 [1, height, width, 3], then [4, height, width, 3] per further latent frame, on the CPU.
    """
    clock = StageClock(on_progress, idle=lambda: model.traffic.idle_seconds)
    latents = generate_latents(
        model, plan, inputs, on_step=on_step, on_state=on_state, on_progress=clock, on_preview=on_preview
    )
    if model.device.type == "cuda":
        model.release_experts()  # the VAE's activations need the room
    yield from decode_frames(model, plan, latents, clock)
    note_rates(model.config, plan, clock)


@torch.no_grad()
def generate_latents(
    model: LoadedModel,
    plan: Plan,
    inputs: Inputs,
    *,
    on_step: OnStep | None = None,
    on_state: OnState | None = None,
    on_progress: OnProgress | None = None,
    on_preview: OnPreview | None = None,
) -> Tensor:
    """Run a plan up to the latents that are ready to decode.

    Args:
        model: open weights.
        plan: settled for this model.
        inputs: picture, noise, context, LoRAs and the state of a stopped run where they are given.
        on_step: called after each step with the step and a copy of its latents [C, F, H, W], fp32.
        on_state: called after each step with all that the steps after it need; it is not written to.
        on_progress: called with a stage's name, its parts done and its parts in all.
        on_preview: called after each step with the step and small pictures of the video it predicts, uint8
            [F, H, W, 3], one for each latent frame and a pixel for each latent.

    Returns:
        [C, F, H, W], fp32, normalised.

    Raises:
        RequestError: the noise or the context has the wrong shape.
        MemoryBudgetError: it needs more memory than there is, with its LoRAs; or that turns out on the way, and less at
            a time does not help.
        CheckpointError: a tensor is not finite or cannot be read; the message names file and tensor.
        NumericsError: the latents of a step are not finite.
    """
    make = partial(_make_latents, model, plan, inputs, on_step, on_state, on_progress or _no_progress, on_preview)
    with own_arithmetic(model):
        latents = attempt(make)
    if isinstance(latents, OutOfMemory):
        raise no_memory(model, f"{plan.width}x{plan.height} with {plan.num_frames} frames", latents)
    return latents


def _make_latents(
    model: LoadedModel,
    plan: Plan,
    inputs: Inputs,
    on_step: OnStep | None,
    on_state: OnState | None,
    progress: OnProgress,
    on_preview: OnPreview | None,
) -> Tensor:
    start = inputs.state or RunState(0, _noise(plan, inputs), None)
    _check_state(plan, start)
    model.compute_in(plan.precision)
    if start.next_step == len(plan.steps):
        return start.latents[0].to(model.device)
    budget = budget_here(model, plan, inputs.loras)
    bound_blocks(model, [budget])
    if inputs.context is None:
        (contexts,) = encode_prompts(model, [plan], progress)
    else:
        contexts = _checked_context(model, inputs.context)
    picture = None if inputs.image is None else encode_image(model, plan, inputs.image, progress)
    contexts = [context.to(model.device) for context in contexts]
    stretches = [Stretch(plan.steps[start.next_step :], budget.chunking)]
    pictures = None if on_preview is None else _as_pictures(model, on_preview)
    with model.passes(experts_of_passes(stretches)):
        end, _ = denoise(
            model,
            plan,
            start,
            stretches,
            Conditions(contexts=contexts, picture=picture, loras=inputs.loras),
            on_step=on_step,
            on_state=on_state,
            progress=progress,
            on_prediction=pictures,
        )
    return end.latents[0]


def no_memory(model: LoadedModel, what: str, failure: OutOfMemory) -> MemoryBudgetError:
    """Say what memory ran out in where nothing less can be tried."""
    return MemoryBudgetError(
        f"{what}: out of memory ({failure.reason}), {gigabytes(free_memory(model.device))} are free; try a smaller size"
        " or fewer frames, or end what else takes memory"
    )


def _as_pictures(model: LoadedModel, on_preview: OnPreview) -> OnStep:
    """Turn what is told of previews into what is told of latents."""
    vae = load_vae(model.model.vae, model.config.vae, device=model.device, encoder=False)
    factors = fit_factors(vae, model.device)
    return lambda step, latents: on_preview(step, latents_to_rgb(latents, factors))


@contextmanager
def own_arithmetic(model: LoadedModel) -> Iterator[None]:
    """Keep the caller's settings of torch out of the numbers: dtypes are those of the precision, nothing else's."""
    if torch.get_default_dtype() != torch.float32:
        raise RequestError(
            f"torch's default dtype: must be torch.float32, got {torch.get_default_dtype()};"
            " call torch.set_default_dtype(torch.float32)"
        )
    with torch.autocast(model.device.type, enabled=False):
        yield


def encode_image(model: LoadedModel, plan: Plan, image: Image.Image, progress: OnProgress) -> Tensor:
    """Encode the picture into what the model is conditioned on.

    Returns:
        I2V: mask and latents of the picture followed by grey frames [1, 4 + C, F, H, W].
        TI2V: latents of the picture alone [1, C, 1, H, W].
    """
    progress("image", 0, 1)
    if plan.task == "i2v":
        stride = model.config.vae.temporal_stride
        first = resize_bicubic(image_to_tensor(image), plan.width, plan.height)[None, :, None].to(model.device)
        grey = first.new_zeros(1, 3, stride, plan.height, plan.width)
        chunks = [first, *[grey] * ((plan.num_frames - 1) // stride)]
        picture = image_condition(_encode_in_less_memory(model, plan, chunks), temporal_stride=stride)
    else:
        resized, box = ti2v_resize(image.width, image.height, plan.width, plan.height)
        pixels = resize_lanczos_crop(image, resized, box)
        picture = _encode_in_less_memory(model, plan, [pixels[None, :, None].to(model.device)])
    progress("image", 1, 1)
    return picture


def draw_noise(plan: Plan) -> Tensor:
    """Draw the initial latents [1, C, F, H, W], fp32, on the CPU: one seed, one noise, anywhere (docs/adr/0003)."""
    generator = torch.Generator().manual_seed(plan.seed)
    return torch.randn(plan.latent_shape, generator=generator, dtype=torch.float32)[None]


@torch.no_grad()
def decode_frames(
    model: LoadedModel, plan: Plan, latents: Tensor, on_progress: OnProgress | None = None
) -> Iterator[Tensor]:
    """Decode latents [C, F, H, W] chunk by chunk; yields as `generate_frames` does."""
    progress = on_progress or _no_progress
    progress("decode", 0, plan.num_frames)
    num_tiles, done = tiles_here(model, plan, "decode"), 0
    chunks: Iterator[Tensor] | None = None
    while done < plan.num_frames:
        with own_arithmetic(model):  # entered anew for each chunk: what runs between two is the caller's
            if chunks is None:
                chunks = _decode(model, plan, latents, num_tiles, done, progress)
            try:
                frames = attempt(partial(next, chunks))
            except NotFiniteError:
                if not _widen_vae(model, "frames"):
                    raise
                chunks = None
                continue
        if isinstance(frames, OutOfMemory):
            num_tiles, chunks = _more_tiles(model, plan, num_tiles, "decode", frames), None
            continue
        model.refuse_written()
        done += len(frames)
        yield frames


def _decode(
    model: LoadedModel, plan: Plan, latents: Tensor, num_tiles: int, skip: int, progress: OnProgress
) -> Iterator[Tensor]:
    """Decode from frame `skip` on; everything, reading the decoder too, is done when the first chunk is asked for."""
    yield from decode_pixels(
        model.vae_decoder(),
        latents[None].to(model.device),
        num_tiles,
        skip=skip,
        on_frames=lambda share: progress("decode", share, plan.num_frames),
    )


def _encode_in_less_memory(model: LoadedModel, plan: Plan, chunks: Sequence[Tensor]) -> Tensor:
    """Encode a picture, or a video that begins with it; when memory runs out, in more strips."""
    num_tiles = tiles_here(model, plan, "picture")
    while True:
        encoded = attempt(lambda: encode_chunks(model.vae_encoder(), chunks, num_tiles))  # noqa: B023
        if not isinstance(encoded, OutOfMemory):
            if not bool(encoded.isfinite().all()) and _widen_vae(model, "latents of the picture"):
                continue
            return encoded
        num_tiles = _more_tiles(model, plan, num_tiles, "picture", encoded)


def _widen_vae(model: LoadedModel, what: str) -> bool:
    """Take numbers that left the range of 16 bits again in fp32; say whether there is anything to be had from it."""
    if not model.widen_vae():
        return False
    _log.warning("%s: not finite in 16 bits; the VAE computes in fp32 from here on", what)
    return True


def _more_tiles(model: LoadedModel, plan: Plan, num_tiles: int, stage: str, failure: OutOfMemory) -> int:
    """Let the experts' weights go, or take the picture in more strips: give in how many."""
    most = most_tiles(*plan.latent_shape[2:])
    if model.release_experts():
        remedy, more = "it is done again without the experts' weights", num_tiles
    elif num_tiles < most:
        more = min(2 * num_tiles, most)
        remedy = f"the picture is taken in {more} strips"
    else:
        raise MemoryBudgetError(
            f"{stage}: out of memory ({failure.reason}) in the narrowest strips, {num_tiles} of them;"
            f" {gigabytes(free_memory(model.device))} are free; try a smaller size, or end what else takes memory"
        )
    _log.warning("%s: out of memory (%s); %s", stage, failure.reason, remedy)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return more


def _no_progress(stage: str, done: int, total: int) -> None:
    pass


def _refuse_other_types(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise RequestError(f"{name}: must be a torch.Tensor, got {type(value).__name__}; torch.as_tensor makes one")


def _noise(plan: Plan, inputs: Inputs) -> Tensor:
    return draw_noise(plan) if inputs.latents is None else _checked_latents(plan, inputs.latents)


def _check_state(plan: Plan, state: RunState) -> None:
    is_right = tuple(state.latents.shape) == (1, *plan.latent_shape) and state.next_step <= len(plan.steps)
    if not is_right:
        raise RequestError(
            f"state: must be of this plan, {len(plan.steps)} steps with latents {[1, *plan.latent_shape]},"
            f" got {list(state.latents.shape)} before step {state.next_step + 1}"
        )


def _checked_latents(plan: Plan, latents: Tensor) -> Tensor:
    _refuse_other_types("latents", latents)
    if tuple(latents.shape) != plan.latent_shape or not latents.is_floating_point():
        raise RequestError(
            f"latents: must be floats of shape {list(plan.latent_shape)} for this plan,"
            f" got {latents.dtype} {list(latents.shape)}"
        )
    if not bool(torch.isfinite(latents).all()):
        raise RequestError("latents: must be finite, got NaN or infinity; draw them with torch.randn")
    return latents.detach().float()[None]


def _checked_context(model: LoadedModel, context: Tensor) -> list[Tensor]:
    _refuse_other_types("context", context)
    dit = model.config.dit
    is_right = context.ndim == 3 and len(context) == 2 and 1 <= context.shape[1] <= dit.text_len
    if not is_right or context.shape[2] != dit.text_dim or not context.is_floating_point():
        raise RequestError(
            f"context: must be floats [2, T <= {dit.text_len}, {dit.text_dim}] (prompt and negative prompt, zeros past"
            f" the end of each), got {context.dtype} {list(context.shape)}"
        )
    if not bool(torch.isfinite(context).all()):
        raise RequestError("context: must be finite, got NaN or infinity; encode the prompts again")
    prompt, negative = context.detach().to(model.device)
    return [prompt[None], negative[None]]
