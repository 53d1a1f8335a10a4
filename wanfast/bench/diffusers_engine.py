"""diffusers as the reference: its own pipeline, text encoder, scheduler and VAE over the case's weights."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanfast.bench.case import Case, open_case, plan_of
from wanfast.bench.diffusers_loras import load_loras
from wanfast.bench.diffusers_pipeline import build_pipeline, hold_to_schedule, import_libraries, place_pipeline
from wanfast.bench.engine import Made, write_clip
from wanfast.bench.measure import Stopwatch
from wanfast.lora import open_loras
from wanfast.plan import Plan

_SAME_SIGMA = 1e-5


class DiffusersEngine:
    """A WanPipeline, or a WanImageToVideoPipeline where the case has a picture."""

    def __init__(self, case: Case) -> None:
        """Import diffusers, which takes seconds that are no part of a run, and read nothing yet."""
        for library in ("TRANSFORMERS", "DIFFUSERS"):
            os.environ.setdefault(f"{library}_VERBOSITY", "error")  # of packages that a pipeline of Wan does not need
        import_libraries()
        self._case = case
        self._device = torch.device(case.device)
        self._pipeline: Any = None
        self._plan: Plan = plan_of(case)
        self._notes: tuple[str, ...] = ()

    def load(self) -> None:
        """Build the pipeline over the case's weights; on a GPU, put it where the case says."""
        dtype = torch.float32 if self._case.reference_precision == "fp32" else torch.bfloat16
        model = open_case(self._case, self._plan.precision).model
        takes_picture = self._case.picture is not None
        self._pipeline = build_pipeline(model, self._plan, dtype, takes_picture=takes_picture)
        self._notes = load_loras(self._pipeline, open_loras(self._case.loras, self._case.config))
        place_pipeline(self._pipeline, self._case.placement, self._device)
        if (distance := hold_to_schedule(self._pipeline.scheduler, self._plan)) > _SAME_SIGMA:
            says = (
                f"its own sigmas differ from the official ones by up to {distance:.2g}; it was run on the official ones"
            )
            self._notes += (says,)

    @torch.no_grad()
    def run(self, watch: Stopwatch, noise: Tensor, context: Tensor | None, clip: Path) -> Made:
        """Make the video once; see `wanfast.bench.engine.Engine`."""
        pipeline, plan = self._pipeline, self._plan
        guidance = [expert.guidance for expert in plan.experts]
        with watch.stage("text"):
            prompt, negative = pipeline.encode_prompt(
                plan.prompt,
                plan.negative_prompt,
                do_classifier_free_guidance=guidance[0] > 1,
                max_sequence_length=self._case.config.dit.text_len,
                device=self._device,
            )
        own = torch.cat([prompt, torch.zeros_like(prompt) if negative is None else negative]).float().cpu()
        if context is not None:
            length = prompt.shape[1]
            padded = torch.nn.functional.pad(context, (0, 0, 0, length - context.shape[1])).to(prompt)
            prompt, negative = padded[:1], padded[1:]
        arguments: dict[str, Any] = {
            "prompt_embeds": prompt,
            "negative_prompt_embeds": None if guidance[0] <= 1 else negative,
            "height": plan.height,
            "width": plan.width,
            "num_frames": plan.num_frames,
            "num_inference_steps": len(plan.steps),
            "guidance_scale": guidance[0],
            "guidance_scale_2": guidance[1] if len(guidance) > 1 else None,
            "latents": noise[None],
            "output_type": "np",
            "max_sequence_length": self._case.config.dit.text_len,
        }
        if self._case.picture is not None:
            arguments["image"] = self._case.picture
        with _watched(pipeline, watch) as on_step_end:
            video = pipeline(**arguments, callback_on_step_end=on_step_end).frames[0]
        # The fraction is dropped as the official code and wanfast do.
        frames = torch.from_numpy(video).mul(255.0).to(torch.uint8)
        return Made(frames=write_clip(watch, [frames], clip, plan.fps), context=own, notes=self._notes)

    def step_aside(self) -> None:
        """Let the allocator's cache go; weights go by themselves, where the placement says so."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class _watched:
    """Times what happens inside a call of the pipeline; the methods are the pipeline's own again afterwards."""

    def __init__(self, pipeline: Any, watch: Stopwatch) -> None:
        """Change nothing yet."""
        self._pipeline, self._watch = pipeline, watch
        self._hooks: list[Any] = []
        self._has_begun = False

    def __enter__(self) -> Any:
        vae, watch = self._pipeline.vae, self._watch
        for name, stage in (("encode", "image"), ("decode", "decode")):
            vae.__dict__[name] = _timed(getattr(vae, name), watch, stage)
        for transformer in (self._pipeline.transformer, self._pipeline.transformer_2):
            if transformer is not None:
                self._hooks.append(transformer.register_forward_pre_hook(self._before_forward))
        return self._after_step

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for name in ("encode", "decode"):
            self._pipeline.vae.__dict__.pop(name, None)

    def _before_forward(self, *call: object) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._watch.mark()

    def _after_step(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self._watch.mark()
        return tensors


def _timed(method: Any, watch: Stopwatch, stage: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with watch.stage(stage):
            return method(*args, **kwargs)

    return call
