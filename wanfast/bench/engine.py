"""What an engine is to the benchmark, and wanfast as one."""

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from wanfast.bench.case import Case, Tier, open_case, plan_of
from wanfast.bench.difference import Frames
from wanfast.bench.measure import Footprint, Meter, Stopwatch
from wanfast.forecast import budget_here
from wanfast.generation import Inputs, decode_frames, generate_latents
from wanfast.loaded import LoadedModel
from wanfast.lora import Lora
from wanfast.pipeline import open_loras_for
from wanfast.plan import Plan
from wanfast.text.tokenizer import clean_prompt, tokenize
from wanfast.text.umt5 import encode_texts
from wanfast.video import write_video


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a case: what it took and what it made."""

    seconds: dict[str, float]  # by stage, "total" included
    steps: tuple[float, ...]  # seconds of each denoising step; none where the engine does not tell them
    footprint: Footprint
    digest: str  # of the frames
    frames: Frames | None  # where they were asked for
    context: Tensor | None = None  # what the prompts were encoded to [2, T, C], fp32 on the CPU, where it can be shared
    copied_bytes: int | None = None  # of blocks, host to device; None where the engine does not count them
    stall_seconds: float | None = None  # in which the computation waited for a copy
    notes: tuple[str, ...] = ()  # what the report must say


class Engine(Protocol):
    """Something that makes the case's video; it lives in a process of its own."""

    def load(self) -> None:
        """Open the weights."""

    def run(self, watch: Stopwatch, noise: Tensor, context: Tensor | None, clip: Path) -> "Made":
        """Make the video once and write it.

        Args:
            watch: gets the seconds of the stages and the marks of the steps.
            noise: initial latents [C, F, H, W], fp32 on the CPU.
            context: what the denoising starts from instead of the engine's own encodings, which are made all the same.
            clip: the mp4 to write.
        """

    def step_aside(self) -> None:
        """Let the device's memory go as far as the next run would bring it back by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a run made, and what an engine counts of itself."""

    frames: Frames
    context: Tensor | None = None
    copied_bytes: int | None = None
    stall_seconds: float | None = None
    notes: tuple[str, ...] = ()


class WanfastEngine:
    """wanfast in one tier."""

    def __init__(self, case: Case, tier: Tier) -> None:
        """Read nothing yet."""
        self._case, self._tier = case, tier
        self._model: LoadedModel | None = None
        self._plan: Plan | None = None
        self._loras: tuple[Lora, ...] = ()

    def load(self) -> None:
        """Open the weights and settle the plan, and hold it to the memory that is free."""
        self._model = open_case(self._case, self._tier.precision)
        self._plan = plan_of(self._case, self._tier)
        self._loras = open_loras_for(self._model.model, self._case.loras, self._tier.preset)
        budget_here(self._model, self._plan, self._loras)

    @torch.no_grad()
    def run(self, watch: Stopwatch, noise: Tensor, context: Tensor | None, clip: Path) -> Made:
        """Make the video once; see `Engine`."""
        model, plan = self._model, self._plan
        assert model is not None and plan is not None, "load comes first"
        before = model.traffic
        with watch.stage("text"):
            own = _encode(model, plan)
        denoised_from = own if context is None else context
        inputs = Inputs(image=self._case.picture, latents=noise, context=denoised_from, loras=self._loras)

        def tell(stage: str, done: int, total: int) -> None:
            if stage == "image":
                (watch.begin if done == 0 else watch.end)("image")
            elif stage == "steps":
                watch.mark()

        latents = generate_latents(model, plan, inputs, on_progress=tell)
        if model.device.type == "cuda":
            model.release_experts()  # as generate does
        frames = write_clip(watch, decode_frames(model, plan, latents), clip, plan.fps)
        after = model.traffic
        return Made(
            frames=frames,
            context=own.float().cpu(),
            copied_bytes=after.copied_bytes - before.copied_bytes,
            stall_seconds=after.stall_seconds - before.stall_seconds,
        )

    def step_aside(self) -> None:
        """Let the device's memory go; what is in host memory stays."""
        if self._model is not None and self._model.device.type == "cuda":
            self._model.release_experts()
            torch.cuda.empty_cache()


def _encode(model: LoadedModel, plan: Plan) -> Tensor:
    """Encode prompt and negative prompt [2, T, C], zeros past the end of each; never from the cache on disk."""
    limit = model.config.dit.text_len
    texts = (plan.prompt, plan.negative_prompt)
    ids = [tokenize(model.model.tokenizer, clean_prompt(text), limit).ids for text in texts]
    outer, blocks = model.text_encoder()
    encoded = encode_texts(ids, outer, blocks, model.config.text)
    return torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True)


def write_clip(watch: Stopwatch, chunks: Iterable[Tensor], clip: Path, fps: int) -> Frames:
    """Write a video as it is decoded, and time the two apart: decoding is what `chunks` is waited for.

    The clock is read without waiting for the device, which may decode the next frames while these are written.

    Returns:
        The frames, uint8 [F, H, W, 3].
    """
    kept: list[Tensor] = []
    began, waited = time.perf_counter(), 0.0

    def decoded() -> Iterator[Tensor]:
        nonlocal waited
        waiting = iter(chunks)
        while True:
            asked = time.perf_counter()
            chunk = next(waiting, None)
            waited += time.perf_counter() - asked
            if chunk is None:
                return
            kept.append(chunk.clone())  # its own memory, which may be pinned, is the next chunk's
            yield chunk

    write_video(clip, decoded(), fps=fps, settings={})
    watch.add("decode", waited)
    watch.add("write", time.perf_counter() - began - waited)
    frames: Frames = torch.cat(kept).numpy()
    return frames


def measured_run(
    engine: Engine, device: torch.device, noise: Tensor, context: Tensor | None, clip: Path, *, keeps_frames: bool
) -> Run:
    """Let an engine make the video once, and measure it."""
    meter, watch = Meter(device), Stopwatch(device)
    meter.start()
    try:
        with watch.stage("total"):
            made = engine.run(watch, noise, context, clip)
    finally:
        footprint = meter.stop()
    engine.step_aside()
    clip.unlink(missing_ok=True)
    return Run(
        seconds=watch.seconds,
        steps=tuple(watch.steps),
        footprint=footprint,
        digest=hashlib.sha256(np.ascontiguousarray(made.frames).data).hexdigest(),
        frames=made.frames if keeps_frames else None,
        context=made.context,
        copied_bytes=made.copied_bytes,
        stall_seconds=made.stall_seconds,
        notes=made.notes,
    )
