"""One video, from plan to frames: the main path of wanfast, top to bottom.

    plan -> context, picture, noise -> denoise, step by step -> decode, chunk by chunk -> frames

What could be decided without a tensor was decided in the plan; where weights are is `LoadedModel`'s business.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from wanfast.denoise import Conditions, OnProgress, OnState, OnStep, denoise, experts_of_passes, is_out_of_memory
from wanfast.dit.condition import image_condition
from wanfast.errors import MemoryBudgetError, RequestError
from wanfast.forecast import bound_blocks, tiles_here
from wanfast.images import image_to_tensor, resize_bicubic, resize_lanczos_crop
from wanfast.loaded import LoadedModel
from wanfast.lora import Lora
from wanfast.plan import Plan, ti2v_resize
from wanfast.prompt_cache import context_file, read_context, write_context
from wanfast.rates import StageClock, note_rates
from wanfast.run_state import RunState
from wanfast.solvers import Step
from wanfast.text.tokenizer import clean_prompt, tokenize
from wanfast.text.umt5 import encode_texts
from wanfast.vae.encode import encode_chunks
from wanfast.vae.pixels import decode_pixels
from wanfast.vae.preview import fit_factors, latents_to_rgb
from wanfast.vae.tiles import most_tiles
from wanfast.vae.weights import load_vae

_log = logging.getLogger("wanfast")

Block = TypeVar("Block")
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
    clock = StageClock(on_progress)
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
        CheckpointError: a tensor is not finite or cannot be read; the message names file and tensor.
        NumericsError: the latents of a step are not finite.
    """
    progress = on_progress or _no_progress
    with own_arithmetic(model):
        start = inputs.state or RunState(0, _noise(plan, inputs), None)
        _check_state(plan, start)
        if start.next_step == len(plan.steps):
            return start.latents[0].to(model.device)
        if inputs.context is None:
            (contexts,) = encode_prompts(model, [plan], progress)
        else:
            contexts = _checked_context(model, inputs.context)
        picture = None if inputs.image is None else encode_image(model, plan, inputs.image, progress)
        conditions = Conditions(contexts=contexts, picture=picture, loras=inputs.loras)
        steps = plan.steps[start.next_step :]
        pictures = None if on_preview is None else _as_pictures(model, on_preview)
        chunking = bound_blocks(model, [plan], inputs.loras)
        with model.passes(experts_of_passes(steps, chunking)):
            end = denoise(
                model,
                plan,
                start,
                steps,
                conditions,
                chunking,
                on_step=on_step,
                on_state=on_state,
                progress=progress,
                on_prediction=pictures,
            )
        return end.latents[0]


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


def encode_prompts(model: LoadedModel, plans: Sequence[Plan], progress: OnProgress) -> list[list[Tensor]]:
    """Encode the prompt and the negative prompt of each plan in one pass over the encoder.

    A prompt that was encoded before, by the same encoder on the same machine, is read from the disk.

    Returns:
        For each plan its prompt and its negative prompt, [1, T, text channels] each with its own T.
    """
    named = [("prompt", plan.prompt) for plan in plans] + [("negative_prompt", plan.negative_prompt) for plan in plans]
    ids = [_token_ids(model, name, text) for name, text in named]
    config, dtype = model.config.text, model.compute_dtype
    files = {prompt: context_file(model.model.text, config, prompt, dtype, model.device) for prompt in ids}
    stored = {prompt: read_context(file, len(prompt), config, dtype) for prompt, file in files.items()}
    contexts = {prompt: context for prompt, context in stored.items() if context is not None}
    missing = [prompt for prompt in files if prompt not in contexts]
    if missing:
        outer, blocks = model.text_encoder()
        counted = _counted(blocks, "text", config.num_layers, progress)
        for prompt, context in zip(missing, encode_texts(missing, outer, counted, config), strict=True):
            contexts[prompt] = context
            if (file := files[prompt]) is not None:
                write_context(file, context)
    on_device = [contexts[prompt][None].to(model.device) for prompt in ids]
    return [list(pair) for pair in zip(on_device[: len(plans)], on_device[len(plans) :], strict=True)]


def _token_ids(model: LoadedModel, name: str, text: str) -> tuple[int, ...]:
    limit = model.config.dit.text_len
    tokens = tokenize(model.model.tokenizer, clean_prompt(text), limit)
    if tokens.is_truncated:
        _log.warning("%s: the model reads %d tokens, the last %d are cut off", name, limit, tokens.num_dropped)
    return tokens.ids


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
                chunks = decode_pixels(
                    model.vae_decoder(),
                    latents[None].to(model.device),
                    num_tiles,
                    skip=done,
                    on_frames=lambda share: progress("decode", share, plan.num_frames),
                )
            frames, reason = _next_or_out_of_memory(chunks)
        if frames is None:
            num_tiles, chunks = _more_tiles(model, plan, num_tiles, f"decode: out of memory ({reason})"), None
            continue
        done += len(frames)
        yield frames


def _next_or_out_of_memory(chunks: Iterator[Tensor]) -> tuple[Tensor | None, str]:
    """Give the next chunk, or None and why; what the failed one had allocated is free by then."""
    try:
        return next(chunks), ""
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None, str(error).splitlines()[0]


def _encode_in_less_memory(model: LoadedModel, plan: Plan, chunks: Sequence[Tensor]) -> Tensor:
    """Encode a picture, or a video that begins with it; when memory runs out, in more strips."""
    vae, num_tiles = model.vae_encoder(), tiles_here(model, plan, "picture")
    while True:
        try:
            return encode_chunks(vae, chunks, num_tiles)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        num_tiles = _more_tiles(model, plan, num_tiles, f"picture: out of memory ({reason})")


def _more_tiles(model: LoadedModel, plan: Plan, num_tiles: int, what: str) -> int:
    most = most_tiles(*plan.latent_shape[2:])
    if num_tiles >= most:
        raise MemoryBudgetError(f"{what}; try a smaller size")
    more = min(2 * num_tiles, most)
    _log.warning("%s; the picture is taken in %d strips", what, more)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return more


def _counted(blocks: Iterator[Block], stage: str, total: int, progress: OnProgress) -> Iterator[Block]:
    """Pass blocks on, saying which one is in use."""
    for index, block in enumerate(blocks):
        progress(stage, index, total)
        yield block
    progress(stage, total, total)


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
