"""A transformer's file as the config and state dict of diffusers' WanTransformer3DModel."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanfast.checkpoint.bind import check_names, read_tensor
from wanfast.checkpoint.names import dit_to_diffusers
from wanfast.checkpoint.part import open_part
from wanfast.dit.weights import dit_config, expected_tensors


def read_single_file(
    path: str | Path, dtype: torch.dtype | None, fp32_parts: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a DiT from any file or folder that wanfast reads, under diffusers' names.

    Args:
        path: `.safetensors`, its index, `.gguf`, `.pth`, or a folder with one of the first two.
        dtype: of the tensors; None is that of the blocks' matrices, which is bf16 where they are stored in fewer bits.
        fp32_parts: parts of a tensor's name that keep it in fp32.

    Returns:
        Arguments of WanTransformer3DModel, and its state dict; in memory of its own.

    Raises:
        CheckpointError: the file cannot be read or is not a Wan 2.2 transformer; the message names file and tensor.
    """
    reader = open_part(path, "dit").reader
    config = dit_config(reader)
    shapes = expected_tensors(config)
    check_names(reader, shapes, part="diffusion transformer")
    if dtype is None:
        dtype = reader.dtype("blocks.0.self_attn.q.weight")
    state = {}
    for official, shape in shapes.items():
        name = dit_to_diffusers(official)
        is_fp32 = any(part in name.split(".") for part in fp32_parts)
        state[name] = read_tensor(reader, official, shape, dtype=torch.float32 if is_fp32 else dtype)
    arguments = {
        "patch_size": config.patch_size,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "eps": config.eps,
    }
    return arguments, state
