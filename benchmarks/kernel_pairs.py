"""Each public kernel at one of Wan's sizes, and what else there is that computes the same: its peers.

On a GPU the peers are the fastest that torch has; torch.compile stands for a chain of element-wise operations. On a CPU
the kernels' references run at a tiny size, so that everything here is run somewhere; that says nothing of speed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from block_pair import block_operations, block_runs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from wan_shapes import HEAD_DIM, VAE_FRAMES, VAE_LEVELS, WAN, Wan

from wanfast import kernels
from wanfast.kernels.guided_update import Update
from wanfast.rope import rope_rotations

Operation = Callable[[], Any]
EPS = 1e-6

TINY = Wan(tokens=192, channels=256, heads=2, hidden=512, grid=(3, 8, 8), frame=(16, 24))
SIZES = {**WAN, "tiny": TINY}


@dataclass(frozen=True, slots=True)
class Pair:
    """One operation and its peers, ready to be run."""

    ours: Operation
    peers: dict[str, Operation]  # the first of them computes what ours does; any may fail where torch lacks it
    operations: float = 0.0  # that the result needs; 0 where the kernel is bound by bandwidth
    bytes: float = 0.0  # that the kernel reads and writes, each tensor once
    cosine: float = 0.999  # to the first peer's result, at least
    result: Callable[[Any], Tensor] = field(default=lambda out: out)  # of ours, in the first peer's form


def _randn(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def _compiled(device: torch.device, chain: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(chain, dynamic=False) if device.type == "cuda" else chain


# Attention


def _heads(wan: Wan, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_randn(device, 1, wan.tokens, wan.heads, HEAD_DIM, dtype=dtype, seed=seed) for seed in range(3))
    return q, k, v


def _sdpa_peers(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Operation]:
    turned = [x.transpose(1, 2) for x in (q, k, v)]

    def run(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*turned).transpose(1, 2)

    if not q.is_cuda:
        return {"sdpa": partial(run, SDPBackend.MATH)}
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    return {name: partial(run, backend) for name, backend in backends.items()}


def _tutorial(q: Tensor, k: Tensor, v: Tensor) -> Operation:
    """Triton's tutorial's recipe; it masks nothing, so tokens are filled up to a whole tile."""
    from recipes import tutorial_attention

    missing = -q.shape[1] % 128
    filled = [F.pad(x[0].transpose(0, 1), (0, 0, 0, missing)).contiguous() for x in (q, k, v)]
    return lambda: tutorial_attention(*filled)


def _attention_cost(wan: Wan) -> dict[str, float]:
    one = wan.tokens * wan.heads * HEAD_DIM
    return {"operations": 4.0 * wan.tokens * one, "bytes": 4 * 2 * one}


def _attention(wan: Wan, device: torch.device) -> Pair:
    q, k, v = _heads(wan, device)
    peers = _sdpa_peers(q, k, v)
    if device.type == "cuda":
        peers["tutorial"] = _tutorial(q, k, v)
    return Pair(lambda: kernels.attention(q, k, v), peers, **_attention_cost(wan))


def _attention_int8(wan: Wan, device: torch.device, *, values: torch.dtype, prepares: bool) -> Pair:
    q, k, v = _heads(wan, device)

    def prepare() -> tuple[Any, Any, Any]:
        return kernels.quantize_queries(q), kernels.quantize_keys(k), kernels.quantize_values(v, dtype=values)

    ready = prepare()
    ours = (lambda: kernels.attention_int8(*prepare())) if prepares else (lambda: kernels.attention_int8(*ready))
    return Pair(ours, _sdpa_peers(q, k, v), cosine=0.99, **_attention_cost(wan))  # random v: the mean of thousands


def _attention_sparse(wan: Wan, device: torch.device, *, density: float) -> Pair:
    q, k, v = _heads(wan, device)
    dense = {"dense": lambda: kernels.attention(q, k, v)}
    cost = _attention_cost(wan)
    cost["operations"] *= density

    def ours() -> Tensor:
        return kernels.attention_sparse(q, k, v, kernels.block_mask(q, k, density=density))

    return Pair(ours, dense, cosine=0.0, **cost)  # fewer keys: another result


# Linears


def _linear_operands(
    wan: Wan, device: torch.device, sides: tuple[int, int], dtype: torch.dtype, *, groups: bool = False
) -> tuple[Any, Any, Tensor, dict[str, Operation]]:
    """8-bit tokens and weight, a bias, and the peers: torch's row-wise 8-bit product, and bf16."""
    width, out = sides
    x, weight = _randn(device, wan.tokens, width), _randn(device, out, width, seed=1) * width**-0.5
    bias = _randn(device, out, seed=2)
    low = kernels.quantize_rows(x, dtype, groups=width // kernels.GROUP if groups else 1)
    low_weight = kernels.quantize_weight(weight, dtype, rotated=False)
    peers: dict[str, Operation] = {"bf16": lambda: F.linear(x, weight, bias)}
    if device.type == "cuda" and dtype == torch.float8_e4m3fn:
        plain = kernels.quantize_rows(x, dtype)
        peers["scaled_mm"] = lambda: torch._scaled_mm(
            plain.values,
            low_weight.values.t(),
            scale_a=plain.scale,
            scale_b=low_weight.scale[None],
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return low, low_weight, bias, peers


def _linear_cost(wan: Wan, sides: tuple[int, int]) -> dict[str, float]:
    return {"operations": 2.0 * wan.tokens * sides[0] * sides[1], "bytes": wan.tokens * (sides[0] + 2 * sides[1])}


def _linear(wan: Wan, device: torch.device, *, dtype: torch.dtype) -> Pair:
    sides = (wan.channels, 3 * wan.channels)
    x, weight, bias, peers = _linear_operands(wan, device, sides, dtype)
    return Pair(lambda: kernels.linear_8bit(x, weight, bias), peers, **_linear_cost(wan, sides))


def _linear_gelu(wan: Wan, device: torch.device, *, dtype: torch.dtype) -> Pair:
    sides = (wan.channels, wan.hidden)
    x, weight, bias, peers = _linear_operands(wan, device, sides, dtype)
    plain = peers["bf16"]
    peers["bf16"] = lambda: F.gelu(plain(), approximate="tanh")
    return Pair(
        lambda: kernels.linear_8bit_gelu(x, weight, bias, rotated=False),
        peers,
        result=lambda out: out.values.float().unflatten(-1, (-1, kernels.GROUP)).mul(out.scale[..., None]).flatten(-2),
        **_linear_cost(wan, sides),
    )


def _linear_residual(wan: Wan, device: torch.device, *, dtype: torch.dtype) -> Pair:
    sides = (wan.hidden, wan.channels)
    x, weight, bias, peers = _linear_operands(wan, device, sides, dtype, groups=True)
    x = type(x)(x.values[None], x.scale[None], x.rotated)
    stream = torch.zeros(1, wan.tokens, wan.channels, device=device)
    gate = torch.full((1, 1, wan.channels), 1e-3, device=device)  # thousands of runs add up
    plain = peers["bf16"]
    peers["bf16"] = lambda: torch.addcmul(stream, plain()[None], gate)
    return Pair(
        lambda: kernels.linear_8bit_residual(x, weight, bias, stream, gate),
        peers,
        cosine=0.0,  # the stream grows with each run
        **_linear_cost(wan, sides),
    )


# Norms and other chains


def _rounded(y: Tensor) -> tuple[Tensor, Tensor]:
    scale = y.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return torch.round(y / scale).to(torch.int8), scale


def _modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def _norm(wan: Wan, device: torch.device, *, adds: bool, rounds: bool) -> Pair:
    x = _randn(device, 1, wan.tokens, wan.channels, dtype=torch.float32)
    y = _randn(device, 1, wan.tokens, wan.channels, seed=1) * 1e-3  # x is written to: it must not grow
    shift, scale, gate = _randn(device, 1, 3, wan.channels, dtype=torch.float32, seed=2).split(1, dim=1)

    def chain(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Any:
        new = x + gate * y if adds else x
        normed = _modulated(new, scale, shift)
        out = _rounded(normed) if rounds else (normed.bfloat16(),)
        return (*out, new) if adds else out

    run = _compiled(device, chain)
    name = ("residual_" if adds else "") + "layer_norm_modulate" + ("_quantize" if rounds else "")
    operation: Callable[..., Any] = getattr(kernels, name)
    streams = (x, y) if adds else (x,)
    options: dict[str, Any] = {"eps": EPS} | ({"gate": gate} if adds else {})
    if rounds:
        ours = partial(operation, *streams, scale, shift, torch.int8, **options)
    else:
        ours = partial(operation, *streams, scale, shift, out_dtype=torch.bfloat16, **options)
    return Pair(
        ours,
        {"compiled": lambda: run(x, y, gate, scale, shift)[0]},
        bytes=x.numel() * ((4 + 2 + 4 if adds else 4) + (1 if rounds else 2)),
        result=lambda out: out.values if rounds else out,
        cosine=0.0 if adds else 0.999,
    )


def _turned(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight
    real, imaginary = normed.float().unflatten(-1, (-1, HEAD_DIM // 2, 2)).unbind(-1)
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1).flatten(-2)


def _rms_norm_rope(wan: Wan, device: torch.device, *, rounds: bool) -> Pair:
    x, weight = _randn(device, 1, wan.tokens, wan.channels), _randn(device, wan.channels, seed=1)
    rotations = rope_rotations(wan.grid, HEAD_DIM).to(device)
    cos, sin = rotations.real[:, None].contiguous(), rotations.imag[:, None].contiguous()
    chain = _compiled(device, lambda *args: _rounded(_turned(*args)) if rounds else (_turned(*args).to(x.dtype),))
    operation = kernels.rms_norm_rope_quantize if rounds else kernels.rms_norm_rope
    return Pair(
        lambda: operation(x, weight, rotations, eps=EPS),
        {"compiled": lambda: chain(x, weight, cos, sin)[0]},
        bytes=x.numel() * (3 if rounds else 4) + 8 * rotations.numel(),
        result=lambda out: out.values if rounds else out,
    )


def _rms_norm_rope_quantize_keys(wan: Wan, device: torch.device) -> Pair:
    x, weight = _randn(device, 1, wan.tokens, wan.channels), _randn(device, wan.channels, seed=1)
    mean = _randn(device, 1, wan.heads, HEAD_DIM, dtype=torch.float32, seed=2)
    rotations = rope_rotations(wan.grid, HEAD_DIM).to(device)
    cos, sin = rotations.real[:, None].contiguous(), rotations.imag[:, None].contiguous()
    chain = _compiled(device, lambda mean, *args: _rounded(_turned(*args) - mean[:, None]))

    def rows(keys: Any) -> Tensor:
        values, scale = keys.rows
        return _rounded(values * scale[..., None])[0]  # the peer has a scale for each token

    return Pair(
        lambda: kernels.rms_norm_rope_quantize_keys(x, weight, rotations, mean, eps=EPS),
        {"compiled": lambda: chain(mean, x, weight, cos, sin)[0]},
        bytes=x.numel() * 3 + 8 * rotations.numel(),
        result=rows,
    )


def _rms_norm_silu(wan: Wan, device: torch.device) -> Pair:
    channels = 96  # of the VAE's last stage, where most of its traffic is
    x = _randn(device, 1, channels, 4, *wan.frame).contiguous(memory_format=torch.channels_last_3d)
    weight = _randn(device, channels, seed=1)
    chain = _compiled(
        device, lambda x, w: F.silu(F.normalize(x, dim=1) * channels**0.5 * w.view(-1, 1, 1, 1) / channels**0.5)
    )
    return Pair(lambda: kernels.rms_norm_silu(x, weight), {"compiled": lambda: chain(x, weight)}, bytes=4 * x.numel())


def _conv(wan: Wan, device: torch.device, *, level: int) -> Pair:
    """A convolution of a residual block of the VAE's decoder; its peer is given chunk and history joined already."""
    name = next((name for name, other in WAN.items() if other == wan), None)
    channels, smaller = (16, 1) if name is None else list(VAE_LEVELS[name].items())[level]
    height, width = (side // smaller for side in wan.frame)
    shape = (1, channels, 2 * VAE_FRAMES, height, width)
    joined = _randn(device, *shape, dtype=torch.float16).contiguous(memory_format=torch.channels_last_3d)
    weight = _randn(device, channels, channels, 3, 3, 3, dtype=torch.float16, seed=1) / (27 * channels) ** 0.5
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    bias = _randn(device, channels, dtype=torch.float16, seed=2)
    history, x = joined[:, :, :VAE_FRAMES], joined[:, :, VAE_FRAMES:]
    packed = kernels.pack_conv(weight)

    def peer() -> Tensor:
        with torch.backends.cudnn.flags(benchmark=True):
            return F.conv3d(joined, weight, bias, padding=(0, 1, 1))

    return Pair(
        lambda: kernels.causal_conv3d(x, history, packed, bias),
        {"conv3d": peer},
        operations=2.0 * 27 * channels**2 * VAE_FRAMES * height * width,
        bytes=2.0 * (2 * VAE_FRAMES + VAE_FRAMES) * channels * height * width,
    )


def _quantize_rows(wan: Wan, device: torch.device) -> Pair:
    x = _randn(device, wan.tokens, wan.hidden)
    chain = _compiled(device, lambda x: _rounded(x.float()))
    return Pair(
        lambda: kernels.quantize_rows(x, torch.int8),
        {"compiled": lambda: chain(x)[0]},
        bytes=3 * x.numel(),
        result=lambda out: out.values,
    )


def _guided_update(wan: Wan, device: torch.device) -> Pair:
    frames, rows, columns = wan.grid
    shape = (1, 16, frames, 2 * rows, 2 * columns)
    latents, with_prompt, without = (_randn(device, *shape, dtype=torch.float32, seed=seed) for seed in range(3))
    update = Update(sigma=0.9, start=1.0, velocity=-0.05)

    def chain(latents: Tensor, with_prompt: Tensor, without: Tensor) -> tuple[Tensor, Tensor]:
        velocity = without + 5.0 * (with_prompt - without)
        return latents - 0.05 * velocity, latents - 0.9 * velocity

    run = _compiled(device, chain)
    return Pair(
        lambda: kernels.guided_update(latents, with_prompt, update, without=without, guidance=5.0),
        {"compiled": lambda: run(latents, with_prompt, without)[0]},
        bytes=5 * 4 * latents.numel(),
        result=lambda out: out.latents,
    )


def _block(wan: Wan, device: torch.device, *, dtype: torch.dtype) -> Pair:
    ours, peers = block_runs(wan, device, dtype)
    return Pair(ours, peers, operations=block_operations(wan), cosine=0.0)  # each has a stream of its own


E4M3 = torch.float8_e4m3fn
CONV_LEVELS = ("coarse", "middle", "fine")  # the VAE's, as VAE_LEVELS lists them
PAIRS: dict[str, Callable[[Wan, torch.device], Pair]] = {
    "attention": _attention,
    "attention_int8_prepared": partial(_attention_int8, values=E4M3, prepares=True),
    "attention_int8": partial(_attention_int8, values=E4M3, prepares=False),
    "attention_int8_fp16": partial(_attention_int8, values=torch.float16, prepares=False),
    "attention_sparse_quarter": partial(_attention_sparse, density=0.25),
    "linear_8bit_e4m3": partial(_linear, dtype=E4M3),
    "linear_8bit_int8": partial(_linear, dtype=torch.int8),
    "linear_8bit_gelu_e4m3": partial(_linear_gelu, dtype=E4M3),
    "linear_8bit_gelu_int8": partial(_linear_gelu, dtype=torch.int8),
    "linear_8bit_residual_e4m3": partial(_linear_residual, dtype=E4M3),
    "linear_8bit_residual_int8": partial(_linear_residual, dtype=torch.int8),
    "layer_norm_modulate": partial(_norm, adds=False, rounds=False),
    "layer_norm_modulate_quantize": partial(_norm, adds=False, rounds=True),
    "residual_layer_norm_modulate": partial(_norm, adds=True, rounds=False),
    "residual_layer_norm_modulate_quantize": partial(_norm, adds=True, rounds=True),
    "rms_norm_rope": partial(_rms_norm_rope, rounds=False),
    "rms_norm_rope_quantize": partial(_rms_norm_rope, rounds=True),
    "rms_norm_rope_quantize_keys": _rms_norm_rope_quantize_keys,
    "rms_norm_silu": _rms_norm_silu,
    **{f"causal_conv3d_{level}": partial(_conv, level=index) for index, level in enumerate(CONV_LEVELS)},
    "quantize_rows": _quantize_rows,
    "guided_update": _guided_update,
    "block_e4m3": partial(_block, dtype=E4M3),
    "block_int8": partial(_block, dtype=torch.int8),
}
