"""Settings that the step-distilled releases were made for, by name.

Source: ModelTC/Wan2.2-Lightning and ModelTC/LightX2V, README and configs: Euler, 4 steps, shift 5, no guidance; with
the models' own boundaries that is two steps of the high-noise expert and two of the low-noise one.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from wanfast.config import SolverName
from wanfast.errors import RequestError
from wanfast.plan import Plan
from wanfast.request import Request


@dataclass(frozen=True, slots=True)
class Preset:
    """Sampling settings that belong together."""

    num_inference_steps: int
    solver: SolverName
    shift: float
    guidance: float  # 1: one forward per step


PRESETS: dict[str, Preset] = {
    "lightning4": Preset(num_inference_steps=4, solver="euler", shift=5.0, guidance=1.0),
}
_DISTILLED = re.compile(r"lightning|lightx2v|distill|(?<!\d)[48][-_ ]?steps?(?![a-z0-9])", re.IGNORECASE)
_FEW_STEPS = 8  # the distilled releases are also run with twice their steps


def apply_preset(request: Request, name: str | None) -> Request:
    """Fill in what a request leaves open from a preset; what it states stays.

    Raises:
        RequestError: there is no such preset.
    """
    if name is None:
        return request
    if name not in PRESETS:
        raise RequestError(f"preset: must be one of {', '.join(PRESETS)}, got {name!r}")
    own = asdict(PRESETS[name])
    if request.guidance_high is not None or request.guidance_low is not None:  # `guidance` must not stand beside them
        guidance = own.pop("guidance")
        own |= {"guidance_high": guidance, "guidance_low": guidance}
    return replace(request, **{key: value for key, value in own.items() if getattr(request, key) is None})


def preset_note(plan: Plan, files: Iterable[str]) -> str | None:
    """Say that a file's name speaks of few steps while the plan has many, or the other way round, or None.

    Args:
        plan: settled.
        files: names of the model's and the LoRAs' files.
    """
    preset = PRESETS["lightning4"]
    is_few = plan.num_forwards == len(plan.steps) <= _FEW_STEPS
    distilled = next((file for file in files if _DISTILLED.search(file)), None)
    if distilled is None and is_few and (len(plan.steps), plan.solver) == (preset.num_inference_steps, preset.solver):
        return (
            f"{len(plan.steps)} steps without guidance are for weights or LoRAs that were distilled to them, of which"
            " no file's name speaks here; other weights need their usual steps"
        )
    if is_few or distilled is None:
        return None
    return (
        f"{distilled} seems to be distilled to few steps, but this run has {len(plan.steps)} steps and"
        f" {plan.num_forwards} forwards; preset lightning4 has {preset.num_inference_steps} steps, {preset.solver},"
        f" shift {preset.shift:g}, guidance {preset.guidance:g}"
    )
