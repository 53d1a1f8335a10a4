"""Seconds of a step of diffusers' Wan transformer with its weights placed in the ways that diffusers offers."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wanfast.config import DiTConfig

ROUNDS = 3


def diffusers_seconds(
    config: DiTConfig, layers: int, device: torch.device, *, is_small: bool
) -> dict[str, list[float]]:
    """Time two forwards, with and without the prompt, of a random transformer in bf16 at 480p.

    Args:
        config: its sizes.
        layers: of blocks.
        device: that computes.
        is_small: tiny latents, for a CPU, where weights have nowhere to move to: then only the whole is timed.

    Returns:
        Seconds by placement: "resident", "group offload" (a block at a time, with streams) and "cpu offload", by which
        the whole transformer moves to the device for the steps and back: one way and the other are in each round, as
        `enable_model_cpu_offload` has them at the switch of experts.
    """
    from diffusers import WanTransformer3DModel

    with torch.device(device):
        model = WanTransformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.dim // config.num_heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            text_dim=config.text_dim,
            ffn_dim=config.ffn_dim,
            num_layers=layers,
        )
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    frames, rows, columns = (2, 8, 8) if is_small else (21, 60, 104)
    latents = torch.randn(1, config.in_channels, frames, rows, columns, device=device).bfloat16()
    context = torch.randn(1, config.text_len, config.text_dim, device=device).bfloat16()
    timestep = torch.tensor([611], device=device)

    def step() -> Tensor:
        for _ in range(2):
            out = model(latents, timestep, context, return_dict=False)[0]
        return out

    def moved() -> None:
        model.to(device)
        step()
        model.to("cpu")

    times = {"diffusers resident": _seconds(step, device)}
    if device.type != "cuda":
        return times
    model.to("cpu")
    times["diffusers cpu offload"] = _seconds(moved, device)
    options: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1, "use_stream": True}
    model.enable_group_offload(onload_device=device, offload_device=torch.device("cpu"), **options)
    times["diffusers group offload"] = _seconds(step, device)
    return times


def _seconds(work: Callable[[], Any], device: torch.device) -> list[float]:
    times = []
    for _ in range(ROUNDS + 1):
        _settle(device)
        start = time.perf_counter()
        work()
        _settle(device)
        times.append(time.perf_counter() - start)
    return times[1:]


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
