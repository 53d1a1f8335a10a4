"""The door: `load` opens a model, `Pipeline.generate` makes a video with it."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from wanfast.checkpoint.lookup import Sources
from wanfast.config import SolverName
from wanfast.denoise import OnProgress, OnStep
from wanfast.dit.packed import multiplies_8_bit, multiplies_e4m3
from wanfast.errors import CheckpointError, RequestError
from wanfast.forecast import plan_here
from wanfast.generation import Inputs, OnPreview, generate_frames, generate_latents
from wanfast.images import ImageSource, load_image
from wanfast.loaded import LoadedModel
from wanfast.lora import Lora, LoraSpec, file_digest, open_loras
from wanfast.model import Model, open_model, vae_parameters
from wanfast.plan import EIGHT_BIT, Plan, Precision, Wish, dit_parameters, make_plan
from wanfast.precision import wish_of_auto
from wanfast.presets import PRESETS, apply_preset, preset_note
from wanfast.request import Request
from wanfast.residency import parse_bytes
from wanfast.settings import RecordedLora, settings_of
from wanfast.tiny import NAME
from wanfast.version import __version__
from wanfast.video import Video

_log = logging.getLogger("wanfast")


def load(
    model: str | Path | None = None,
    *,
    high: str | Path | None = None,
    low: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    precision: Literal["auto", "fp32", "exact", "fp8", "int8"] = "auto",
    vram: int | str | None = None,
    ram: int | str | None = None,
    device: str | torch.device | None = None,
) -> "Pipeline":
    """Open a model: headers and names are checked, no weight is read yet.

    Args:
        model: folder in the official, the Diffusers or ComfyUI's layout, one file (of a pair of experts, the other is
            found by its name), "t2v-a14b", "i2v-a14b", "ti2v-5b" or a Hugging Face Hub id, or a model in the box,
            "wan-tiny", "wan-tiny-i2v" or "wan-tiny-ti2v"; None is "wan-tiny".
        high: file of the high-noise expert, instead of `model`.
        low: file of the low-noise expert.
        vae: file, instead of the model's own or the one near it.
        text_encoder: file or folder, likewise.
        tokenizer: `tokenizer.json` or `spiece.model`, likewise.
        precision: "fp32" everywhere; "exact" = bf16 where the reference computes in bf16; "fp8" or "int8" = the DiT's
            blocks multiply in 8 bits, with the errors that docs/numerics.md states; "auto" is what the files were
            converted for, else "fp32" on a CPU and on a GPU "exact", or "int8" where that fits and "exact" does not,
            of which a warning tells.
        vram: in bytes or as "24GB". On a GPU all that a generation may take of it, weights, activations and the
            driver's share: what does not fit is streamed, cut finer, or refused. On a CPU, which has no memory of its
            own, what the blocks of the diffusion transformers may be copied to: with less than an expert they pass
            through that, else they are used in place, as they are with None. None is what is free of a GPU.
        ram: host memory that may be used, likewise, 2 GiB of it left to the system; on a CPU that is all there is.
            None is what is free.
        device: "cpu", "cuda", "cuda:1", ...; None is the GPU if there is one.

    Raises:
        RequestError: precision, vram or device is not as above, or the named files contradict each other.
        CheckpointError: the folder or one of its files cannot be found or used; the message names it.
    """
    sources = Sources(model=model, high=high, low=low, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
    return Pipeline(open_loaded(sources, precision=precision, vram=vram, device=device, ram=ram))


def open_loaded(
    sources: Sources,
    *,
    precision: str,
    vram: int | str | None,
    device: str | torch.device | None,
    ram: int | str | None = None,
) -> LoadedModel:
    """Open a model's files for a device and a precision; arguments and errors as in `load`."""
    if precision not in ("auto", *get_args(Precision)):
        raise RequestError(f"precision: must be auto, {', '.join(get_args(Precision))}, got {precision!r}; try auto")
    place = _device(device)
    budget = None if vram is None else parse_bytes("vram", vram)
    host_budget = None if ram is None else parse_bytes("ram", ram)
    opened = open_model(Sources(model=NAME) if sources == Sources() else sources)
    if unknown := sorted(opened.preset_loras.keys() - PRESETS.keys()):
        raise CheckpointError(f"{opened.path}: preset_loras: must be for {', '.join(PRESETS)}, got {unknown[0]!r}")
    if precision == "auto":
        wish = wish_of_auto(opened, place.type, has_e4m3=multiplies_e4m3(place), has_8_bit=multiplies_8_bit(place))
    else:
        wish = Wish(cast(Precision, precision))
    _warn_of_rounding(opened, wish.precision)
    return LoadedModel(opened, precision=wish.precision, device=place, vram=budget, ram=host_budget, wish=wish)


