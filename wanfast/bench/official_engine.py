"""A checkout of the official code as a reference: its own classes, on the case's checkpoint and noise.

Source: Wan-Video/Wan2.2, generate.py and wan/text2video.py, image2video.py, textimage2video.py: the arguments of the
classes and of their `generate`, the order of the guidance pair (low noise first), and that the noise is the one normal
tensor of the latents' shape that `generate` draws with torch.randn.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanfast.bench.case import Case, plan_of
from wanfast.bench.engine import Made, write_clip
from wanfast.bench.measure import Stopwatch
from wanfast.errors import RequestError
from wanfast.pixels import to_uint8

_CLASSES = {"t2v": ("t2v-A14B", "WanT2V"), "i2v": ("i2v-A14B", "WanI2V"), "ti2v": ("ti2v-5B", "WanTI2V")}
_FLASH = ("flash_attn", "flash_attn_interface")
_SOLVERS = {"unipc": "unipc", "dpmpp": "dpm++"}


def check_checkout(checkout: Path, case: Case) -> None:
    """Refuse what the official code could not run, before anything is loaded.

    Raises:
        RequestError: the folder is no checkout, the machine or an installed package is not what its code needs, or the
            case is one that it does not know.
    """
    if not (checkout / "generate.py").is_file() or not (checkout / "wan").is_dir():
        raise RequestError(f"reference: must be a checkout of Wan-Video/Wan2.2, got {checkout}, without generate.py")
    if case.weights != "checkpoint" or _checkpoint_folder(case) is None:
        raise RequestError(
            "reference: the official code reads a checkpoint folder as published, got"
            f" {case.sources.model or case.weights}; name one with --model, or leave --reference out"
        )
    solver = plan_of(case).solver
    if solver not in _SOLVERS:
        raise RequestError(f"reference: the official code has the solvers unipc and dpm++, got {solver}")
    missing = missing_here()
    if missing:
        raise RequestError(f"reference: the official code needs {' and '.join(missing)}; leave --reference out")
    if case.loras:
        raise RequestError("reference: the official code loads no LoRA; leave --lora or --reference out")
    if case.reference_precision != "bf16":
        raise RequestError(
            "reference: the official code computes in bf16 whatever its weights are in, got --reference-precision"
            f" {case.reference_precision}; give it as bf16"
        )


def missing_here() -> list[str]:
    """Say what the official code needs and this machine lacks: its models are put on cuda:N, its attention is flash."""
    missing = [] if torch.cuda.is_available() else ["a CUDA device, of which there is none here"]
    if not any(importlib.util.find_spec(name) for name in _FLASH):
        missing.append("the flash_attn package, which is not installed")
    return missing


def _checkpoint_folder(case: Case) -> Path | None:
    """The model's folder, if it has the official layout."""
    if case.sources.model is None or case.sources.parts:
        return None
    folder = Path(case.sources.model).expanduser()
    names = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
    return folder if any((folder / name).is_file() for name in names) else None


class OfficialEngine:
    """The class of the official code for the case's task."""

    def __init__(self, case: Case, checkout: Path) -> None:
        """Read nothing yet."""
        self._case, self._checkout = case, checkout
        self._model: Any = None
        self._plan = plan_of(case)
        always = "it computes the velocity without the prompt even at guidance 1: twice the forwards of the others"
        self._notes = (always,) if self._plan.num_forwards == len(self._plan.steps) else ()

    def load(self) -> None:
        """Import the checkout's code and open the weights with it."""
        sys.path.insert(0, str(self._checkout))
        wan, configs = import_module("wan"), import_module("wan.configs")
        task, kind = _CLASSES[self._case.config.task]
        device = torch.device(self._case.device)
        self._model = getattr(wan, kind)(
            config=configs.WAN_CONFIGS[task],
            checkpoint_dir=str(_checkpoint_folder(self._case)),
            device_id=device.index or 0,
            rank=0,
            t5_fsdp=False,
            dit_fsdp=False,
            use_sp=False,
            t5_cpu=False,
            convert_model_dtype=True,
        )

    def run(self, watch: Stopwatch, noise: Tensor, context: Tensor | None, clip: Path) -> Made:
        """Make the video once; its code tells no stages, and encodes the prompts for itself."""
        plan = self._plan
        guidance = tuple(expert.guidance for expert in reversed(plan.experts))  # low noise first
        arguments: dict[str, Any] = {
            "frame_num": plan.num_frames,
            "shift": plan.shift,
            "sample_solver": _SOLVERS[plan.solver],
            "sampling_steps": len(plan.steps),
            "guide_scale": guidance if len(guidance) > 1 else guidance[0],
            "n_prompt": plan.negative_prompt or " ",  # it takes its own list for an empty one
            "seed": plan.seed,
            "offload_model": self._case.placement != "resident",
        }
        if plan.task != "t2v":
            arguments["img"] = self._case.picture
            arguments["max_area"] = plan.width * plan.height
        if plan.task != "i2v":
            arguments["size"] = (plan.width, plan.height)
        with given_noise(noise), watch.stage("generate"):
            video = self._model.generate(plan.prompt, **arguments)
        with watch.stage("decode"):
            frames = to_uint8(video[None])
        return Made(frames=write_clip(watch, [frames], clip, plan.fps), notes=self._notes)

    def step_aside(self) -> None:
        """Let the allocator's cache go; the code itself moves its models to the host where it is told to offload."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def given_noise(noise: Tensor) -> Iterator[None]:
    """Let the one call of torch.randn that asks for the noise's shape have this noise.

    Raises:
        RequestError: there was none, or more than one: the code draws its noise in another way.
    """
    drawn: Callable[..., Tensor] = torch.randn
    handed = 0

    def randn(*size: Any, **options: Any) -> Tensor:
        nonlocal handed
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        if shape != tuple(noise.shape):
            return drawn(*size, **options)
        handed += 1
        return noise.to(device=options.get("device"), dtype=options.get("dtype") or noise.dtype)

    torch.randn = randn  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.randn = drawn  # type: ignore[assignment]
    if handed != 1:
        raise RequestError(
            f"reference: must draw the noise {list(noise.shape)} once with torch.randn, did {handed} times; its videos"
            " cannot be compared"
        )
