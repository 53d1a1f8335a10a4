"""What wanfast cannot honour in a diffusers module, refused by name."""

import sys
from collections.abc import Callable, Iterator
from itertools import chain
from types import MethodType
from typing import Any, NoReturn, cast

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from wanfast.diffusers_backend.original import adapted_kind, original_of, other_parts, other_settings
from wanfast.errors import RequestError

# Whose layers compute what their names say: those of diffusers' models, and those in what PEFT wraps around them.
_PACKAGES = ("diffusers", "peft", "torch")
_LEAVE_OUT = "leave that out, or use diffusers without wanfast"

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
    """What torch.compile asks a module for before it wraps it: a wrapped one could not be restored."""

    def __get__(self, module: object, kind: type) -> NoReturn:
        """Refuse torch.compile; to all others, such as `inspect`, the attribute is not there."""
        if module is None or not sys._getframe(1).f_globals.get("__name__") == "torch._dynamo.eval_frame":
            raise AttributeError
        raise RequestError(f"torch.compile: must not be called on an accelerated module; {REFUSED['compile']}")


def check_whole(part: str, module: Any) -> None:
    """Refuse a transformer or VAE that is called otherwise than its class is written, as scripts do that skip steps.

    Args:
        part: its name in the pipeline.
        module: a diffusers model; a hook of accelerate's may stand before its forward.

    Raises:
        RequestError: what wanfast is to replace is not what diffusers wrote, or hooks hang on all modules.
    """
    if _global_forward_hooks or _global_forward_pre_hooks:
        raise RequestError(
            f"{part}: there must be no hooks on all modules, as wanfast does not call the layers inside, but"
            f" torch.nn.modules.module.register_module_forward_hook or its like was called; {_LEAVE_OUT}"
        )
    kind = type(module)
    forward = "_old_forward" if "_hf_hook" in module.__dict__ else "forward"
    for method in ("forward", "_encode", "_decode"):
        own = module.__dict__.get(forward if method == "forward" else method)
        is_class_own = own is None or (isinstance(own, MethodType) and own.__func__ is getattr(kind, method))
        if hasattr(kind, method) and not (is_class_own and _is_as_written(kind, method)):
            raise RequestError(
                f"{part}: its {method} must be diffusers' own, which wanfast computes, got another that was put in its"
                f" place; {_LEAVE_OUT}"
            )


def _is_as_written(kind: type, name: str) -> bool:
    """Whether a method comes from the package of the class that defines it."""
    owner = next(base for base in kind.__mro__ if name in vars(base))
    source = getattr(vars(owner)[name], "__globals__", {}).get("__name__", "")  # a wrapper cannot disguise these
    return bool(source.partition(".")[0] == owner.__module__.partition(".")[0])


def check_module(part: str, module: Any) -> None:
    """Refuse a transformer or VAE in which a layer is not as diffusers makes it of the model's config.

    Its parameters' values are the user's, and what PEFT has wrapped around its layers.

    Args:
        part: its name in the pipeline.
        module: a diffusers model, which may be accelerated.

    Raises:
        RequestError: quantisation, a hook, a compiled block, another attention or fused projections; a layer, a setting
            or a table that is another, is missing or too much; by name.
    """
    if getattr(module, "is_quantized", False) or getattr(module, "hf_quantizer", None) is not None:
        raise RequestError(
            f"{part}: must not be quantised by diffusers; load it without a quantization_config, or the quantised file"
            " itself with wanfast.load"
        )
    if module.__dict__.get("_compiled_call_impl") is not None:
        raise RequestError(f"{part}: must not be compiled; {REFUSED['compile']}")
    kind = next(kind for kind in (WanTransformer3DModel, AutoencoderKLWan) if isinstance(module, kind))
    of_kinds = {}
    for name, layer, wanted in _pairs(module, original_of(kind, module)):
        if name:
            of_kinds[type(layer)] = name
            _check_layer(part, name, layer, wanted)
        settings = other_settings(layer, wanted) if name else ()  # the whole module's own are honoured
        for difference in chain(other_parts(layer, wanted), settings):
            raise RequestError(
                f"{part}: {name or 'it'} must be as diffusers makes it, which wanfast computes, but has {difference};"
                f" {_LEAVE_OUT}"
            )
    for kind, name in of_kinds.items():
        if not (_is_as_written(kind, "forward") and _is_as_written(kind, "__init__")):
            raise RequestError(
                f"{part}: its layers must compute as diffusers wrote them, but another method was put into"
                f" {kind.__name__}, as of {name}; {_LEAVE_OUT}"
            )


def _pairs(module: Any, wanted: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield a module and all within, each with its original; what PEFT has put around a layer has none but itself."""
    if isinstance(module, cast(Any, adapted_kind())):
        for inner, child in module.named_modules():
            if inner.partition(".")[0] != "base_layer":
                yield f"{name}.{inner}".rstrip("."), child, child
        module = module.get_base_layer()
    yield name, module, wanted
    for child, original in wanted._modules.items():
        yield from _pairs(module._modules[child], original, f"{name}.{child}".lstrip("."))


def _check_layer(part: str, name: str, layer: Any, wanted: Any) -> None:
    kind = type(layer)
    if kind is not type(wanted) or kind.__module__.partition(".")[0] not in _PACKAGES:
        raise RequestError(
            f"{part}: {name} must be a {type(wanted).__name__} as diffusers makes it, which wanfast computes, got a"
            f" {kind.__name__}; {_LEAVE_OUT}"
        )
    if has_hook(layer):
        raise RequestError(
            f"{part}: nothing may hang on the layers inside, as wanfast does not call them, but {name} has a hook,"
            " a compiled call or a forward of its own (enable_group_offload, enable_sequential_cpu_offload,"
            " enable_layerwise_casting, enable_cache, compile_repeated_blocks or another library); leave that out,"
            " and bound memory with wanfast.accelerate(pipe, vram=...)"
        )
    if getattr(layer, "fused_projections", False):
        raise RequestError(f"{part}: {name} has fused projections; {REFUSED['fuse_qkv_projections']}")
    if "processor" in layer.__dict__:
        _check_processor(part, name, layer.processor, wanted.processor)


def _check_processor(part: str, name: str, processor: Any, wanted: Any) -> None:
    backend = getattr(processor, "_attention_backend", None)
    chosen = "native" if backend is None else str(getattr(backend, "value", backend))
    is_own = type(processor) is type(wanted) and _is_as_written(type(processor), "__call__")
    if not is_own or chosen != "native":
        raise RequestError(
            f"{part}: {name} must have diffusers' own attention, got {type(processor).__name__} with the backend"
            f" {chosen}; {REFUSED['set_attention_backend']}"
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