def _warn_of_rounding(model: Model, precision: str) -> None:
    """Say what 8 bits cost a large model whose files have 16 or 32."""
    is_large = dit_parameters(model.config.dit) > 10**9
    matrix = "blocks.0.ffn.0.weight"
    if precision in EIGHT_BIT and is_large and any(one.ref(matrix).stored_as is None for one in model.experts.values()):
        _log.warning(
            "precision %s: 16-bit weights are rounded each time they are loaded, which takes minutes;"
            " `wanfast convert --model MODEL --precision %s` does it once",
            precision,
            precision,
        )


def plan_for(
    model: LoadedModel, request: Request, loras: Sequence[Lora] = (), *, begun_in: Precision | None = None
) -> Plan:
    """Settle a request for an open model, and hold it to the memory that is free here, before anything is loaded.

    Args:
        model: open weights.
        request: what was asked.
        loras: opened for the model; they take memory beside its weights.
        begun_in: what the video was begun in, which it then keeps, whatever memory is free by now.

    Raises:
        RequestError: as in `make_plan`.
        MemoryBudgetError: it needs more, even with all weights streamed; the message says what would fit.
    """
    wish = model.wish if begun_in is None else Wish(begun_in)
    wished = make_plan(
        model.config,
        request,
        precision=wish.precision,
        device=str(model.device),
        vae_parameters=vae_parameters(model.config.vae),
    )
    plan, reason = plan_here(model, wished, wish, loras)
    if plan.precision != wished.precision:
        _log.warning("precision %s: %s", plan.precision, reason)
        _warn_of_rounding(model.model, plan.precision)
    return plan


def settings_for(model: LoadedModel, plan: Plan, inputs: Inputs, image_path: str | None) -> dict[str, Any]:
    """Gather what a clip says of itself; reads each LoRA file whole once, for its hash.

    Args:
        model: that makes the clip.
        plan: of the clip.
        inputs: it is made from.
        image_path: absolute path of the picture, if it came from a file.

    Returns:
        As `settings_of`.
    """
    return settings_of(
        plan,
        version=__version__,
        model_path=model.model.found_at,
        model_files=model.model.files,
        image=inputs.image,
        image_path=image_path,
        is_repeatable=inputs.latents is None and inputs.context is None,
        loras=[
            RecordedLora(
                path=str(lora.spec.path),
                sha256=file_digest(lora.spec.path),
                strength=lora.spec.strength,
                target=lora.spec.target,
                is_rank_stabilised=lora.spec.is_rank_stabilised,
                is_merged=lora.spec.is_merged,
            )
            for lora in inputs.loras
        ],
    )


def loras_for(
    model: Model, loras: Sequence[str | Path | LoraSpec], preset: str | None
) -> Sequence[str | Path | LoraSpec]:
    """The LoRAs of a generation: those asked for, or where none are the model's own for the preset, if it has any."""
    return loras or (() if preset is None else model.preset_loras.get(preset, ()))


def open_loras_for(
    model: Model, loras: Sequence[str | Path | LoraSpec], preset: str | None, *, merge: bool = False
) -> tuple[Lora, ...]:
    """Open `loras_for` a generation; errors as in `open_loras`."""
    return open_loras(loras_for(model, loras, preset), model.config, model.experts, merge=merge)


def warn_of_preset(model: LoadedModel, plan: Plan, loras: Iterable[Lora]) -> None:
    """Log a warning where file names speak of few steps and the plan has many."""
    readers = [*model.model.experts.values(), *(lora.reader for lora in loras)]
    note = preset_note(plan, [*model.model.made_from, *(f"{r.path.parent.name}/{r.path.name}" for r in readers)])
    if note is not None:
        _log.warning("%s", note)


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    is_there = device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < len(gpus))
    if not is_there:
        raise RequestError(
            f"device: must be one this machine has, got {str(name)!r}; there is {', '.join(['cpu', *gpus])}"
        )
    return device


