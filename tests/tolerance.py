"""How far from the truth each operation may be: one table, and the one comparison that reads it.

Two kinds of limit. A kernel is held in units of the unit roundoff u = eps / 2 of the dtype it returns, element by
element, relative to max(|want|, rms(want)): one correct rounding costs at most 1 u, and about 0.3 u root-mean-square.
A model or a solver, whose errors come from thousands of sums, is held to max|got - want| / max|want|.

Loosening a number is a change of its own, with its reason beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Roundoff:
    """Limits of a kernel, in units of the returned dtype's unit roundoff."""

    worst: float
    rms: float


@dataclass(frozen=True)
class Relative:
    """Limit of a model: the largest error as a share of the largest value."""

    worst: float


ONE_ROUNDING = Roundoff(worst=1.25, rms=0.4)  # 1 u and 0.3 u for the rounding, the rest for fp32 sums before it
TWO_ROUNDINGS = Roundoff(worst=2.25, rms=0.6)  # the same for two in a row: 2 u, and sqrt(2) x 0.3 u


def _model(worst: float) -> dict[torch.dtype, Relative]:
    return dict.fromkeys((torch.float32, torch.float64), Relative(worst))


LIMITS: Mapping[str, Mapping[torch.dtype, Roundoff | Relative]] = {
    # Kernels. In fp32 the arithmetic itself rounds: about ten operations per element, two sums over the row, and on a
    # GPU an rsqrt good to 3 u, the same for the whole row and so part of the RMS.
    "layer_norm": {
        torch.float32: Roundoff(worst=12, rms=4),
        torch.float16: ONE_ROUNDING,
        torch.bfloat16: ONE_ROUNDING,
    },
    "layer_norm_modulate": {
        torch.float32: Roundoff(worst=12, rms=4),
        torch.float16: ONE_ROUNDING,
        torch.bfloat16: ONE_ROUNDING,
    },
    # Wan rounds the normalised value to x's dtype and then multiplies by the weight: one rounding more.
    "rms_norm": {
        torch.float32: Roundoff(worst=8, rms=4),
        torch.float16: TWO_ROUNDINGS,
        torch.bfloat16: TWO_ROUNDINGS,
    },
    # fp32: a product and a sum, each rounded unless fused, of terms at most a few times the result's RMS.
    "gated_residual": {
        torch.float32: Roundoff(worst=6, rms=1),
        torch.float16: ONE_ROUNDING,
        torch.bfloat16: ONE_ROUNDING,
    },
    # Models in fp32 against diffusers and transformers in fp32: the same sums in another order.
    "dit_fp32": _model(1e-5),
    "umt5_fp32": _model(1e-5),
    "vae_fp32": _model(1e-5),
    # One convolution: a sum of at most a few thousand fp32 products, in another order; 2e-6 was seen.
    "conv3d_fp32": _model(5e-6),
    # Printed with 6 to 8 digits by the official code, fp32.
    "golden": _model(1e-4),
    # Element-wise fp32 arithmetic carried over 40 to 50 steps.
    "solver": _model(1e-6),
    # Velocity with bf16 weights against fp32: u = 2^-8 = 0.0039. Every projection rounds its input and output, but the
    # residual stream stays fp32, so roundings average out: about 1 u of the largest value was seen over 4 blocks.
    "dit_bf16": _model(1e-2),
}


def assert_close(*, got: Tensor, want: Tensor, op: str) -> None:
    """Hold `got` to `want` within the table's limits for `op` and got's dtype.

    Args:
        got: the result under test; its dtype chooses the limits.
        want: the truth, of the same shape, in the same or a higher precision.
        op: a row of LIMITS.

    Raises:
        AssertionError: another shape, a value that is not finite, or an error above a limit, with the place.
    """
    limit = LIMITS[op][got.dtype]
    label = f"{op} {str(got.dtype).removeprefix('torch.')}"
    assert got.shape == want.shape, f"{label}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    assert got.numel() > 0, f"{label}: nothing to compare, shape {tuple(got.shape)}"
    got64, want64 = got.detach().double().cpu(), want.detach().double().cpu()
    assert want64.isfinite().all(), f"{label}: the truth itself is not finite at {_first(~want64.isfinite())}"
    assert got64.isfinite().all(), f"{label}: not finite at {_first(~got64.isfinite())} ({_count(~got64.isfinite())})"

    error = (got64 - want64).abs()
    if isinstance(limit, Relative):
        scaled, unit, rms_limit = error / _positive(want64.abs().max()), "of max|want|", float("inf")
    else:
        scale = _positive(torch.maximum(want64.abs(), want64.square().mean().sqrt()))
        scaled, unit, rms_limit = error / scale / (torch.finfo(got.dtype).eps / 2), "u", limit.rms
    worst, rms = scaled.max().item(), scaled.square().mean().sqrt().item()
    if worst <= limit.worst and rms <= rms_limit:
        return
    place = _first(scaled == scaled.max())
    raise AssertionError(
        f"{label}: worst error {worst:.3g} {unit} (limit {limit.worst:g}), RMS {rms:.3g} {unit} (limit {rms_limit:g}); "
        f"worst at {place}: got {got64[place].item():.9g}, want {want64[place].item():.9g}"
    )


def _positive(scale: Tensor) -> Tensor:
    return scale.clamp_min(torch.finfo(torch.float64).tiny)


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())


def _count(mask: Tensor) -> str:
    return f"{int(mask.sum())} of {mask.numel()} values"
