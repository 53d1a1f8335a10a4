"""Seconds of operations on a GPU, and what the GPU can do at best: the ceilings that kernels are compared with."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

Operation = Callable[[], Any]

ROUND = 20e-3  # seconds of one round at least: calls are launched one behind the other, so launching costs nothing
COPIED = 1 << 31  # bytes: many times any L2
SIDE = 8192  # of the matrices that the ceilings multiply


def settle(device: torch.device) -> None:
    """Wait until everything launched has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_calls(operation: Operation, calls: int, device: torch.device) -> None:
    """Call so many times and wait for the last."""
    for _ in range(calls):
        operation()
    settle(device)


def timed(operation: Operation, calls: int, device: torch.device) -> float:
    """Seconds of one call, of so many one behind the other."""
    settle(device)
    start = time.perf_counter()
    run_calls(operation, calls, device)
    return (time.perf_counter() - start) / calls


def calls_of(operation: Operation, device: torch.device) -> int:
    """How many calls make a round; one on a CPU."""
    if device.type != "cuda":
        return 1
    operation()
    return max(1, min(200, round(ROUND / max(timed(operation, 1, device), 1e-5))))


def ready_peers(peers: Mapping[str, Operation], device: torch.device) -> tuple[dict[str, Operation], dict[str, str]]:
    """The peers that run here, each run once; and of those that do not, why."""
    ready: dict[str, Operation] = {}
    refused: dict[str, str] = {}
    for name, operation in peers.items():
        try:
            run_calls(operation, 1, device)
            ready[name] = operation
        except (RuntimeError, NotImplementedError, ImportError) as error:
            refused[name] = str(error).splitlines()[0][:120]
    return ready, refused


@cache
def ceilings(device: torch.device) -> dict[str, float]:
    """What this GPU reaches: GB/s of a plain copy, read and written, and TFLOPS of 8192-wide products in torch."""
    if device.type != "cuda":
        return {}
    found = {"copy_gb_per_s": _copy_speed(device)}
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    products: dict[str, Operation] = {"bf16_tflops": lambda: a @ b}
    if torch.cuda.get_device_capability(device) >= (8, 9):
        one = torch.ones((), device=device)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        products["e4m3_tflops"] = lambda: torch._scaled_mm(
            a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    ai, bi = ((x * 20).clamp(-127, 127).to(torch.int8) for x in (a, b))
    products["int8_tops"] = lambda: torch._int_mm(ai, bi.t())
    ready, _ = ready_peers(products, device)
    for name, product in ready.items():
        found[name] = 2 * SIDE**3 / _median(product, device) / 1e12
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def _copy_speed(device: torch.device) -> float:
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / _median(lambda: target.copy_(source), device) / 1e9


def _median(operation: Operation, device: torch.device) -> float:
    calls = calls_of(operation, device)
    return statistics.median(timed(operation, calls, device) for _ in range(5))
