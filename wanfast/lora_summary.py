"""Says what a LoRA file is, from its header and alphas, without a model."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from wanfast.checkpoint.reader import Reader, open_file
from wanfast.config import MODELS, T2V_A14B
from wanfast.dit.tensors import expected_tensors
from wanfast.errors import CheckpointError
from wanfast.lora import Lora, LoraSpec, open_lora
from wanfast.lora_names import LoraKey, module_names, other_method, read_key

_SUFFIXES = (".safetensors", ".pth", ".pt")


def lora_summary(path: str | Path) -> dict[str, Any] | None:
    """Describe a LoRA file.

    Args:
        path: of any file or folder.

    Returns:
        JSON-able values: method, models it fits, experts its name says, ranks, scales, how many layers of each kind it
        changes, keys it cannot place, numbers of tensors by dtype and bytes; None where the path is no LoRA file.

    Raises:
        CheckpointError: a tensor file that is damaged.
    """
    path = Path(path).expanduser()
    if not path.is_file() or path.suffix not in _SUFFIXES:
        return None
    reader = open_file(path)
    names = module_names(expected_tensors(T2V_A14B.dit))  # those of the other models are among them
    keys = {key: read_key(key, names) for key in sorted(reader.names())}
    methods = {method for key in keys if (method := other_method(key))}
    if not methods and not any(found.part not in (None, "alpha") for found in keys.values()):
        return None
    downs = [key for key, found in keys.items() if found.part == "down"]
    fitting, reason = _fitting(path)
    lora = next(iter(fitting.values()), None)
    scales = (
        {layer.scale for layer in next(iter(lora.layers.values())).values() if "down" in layer.keys} if lora else ()
    )
    return {
        "path": str(path),
        "what": ", ".join(sorted(methods)) or "LoRA",
        "models": list(fitting),
        **({} if fitting else {"fault": reason}),
        "experts": list(lora.experts) if lora else [],
        "ranks": sorted({size for key in downs for size in reader.shape(key)[:1]}),
        "scales": sorted(scales),
        "layers": _layers(keys),
        "unmatched": [key for key, found in keys.items() if found.module is None],
        "dtypes": _dtypes(reader),
        "bytes": path.stat().st_size,
    }


def _fitting(path: Path) -> tuple[dict[str, Lora], str | None]:
    """Open the file for each published model; the first reason why one does not fit."""
    fitting: dict[str, Lora] = {}
    reason = None
    for model in MODELS.values():
        try:
            fitting[model.name] = open_lora(LoraSpec(path), model)
        except CheckpointError as error:
            reason = reason or str(error)
    return fitting, reason


def _layers(keys: dict[str, LoraKey]) -> dict[str, int]:
    """Count the layers changed by a product or a difference, by name within the block."""
    changed = {found.module for found in keys.values() if found.module and found.part in ("down", "weight", "bias")}
    return dict(sorted(Counter(re.sub(r"^blocks\.\d+\.", "", module) for module in changed).items()))


def _dtypes(reader: Reader) -> dict[str, int]:
    counts = Counter(reader.ref(name).dtype_name for name in reader.names())
    return dict(sorted(counts.items()))
