"""LightX2V's folders with a file for each block.

Source: ModelTC/LightX2V, tools/convert/converter.py, --save_by_block; lightx2v/Wan2.2-Distill-Models on Hugging Face.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

INDEX = "diffusion_pytorch_model.safetensors.index.json"


def write_split(folder: Path, state: Mapping[str, Tensor], *, index: bool = True) -> Path:
    """Write one file per block and one for the rest, and the index that the converter writes beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        parts = name.split(".")
        file = f"block_{parts[1]}.safetensors" if parts[0] == "blocks" else "non_block.safetensors"
        files.setdefault(file, {})[name] = tensor.contiguous()
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    if index:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder
