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
    # RMS norm as above, then a rotation: two products and a sum, rounded once more on the store.
    "rms_norm_rope": {
        torch.float32: Roundoff(worst=12, rms=4),
        torch.float16: Roundoff(worst=3.5, rms=0.8),
        torch.bfloat16: Roundoff(worst=3.5, rms=0.8),
    },
    # In fp32: a length, two products, an exponential of the result, which multiplies what that lost, and a quotient.
    "rms_norm_silu": {
        torch.float32: Roundoff(worst=16, rms=3),
        torch.float16: ONE_ROUNDING,
        torch.bfloat16: ONE_ROUNDING,
    },
    # fp32: sums of up to ten products, three deep, whose terms are several times the result's RMS.
    "guided_update": {torch.float32: Roundoff(worst=16, rms=3)},
    # A convolution: fp32 sums of up to a few hundred products here, then one rounding. The norm behind it divides by
    # the length of the sums; where that is a kernel of its own, they are rounded before.
    "causal_conv3d": {torch.float16: ONE_ROUNDING, torch.bfloat16: ONE_ROUNDING},
    "causal_conv3d_norm": {torch.float16: ONE_ROUNDING, torch.bfloat16: ONE_ROUNDING},
    "causal_conv3d_two_roundings": {torch.float16: Roundoff(worst=3.5, rms=0.8)},
    # 27 sums of 32 products rounded to fp16: each by half a unit of about the result's RMS / sqrt(27), four times on
    # hardware and once in the interpreter; 1 u of the result was seen, worst 3.
    "causal_conv3d_fp16_sums": {torch.float16: Roundoff(worst=6, rms=1.2)},
    # 8-bit linears against float64 of the same 8-bit numbers. int8 is summed exactly, so fp32 rounds in the scales, the
    # bias and, with a scale per 128 channels, up to 108 partial sums.
    "linear_int8": {
        torch.float32: Roundoff(worst=24, rms=4),
        torch.float16: ONE_ROUNDING,
        torch.bfloat16: ONE_ROUNDING,
    },
    # e4m3 sums of 128 products are rounded to fp16, whose u is 8,192 of fp32's: by at most 1 u of the largest partial
    # sum, several times the result's RMS, and by 0.3 u on average; on hardware four times in a row.
    "linear_e4m3": {
        torch.float32: Roundoff(worst=8 * 8192, rms=8192),
        torch.float16: Roundoff(worst=8, rms=1),
        torch.bfloat16: Roundoff(worst=2.25, rms=0.5),
    },
    # p is rounded before it meets v, then the result: two roundings; but where values cancel, a sum of p v is small
    # beside its terms, whose roundings it keeps. Worst seen 3.3 u, also of torch's own. fp32 and fp64: torch alone, and
    # no rounding but of sums: of the 128 products of a score, which the exponential passes on; 36 u were seen.
    "attention": {
        torch.float16: Roundoff(worst=4, rms=0.6),
        torch.bfloat16: Roundoff(worst=4, rms=0.6),
        torch.float32: Roundoff(worst=64, rms=8),
        torch.float64: Roundoff(worst=64, rms=8),
    },
    # Of scores that are themselves sums of 64 or 128 fp32 products, times the scale.
    "log_sum_exp": {torch.float32: Roundoff(worst=12, rms=3)},
    # Sums of 64 or 128 values in fp32; the interpreter adds them one after the other: 11 u were seen.
    "pool_blocks": {torch.float32: Roundoff(worst=24, rms=4)},
    # 8-bit attention against a reference that rounds as it does: where exp2 or a sum differs in a last bit, a weight is
    # rounded the other way now and then (e4m3: by a sixteenth of itself), and fp16 sums end in another bit.
    "attention_int8": _model(2e-3),
    # The same, rounded to int8 by its largest of 128 channels: half a step of 1 / 127, and bf16's rounding of it.
    "attention_int8_output": _model(0.5 / 127 + 2.0**-8),
    # Numbers of 32 channels are summed exactly, then scaled in fp32: up to 160 partial sums, each less its minimum.
    "linear_stored": {
        torch.float32: Roundoff(worst=80, rms=16),
        torch.float16: ONE_ROUNDING,
        torch.bfloat16: ONE_ROUNDING,
    },
    # Models in fp32 against diffusers and transformers in fp32: the same sums in another order.
    "dit_fp32": _model(1e-5),
    "umt5_fp32": _model(1e-5),
    "vae_fp32": _model(1e-5),
    # The same VAE on a strip and on the whole picture: the same sums, which torch's convolutions may order by shape.
    "vae_strips": _model(2e-6),
    # One convolution: a sum of at most a few thousand fp32 products, in another order; 2e-6 was seen.
    "conv3d_fp32": _model(5e-6),
    # The same in bf16, summed in fp32 with what is added to it, and rounded once.
    "conv3d_bf16": {torch.bfloat16: ONE_ROUNDING},
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
