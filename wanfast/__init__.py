"""wanfast: Wan 2.2 video generation, exact and fast.

>>> pipeline = wanfast.load("Wan2.2-T2V-A14B")
>>> video = pipeline.generate("a red ball rolls left", seed=0)
>>> video.save("clip.mp4")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wanfast.version import __version__

if TYPE_CHECKING:
    from wanfast.config import MODELS, ModelConfig
    from wanfast.diffusers_backend.accelerate import accelerate as accelerate
    from wanfast.diffusers_backend.accelerate import restore as restore
    from wanfast.diffusers_backend.transformer import WanFastTransformer3DModel as WanFastTransformer3DModel
    from wanfast.errors import CheckpointError, MediaError, MemoryBudgetError, NumericsError, RequestError
    from wanfast.lora import LoraSpec
    from wanfast.pipeline import Pipeline, load
    from wanfast.plan import Plan
    from wanfast.request import Request
    from wanfast.solvers import Step
    from wanfast.video import Video

# Importing torch takes seconds on a cold machine, and diffusers need not be there: the names below are fetched when
# they are first used.
_HOME = {
    "MODELS": "config",
    "CheckpointError": "errors",
    "LoraSpec": "lora",
    "MediaError": "errors",
    "MemoryBudgetError": "errors",
    "NumericsError": "errors",
    "ModelConfig": "config",
    "Pipeline": "pipeline",
    "Plan": "plan",
    "Request": "request",
    "RequestError": "errors",
    "Step": "solvers",
    "Video": "video",
    "WanFastTransformer3DModel": "diffusers_backend.transformer",
    "accelerate": "diffusers_backend.accelerate",
    "load": "pipeline",
    "restore": "diffusers_backend.accelerate",
}

# Without the names that need diffusers: `from wanfast import *` works where it is not installed.
__all__ = [
    "MODELS",
    "CheckpointError",
    "LoraSpec",
    "MediaError",
    "MemoryBudgetError",
    "ModelConfig",
    "NumericsError",
    "Pipeline",
    "Plan",
    "Request",
    "RequestError",
    "Step",
    "Video",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'wanfast' has no attribute {name!r}")
    return getattr(import_module(f"wanfast.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_HOME})
