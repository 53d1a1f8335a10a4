"""The case's LoRAs in diffusers' pipeline, through diffusers' own calls: both engines run what was asked for."""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from wanfast.config import ExpertName
from wanfast.errors import RequestError
from wanfast.lora import Lora

_TRANSFORMERS: dict[ExpertName, str] = {
    "high_noise": "transformer",
    "low_noise": "transformer_2",
    "single": "transformer",
}


def load_loras(pipeline: Any, loras: Sequence[Lora]) -> tuple[str, ...]:
    """Load LoRAs into the transformers they are for, each with its strength.

    Args:
        pipeline: a WanPipeline or WanImageToVideoPipeline.
        loras: opened for its model.

    Returns:
        What the report must say: layers that wanfast adapts and diffusers does not, or the other way round.

    Raises:
        RequestError: diffusers cannot load one, or the peft package, through which it does, is not installed.
    """
    if not loras:
        return ()
    if importlib.util.find_spec("peft") is None:
        raise RequestError("lora: diffusers loads LoRAs through the peft package; pip install peft, or leave it out")
    weights: dict[str, dict[str, float]] = {}
    notes = []
    for index, lora in enumerate(loras):
        for expert in lora.experts:
            part, name = _TRANSFORMERS[expert], f"lora{index}"
            try:
                pipeline.load_lora_weights(
                    load_file(lora.spec.path), adapter_name=name, load_into_transformer_2=part == "transformer_2"
                )
            except Exception as error:  # of whatever kind: diffusers, PEFT and torch each have their own
                says = " ".join(str(error).split())[:300]
                raise _cannot(lora, says) from None
            weights.setdefault(part, {})[name] = lora.spec.strength
            theirs, ours = _adapted(getattr(pipeline, part), name), len(lora.layers[expert])
            if theirs == 0:
                raise _cannot(lora, "it adapts no layer of it")
            if theirs != ours:
                notes.append(
                    f"of {Path(lora.spec.path).name} diffusers adapts {theirs} layers of {expert}, wanfast {ours};"
                    " the videos differ by that"
                )
    for part, strengths in weights.items():
        getattr(pipeline, part).set_adapters(list(strengths), list(strengths.values()))
    return tuple(notes)


def _cannot(lora: Lora, says: str) -> RequestError:
    return RequestError(
        f"lora: diffusers cannot load {Path(lora.spec.path).name} ({says}); without the same LoRA there is no"
        " comparison: leave it out, or convert it"
    )


def _adapted(transformer: Any, adapter: str) -> int:
    """Count the layers that have an adapter."""
    has = Counter(adapter in getattr(module, "lora_A", {}) for module in transformer.modules())
    return has[True]
