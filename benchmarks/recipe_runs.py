"""Launches the recipes of published.py: on a GPU to be timed, in the interpreter to be checked."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from machine_code.case import Case
from recipes import flash_attention_kernel, matmul_kernel, sage_attention_kernel
from torch import Tensor

_LOG2_E = 1.4426950408889634
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "i8": torch.int8, "fp8e4nv": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Run:
    """One launch, what it computes, and what that costs."""

    launch: Callable[[], Tensor]
    reference: Callable[[], Tensor]
    operations: float


def prepare(case: Case, device: torch.device, *, tokens: int, heads: int) -> Run:
    """Make a case's tensors at another size: tokens is a multiple of its tiles, and the side of a matrix."""
    prepared = {
        flash_attention_kernel: _flash,
        sage_attention_kernel: _sage,
        matmul_kernel: _matmul,
    }
    return prepared[case.function](case, device, tokens, heads)


def _randn(device: torch.device, *shape: int) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device) for _ in range(3)]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q.double() @ k.double().mT * q.shape[-1] ** -0.5, -1) @ v.double()


def stored_values(v: Tensor, *, for_sage: bool) -> Tensor:
    """8-bit values as the recipes read them: [H, D, T]; for Sage's the tokens of each 32 as its P has them."""
    turned = v.mT
    if for_sage:
        halves = turned.unflatten(
            -1, (-1, 2, 2, 4, 2)
        )  # 16 j1 + 8 j0 + 2 t + b, for which b + 2 j0 + 4 t + 16 j1 stands
        turned = halves.permute(0, 1, 2, 3, 5, 4, 6).flatten(2)
    return turned.contiguous()


def _strides(case: Case, tokens: int) -> list[int]:
    width = case.arguments["D"]
    is_turned = case.arguments["v_ptr"] == "fp8e4nv"
    return [tokens, tokens * width, *((1, tokens) if is_turned else (width, 1))]


def _flash(case: Case, device: torch.device, tokens: int, heads: int) -> Run:
    arguments = case.arguments
    width, dtype = arguments["D"], DTYPES[arguments["v_ptr"]]
    q, k, v = (x.to(dtype) for x in _randn(device, heads, tokens, width))
    out = torch.empty(heads, tokens, width, device=device, dtype=torch.float16)
    stored = stored_values(v, for_sage=False) if dtype.itemsize == 1 else v
    constants = {name: arguments[name] for name in ("D", "BLOCK_Q", "BLOCK_K")}

    def launch() -> Tensor:
        flash_attention_kernel[(tokens // arguments["BLOCK_Q"], heads)](
            *(q, k, stored, out, width**-0.5 * _LOG2_E, *_strides(case, tokens)), **constants, **_options(case)
        )
        return out

    return Run(launch, lambda: _attend(q, k, v), 4.0 * tokens**2 * width * heads)


def _sage(case: Case, device: torch.device, tokens: int, heads: int) -> Run:
    arguments = case.arguments
    width, dtype = arguments["D"], DTYPES[arguments["v_ptr"]]
    q, k, v = _randn(device, heads, tokens, width)
    q8, q_scale = _by_block(q, arguments["BLOCK_Q"])
    k8, k_scale = _by_block(k, arguments["BLOCK_K"])
    eight_bit = dtype.itemsize == 1
    v = (v * (2.25 / v.abs().max()) if eight_bit else v).to(dtype)
    stored = stored_values(v, for_sage=True) if eight_bit else v
    out = torch.empty(heads, tokens, width, device=device, dtype=torch.float16)
    folded = (q_scale * (width**-0.5 * _LOG2_E)).contiguous()
    constants = {name: arguments[name] for name in ("SUM", "P_LOG2", "D", "BLOCK_Q", "BLOCK_K")}

    def launch() -> Tensor:
        sage_attention_kernel[(tokens // arguments["BLOCK_Q"], heads)](
            *(q8, k8, stored, folded, k_scale, out, *_strides(case, tokens)), **constants, **_options(case)
        )
        return out

    return Run(launch, lambda: _attend(q, k, v), 4.0 * tokens**2 * width * heads)


def _by_block(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Int8 with a scale for so many rows: [H, T, D], [H, T / rows]."""
    blocks = x.unflatten(1, (-1, rows))
    scale = blocks.abs().amax((2, 3)) / 127
    return torch.round(blocks / scale[..., None, None]).to(torch.int8).flatten(1, 2), scale.contiguous()


def _matmul(case: Case, device: torch.device, tokens: int, heads: int) -> Run:
    arguments = case.arguments
    a, b, _ = (x[0].half() for x in _randn(device, 1, tokens, tokens))
    c = torch.empty(tokens, tokens, device=device, dtype=torch.float16)
    constants = {name: arguments[name] for name in ("SUM", "BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP")}
    grid = (tokens // arguments["BLOCK_M"] * (tokens // arguments["BLOCK_N"]),)

    def launch() -> Tensor:
        matmul_kernel[grid](a, b, c, tokens, tokens, tokens, **constants, **_options(case))
        return c

    return Run(launch, lambda: a.double() @ b.double().mT, 2.0 * tokens**3)


def _options(case: Case) -> dict[str, Any]:
    return {"num_warps": case.num_warps, "num_stages": case.num_stages}