class Pipeline:
    """A loaded model that makes videos."""

    def __init__(self, loaded: LoadedModel) -> None:
        """See `load`."""
        self.loaded = loaded

    def plan(self, request: Request) -> Plan:
        """Settle everything about a generation before any weight is touched.

        Raises:
            RequestError: an argument breaks a rule; the message names it and what would work.
            MemoryBudgetError: it needs more memory than there is; the message says what would fit.
        """
        return plan_for(self.loaded, request)

    def release(self) -> None:
        """Let every weight go from the device; the next generation reads them again."""
        self.loaded.release()

    def generate(
        self,
        prompt: str | None = None,
        *,
        negative_prompt: str | None = None,
        image: ImageSource | None = None,
        width: int | None = None,
        height: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance: float | None = None,
        guidance_high: float | None = None,
        guidance_low: float | None = None,
        shift: float | None = None,
        solver: SolverName | None = None,
        seed: int | None = None,
        fps: int | None = None,
        attention_density: float | None = None,
        preset: str | None = None,
        loras: Sequence[str | Path | LoraSpec] = (),
        merge_loras: bool = False,
        latents: Tensor | None = None,
        context: Tensor | None = None,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
        preview: OnPreview | None = None,
        output: Literal["video", "latents"] = "video",
    ) -> Video | Tensor:
        """Make one video. What is None is the model's own value, which for the Wan models is the reference's.

        Args:
            prompt: what to show; not needed with `context`.
            negative_prompt: what to avoid; "" and None are Wan's own list.
            image: first frame (path, PIL image or uint8 [H, W, 3]); I2V needs one, TI2V may have one, T2V has none.
            width: pixels; with an image, width x height is an area and the aspect is the image's.
            height: pixels.
            num_frames: 4n + 1.
            num_inference_steps: solver steps.
            guidance: of every expert.
            guidance_high: of the high-noise expert.
            guidance_low: of the low-noise expert.
            shift: of the noise schedule, > 0.
            solver: "unipc", "dpmpp" or "euler".
            seed: of the noise; None draws one, which the video's settings then hold.
            fps: frames per second of the file; changes no frame.
            attention_density: above 0, up to 1: share of the blocks of 64 keys that each block of 128 tokens attends to
                in self-attention, those of largest guessed weight and its own; 1 and None are all. The first fifth of
                the steps and the first block of the DiT stay dense. It changes the video: docs/numerics.md.
            preset: "lightning4": 4 steps, euler, shift 5 and guidance 1 where these are not given, and in place of
                `loras` that are not given those that the model brings along for it, as wan-tiny does.
            loras: LoRA files for this generation alone, as "file.safetensors:0.8@high", paths or `LoraSpec`s; none
                changes a weight of the model, nothing is loaded anew.
            merge_loras: add every LoRA to copies of the weights, in fp32 and rounded once, in place of computing it
                beside them; not for quantised weights. The copies live while they are used.
            latents: initial noise [C, F, H, W], fp32, instead of the one the seed gives.
            context: prompt and negative prompt encoded [2, T <= 512, text channels], instead of the prompts.
            on_step: called after each step with the step and a copy of its latents [C, F, H, W], fp32.
            on_progress: called with a stage's name, its parts done and its parts in all.
            preview: called after each step with the step and small pictures of the video as it predicts it, uint8
                [F, H, W, 3] in the size of the latents; milliseconds each.
            output: "latents" stops before decoding.

        Returns:
            A `Video`, or for "latents" the clean latents [C, F, H, W], fp32.

        Raises:
            RequestError: an argument breaks a rule; nothing has been computed then.
            MediaError: the image cannot be read.
            MemoryBudgetError: it needs more memory than there is; the message says what would fit.
            CheckpointError: a tensor is not finite or cannot be read, or a LoRA is not one for this model; the message
                names file and tensor.
        """
        if output not in ("video", "latents"):
            raise RequestError(f"output: must be video or latents, got {output!r}")
        if context is not None and (prompt is not None or negative_prompt is not None):
            raise RequestError("context: must not be given beside a prompt, got both; give one of them")
        picture = None if image is None else load_image(image)
        request = Request(
            "" if prompt is None and context is None else prompt,
            negative_prompt=negative_prompt,
            image_size=None if picture is None else picture.size,
            width=width,
            height=height,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance=guidance,
            guidance_high=guidance_high,
            guidance_low=guidance_low,
            shift=shift,
            solver=solver,
            seed=seed,
            fps=fps,
            attention_density=attention_density,
        )
        opened = open_loras_for(self.loaded.model, loras, preset, merge=merge_loras)
        plan = plan_for(self.loaded, apply_preset(request, preset), opened)
        warn_of_preset(self.loaded, plan, opened)
        inputs = Inputs(image=picture, latents=latents, context=context, loras=opened)
        told: dict[str, Any] = {"on_step": on_step, "on_progress": on_progress, "on_preview": preview}
        if output == "latents":
            return generate_latents(self.loaded, plan, inputs, **told)
        frames = _collect(generate_frames(self.loaded, plan, inputs, **told), plan)
        image_path = str(Path(image).absolute()) if isinstance(image, str | os.PathLike) else None
        return Video(frames, plan.fps, settings_for(self.loaded, plan, inputs, image_path))


def _collect(chunks: Iterable[Tensor], plan: Plan) -> Tensor:
    """Put all frames into one tensor as they come, which lets a GPU's pinned memory go for the next."""
    frames = torch.empty(plan.num_frames, plan.height, plan.width, 3, dtype=torch.uint8)
    done = 0
    for chunk in chunks:
        frames[done : done + len(chunk)] = chunk
        done += len(chunk)
    return frames
