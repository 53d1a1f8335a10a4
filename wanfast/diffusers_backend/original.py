"""The model that diffusers makes of a config, and what of a user's differs from it.

wanfast computes what diffusers' classes do with the parameters they own. Whatever else decides about their result must
be as it was made: the layers' classes, settings and tables.
"""

import inspect
import pickle
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

# Attributes that are looked at by themselves, and one that only gradients depend on.
_LOOKED_AT = {*nn.Module().__dict__, "_compiled_call_impl", "forward", "processor", "gradient_checkpointing"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDING = 1e-6  # of tables of cosines and sines that another device computed


def make(kind: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Make a diffusers model whose parameters are on the meta device, while its tables have their values.

    Args:
        kind: a class of diffusers' models.
        arguments: of its constructor.
    """
    with torch.device("meta"):
        model = kind(**arguments)
    rope = getattr(model, "rope", None)
    if rope is not None:
        with torch.device("cpu"):
            model.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    return model


def original_of(kind: type, module: Any) -> nn.Module:
    """Give the model that diffusers makes of a module's config, made once for all of the same.

    Args:
        kind: diffusers' class of it.
        module: has a config.
    """
    names = list(inspect.signature(kind.__init__).parameters)[1:]  # type: ignore[misc]
    return _make_once(kind, pickle.dumps({name: module.config[name] for name in names if name in module.config}))


@lru_cache(maxsize=4)
def _make_once(kind: type, arguments: bytes) -> nn.Module:
    model: nn.Module = make(kind, pickle.loads(arguments))
    return model


def adapted_kind() -> type | tuple[()]:
    """The class of layers that PEFT has wrapped; as long as nothing has imported PEFT there are none."""
    utils = sys.modules.get("peft.tuners.tuners_utils")
    return () if utils is None else utils.BaseTunerLayer


def other_settings(module: nn.Module, wanted: nn.Module) -> Iterator[str]:
    """Tell how the attributes and tables of one module differ from its original's.

    Args:
        module: of a user.
        wanted: the original, of the same class.

    Yields:
        "NAME = VALUE instead of VALUE" or such.
    """
    for name, value in module.__dict__.items():
        if name not in _LOOKED_AT and not _is_as_wanted(name, value, wanted):
            had = f"instead of {_told(getattr(wanted, name))}" if hasattr(wanted, name) else "which diffusers has not"
            yield f"{name} = {_told(value)} {had}"
    for name in sorted(wanted.__dict__.keys() - module.__dict__.keys() - _LOOKED_AT):
        yield f"no {name}"
    for name in sorted(wanted._buffers.keys() | module._buffers.keys()):
        if not _is_same_table(module._buffers.get(name), wanted._buffers.get(name)):
            yield f"other values in its table {name}"


def other_parts(module: nn.Module, wanted: nn.Module) -> Iterator[str]:
    """Tell how the names and shapes of one module's parameters, and the names of its children, differ.

    Args:
        module: of a user.
        wanted: the original, of the same class.

    Yields:
        "parameter NAME of shape SHAPE instead of SHAPE" or such.
    """
    shapes, own = ({name: p.shape for name, p in m._parameters.items() if p is not None} for m in (wanted, module))
    for name in sorted(shapes.keys() | own.keys()):
        if own.get(name) != shapes.get(name):
            got, want = (str(list(found[name])) if name in found else "none" for found in (own, shapes))
            yield f"parameter {name} of shape {got} instead of {want}"
    names, own_names = list(wanted._modules), list(module._modules)
    for name in own_names:
        if name not in names:
            yield f"a layer {name}, which diffusers has not"
    for name in names:
        if name not in own_names:
            yield f"no layer {name}"
    if sorted(own_names) == sorted(names) and own_names != names:
        yield "its layers in another order"


def _is_as_wanted(name: str, value: Any, wanted: nn.Module) -> bool:
    """Whether an attribute is the original's, or of its class's value; what a library notes for itself is private."""
    own = wanted.__dict__.get(name)
    if type(own) is type(value) and not isinstance(own, Tensor) and own == value:
        return True
    if not hasattr(wanted, name):
        return name.startswith("_")
    original = getattr(wanted, name)
    if isinstance(original, MethodType):
        return getattr(value, "__func__", None) is original.__func__
    if isinstance(value, Tensor) or isinstance(original, Tensor):
        return False
    return value is original or (type(value) is type(original) and bool(value == original))


def _is_same_table(own: Tensor | None, table: Tensor | None) -> bool:
    """Whether a table has its values, which a cast of the whole model may have rounded."""
    if own is None or table is None:
        return own is table
    if own.is_meta:
        return True  # as all the weights are then, which is told where they are read
    if own.shape != table.shape:
        return False
    values = own.detach().to("cpu", torch.float32)
    return any(torch.allclose(values, table.to(dtype).float(), rtol=0, atol=_ROUNDING) for dtype in _DTYPES)


def _told(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
