"""Small weights written the way published 8-bit files hold them, each beside the values it stands for.

Sources: comfyanonymous/ComfyUI, comfy/ops.py; ModelTC/LightX2V, tools/convert/quant/quant.py; thu-ml/TurboDiffusion,
turbodiffusion/ops/core.py and inference/modify_model.py.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]
Written = tuple[State, State]  # what the file holds, and the plain fp32 tensors it stands for by official name

FP8 = torch.float8_e4m3fn


def is_block_matrix(name: str, tensor: Tensor) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and tensor.dim() == 2 and "embedding" not in name


def is_matrix(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and tensor.dim() == 2 and "embedding.weight" not in name


def comfy_fp8(state: Mapping[str, Tensor], *, marker: int = 0, has_input_scales: bool = True) -> Written:
    """ComfyUI's fp8_scaled: every matrix in fp8 with one scale, the rest fp16, and a marker."""
    file: State = {"scaled_fp8": torch.zeros(marker, dtype=FP8)}
    plain: State = {}
    for name, tensor in state.items():
        if not is_matrix(name, tensor):
            file[name] = tensor.half()
            plain[name] = file[name].float()
            continue
        layer = name.removesuffix(".weight")
        scale = tensor.abs().amax() / 448
        file[name], file[f"{layer}.scale_weight"] = (tensor / scale).to(FP8), scale
        if has_input_scales:
            file[f"{layer}.scale_input"] = torch.tensor(1.0)
        plain[name] = file[name].float() * scale
    return file, plain


def comfy_new(state: Mapping[str, Tensor]) -> Written:
    """ComfyUI's newer form: the same numbers, each weight with a note in JSON."""
    old, plain = comfy_fp8(state)
    renamed = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
    file: State = {}
    for name, tensor in old.items():
        layer, _, kind = name.rpartition(".")
        if kind == "scale_weight":
            note = b'{"format": "float8_e4m3fn"}'
            file[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(note), dtype=torch.uint8)
        if name != "scaled_fp8":
            file[f"{layer}.{renamed.get(kind, kind)}"] = tensor
    return file, plain


def lightx2v(state: Mapping[str, Tensor], dtype: torch.dtype) -> Written:
    """LightX2V: block matrices with one scale per output channel, the rest bf16."""
    file: State = {}
    plain: State = {}
    for name, tensor in state.items():
        if not is_block_matrix(name, tensor):
            file[name] = tensor.bfloat16()
            plain[name] = file[name].float()
            continue
        scale = tensor.abs().amax(1, keepdim=True) / (127 if dtype == torch.int8 else 448)
        values = tensor / scale
        file[name] = values.round().to(dtype) if dtype == torch.int8 else values.to(dtype)
        file[name.removesuffix("weight") + "weight_scale"] = scale
        plain[name] = file[name].float() * scale
    return file, plain


def turbowan(state: Mapping[str, Tensor]) -> Written:
    """TurboDiffusion: block matrices in int8 with one scale per 128 x 128, the patch embedding as a matrix."""
    file: State = {}
    plain: State = {}
    for name, tensor in state.items():
        if not is_block_matrix(name, tensor):
            file[name] = tensor.flatten(1) if name == "patch_embedding.weight" else tensor
            plain[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        rows, columns = tensor.shape
        padded = torch.nn.functional.pad(tensor, (0, -columns % 128, 0, -rows % 128))
        tiles = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))  # [row blocks, 128, column blocks, 128]
        scale = tiles.abs().amax((1, 3)).clamp_min(1e-9) / 127
        values = (tiles / scale[:, None, :, None]).round()
        file[f"{layer}.int8_weight"] = values.flatten(2).flatten(0, 1)[:rows, :columns].to(torch.int8).contiguous()
        file[f"{layer}.scale"] = scale
        plain[name] = (values * scale[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
        if name.startswith("blocks.") and layer.endswith("self_attn.q"):
            linear_attention = layer.removesuffix("q") + "attn_op.local_attn.proj_l"
            file |= {f"{linear_attention}.weight": torch.zeros(128, 128), f"{linear_attention}.bias": torch.zeros(128)}
    return file, plain


def plain_fp8(state: Mapping[str, Tensor]) -> Written:
    """A cast of everything with more than one axis, biases left in 16 bits."""
    file = {name: tensor.to(FP8 if tensor.dim() > 1 else torch.bfloat16) for name, tensor in state.items()}
    return file, {name: tensor.float() for name, tensor in file.items()}


FORMS: dict[str, Callable[[Mapping[str, Tensor]], Written]] = {
    "comfy_fp8": comfy_fp8,
    "comfy_fp8_weights_only": lambda state: comfy_fp8(state, marker=2, has_input_scales=False),
    "comfy_new": comfy_new,
    "lightx2v_int8": lambda state: lightx2v(state, torch.int8),
    "lightx2v_fp8": lambda state: lightx2v(state, FP8),
    "turbowan": turbowan,
    "plain_fp8": plain_fp8,
}
