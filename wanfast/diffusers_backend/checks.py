"""What wanfast cannot honour in a diffusers module, refused by name."""

from collections.abc import Callable
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from wanfast.errors import RequestError

# Whose layers compute what their names say; one of somebody's own in their place may do anything.
_PACKAGES = ("accelerate", "diffusers", "peft", "torch", "transformers", "wanfast")

# Methods of diffusers' models that change how the layers inside are called; wanfast calls none of them.
REFUSED = {
    "compile": "wanfast has its own kernels; leave it out",
    "compile_repeated_blocks": "wanfast has its own kernels; leave it out",
    "dequantize": "wanfast takes plain weights only",
    "enable_cache": "wanfast computes every block of every step; restore(pipe) first",
    "enable_gradient_checkpointing": "wanfast has no gradients; restore(pipe) to train",
    "enable_group_offload": "wanfast.accelerate(pipe, vram=...) bounds the memory of the weights",
    "enable_layerwise_casting": "wanfast takes weights in the dtype they are computed in; load them so",
    "enable_npu_flash_attention": "wanfast has its own attention; leave it out",
    "enable_parallelism": "wanfast runs on one device; restore(pipe) first",
    "enable_xla_flash_attention": "wanfast has its own attention; leave it out",
    "fuse_qkv_projections": "wanfast reads the projections one by one; leave it out",
    "set_attention_backend": "wanfast has its own attention; leave it out",
    "set_attn_processor": "wanfast has its own attention; leave it out",
    "set_use_memory_efficient_attention_xformers": "wanfast has its own attention; leave it out",
}


def refused(name: str) -> Callable[..., NoReturn]:
    """Make a method that says why it is not there."""

    def method(self: object, *args: object, **kwargs: object) -> NoReturn:
        raise RequestError(f"{name}: must not be called on an accelerated module; {REFUSED[name]}")

    method.__name__ = name
    method.__doc__ = f"Refused: {REFUSED[name]}."
    return method


def has_hook(module: nn.Module) -> bool:
    """Whether calling a module would do more than its class's forward, which wanfast does not call."""
    own = module.__dict__
    forward = own.get("forward")
    is_class_own = forward is None or getattr(forward, "__func__", None) is type(module).forward  # left by offloading
    return bool(
        not is_class_own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own.get("_compiled_call_impl") is not None
    )


class NotCompiled:
    """What torch.compile asks a module for before it wraps it; to trace wanfast's own code would take it minutes."""

    def __get__(self, module: object, kind: type) -> NoReturn:
        """Refuse, unless the class itself is looked at."""
        if module is None:
            raise AttributeError
        raise RequestError(f"torch.compile: must not be called on an accelerated module; {REFUSED['compile']}")


def check_whole(part: str, module: Any) -> None:
    """Refuse a transformer or VAE whose own forward somebody has replaced, as scripts do that skip steps or blocks.

    Args:
        part: its name in the pipeline.
        module: a diffusers model; a hook of accelerate's may stand before its forward.

    Raises:
        RequestError: it has another forward than its class, or its class another one than diffusers gave it.
    """
    own = module.__dict__.get("_old_forward" if "_hf_hook" in module.__dict__ else "forward")
    is_class_own = own is None or (isinstance(own, MethodType) and own.__func__ is type(module).forward)
    if not is_class_own or _is_patched(type(module), "forward"):
        raise RequestError(
            f"{part}: its forward must be diffusers' own, which wanfast computes, got another that was put in its"
            " place; leave that out, or use diffusers without wanfast"
        )


def _is_patched(kind: type, name: str) -> bool:
    """Whether a method comes from another package than the class that defines it."""
    owner = next(base for base in kind.__mro__ if name in vars(base))
    source = getattr(vars(owner)[name], "__globals__", {}).get("__name__", "")  # a wrapper cannot disguise these
    return bool(source.partition(".")[0] != owner.__module__.partition(".")[0])


def check_module(part: str, module: Any) -> None:
    """Refuse a transformer or VAE in which something hangs on the layers inside.

    Args:
        part: its name in the pipeline.
        module: a diffusers model.

    Raises:
        RequestError: quantisation, a hook, a compiled block, another attention or fused projections; by name.
    """
    if getattr(module, "is_quantized", False) or getattr(module, "hf_quantizer", None) is not None:
        raise RequestError(
            f"{part}: must not be quantised by diffusers; load it without a quantization_config, or the quantised file"
            " itself with wanfast.load"
        )
    if module.__dict__.get("_compiled_call_impl") is not None:
        raise RequestError(f"{part}: must not be compiled; {REFUSED['compile']}")
    kinds = {type(child) for name, child in module.named_modules() if name}
    if foreign := sorted(kind.__name__ for kind in kinds if kind.__module__.partition(".")[0] not in _PACKAGES):
        raise RequestError(
            f"{part}: its layers must be diffusers' own, which wanfast computes, got a {foreign[0]}; leave that out, or"
            " use diffusers without wanfast"
        )
    if patched := sorted(kind.__name__ for kind in kinds if _is_patched(kind, "forward")):
        raise RequestError(
            f"{part}: its layers must compute as diffusers wrote them, got another forward put into {patched[0]}; leave"
            " that out, or use diffusers without wanfast"
        )
    for name, child in module.named_modules():
        if not name:
            continue
        if has_hook(child):
            raise RequestError(
                f"{part}: nothing may hang on the layers inside, as wanfast does not call them, but {name} has a hook,"
                " a compiled call or a forward of its own (enable_group_offload, enable_sequential_cpu_offload,"
                " enable_layerwise_casting, enable_cache, compile_repeated_blocks or another library); leave that out,"
                " and bound memory with wanfast.accelerate(pipe, vram=...)"
            )
        if getattr(child, "fused_projections", False):
            raise RequestError(f"{part}: {name} has fused projections; {REFUSED['fuse_qkv_projections']}")
        _check_processor(part, name, getattr(child, "processor", None))


def _check_processor(part: str, name: str, processor: Any) -> None:
    if processor is None:
        return
    backend = getattr(processor, "_attention_backend", None)
    kind = type(processor).__name__
    chosen = "native" if backend is None else str(getattr(backend, "value", backend))
    is_own = kind in ("WanAttnProcessor", "WanAttnProcessor2_0") and not _is_patched(type(processor), "__call__")
    if not is_own or chosen != "native":
        raise RequestError(
            f"{part}: {name} must have diffusers' own attention, got {kind} with the backend {chosen};"
            f" {REFUSED['set_attention_backend']}"
        )


def refuse_gradient(name: str, x: Tensor) -> None:
    """Refuse an input whose gradient somebody waits for.

    Raises:
        RequestError: it needs a gradient, and gradients are on.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise RequestError(
            f"{name}: must need no gradient, as wanfast has none, got one that does; use torch.no_grad()"
        )
