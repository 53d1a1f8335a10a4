"""`accelerate` puts wanfast under a diffusers pipeline, `restore` takes it out again."""

from types import MethodType
from typing import Any, Literal, TypeVar

import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel

from wanfast.config import ExpertName
from wanfast.diffusers_backend.checks import check_module, check_whole
from wanfast.diffusers_backend.experts import Experts, config_of
from wanfast.diffusers_backend.transformer import WanFastTransformer3DModel
from wanfast.diffusers_backend.vae import WanFastAutoencoder
from wanfast.errors import RequestError

Pipe = TypeVar("Pipe")

_FAST = {WanTransformer3DModel: WanFastTransformer3DModel, AutoencoderKLWan: WanFastAutoencoder}


def accelerate(
    pipe: Pipe, precision: Literal["auto", "fp32", "exact", "fp8", "int8"] = "auto", vram: int | str | None = None
) -> Pipe:
    """Run a diffusers pipeline's transformers and VAE on wanfast; everything else of it stays as it is.

    The modules keep their parameters, which wanfast reads where they are. Only a precision that is not the weights' own
    makes a copy of them: of 8 bits in host memory, where the modules' own weights then stay too.

    Args:
        pipe: a WanPipeline or WanImageToVideoPipeline with a Wan 2.2 model; changed in place.
        precision: of the transformers: "fp32", or "exact" = 16 bits where the reference has 16 bits; "fp8" or "int8" =
            that, with the blocks multiplying in 8 bits; "auto" is what the weights' dtype says, never fewer bits. The
            VAE computes in its own dtype.
        vram: device memory that the transformers' blocks may keep, in bytes or as "20GB": the weights then stay in host
            memory, wherever the pipeline is moved to. None is no bound.

    Returns:
        The same pipeline.

    Raises:
        RequestError: something in the pipeline is not what wanfast can run, or an argument is not as above; the
            pipeline is then as it was.
    """
    parts = _parts(pipe)
    transformers = {name: parts[name] for name in ("transformer", "transformer_2") if name in parts}
    names: tuple[ExpertName, ...] = ("high_noise", "low_noise") if len(transformers) == 2 else ("single",)
    experts = Experts(dict(zip(names, transformers.values(), strict=True)), precision, vram)
    for part, module in parts.items():
        check_module(part, module)
        if type(module) in _FAST:
            check_whole(part, module)
        if part in transformers:
            experts.check_fit(config_of(module), module.device)
    for name, module in zip(names, transformers.values(), strict=True):
        device = (_put_back(module) if isinstance(module, WanFastTransformer3DModel) else None) or module.device
        place = torch.device("cpu") if experts.is_hosted else device
        if module.device != place:
            module.to(place)
        _adopt(module, WanFastTransformer3DModel)
        module._wanfast = (experts, name)
        module._wanfast_device = device if experts.is_hosted else None
    if "vae" in parts:
        _adopt(parts["vae"], WanFastAutoencoder)
        parts["vae"]._wanfast = experts
    return pipe


def restore(pipe: Pipe) -> Pipe:
    """Undo `accelerate`: the pipeline computes with diffusers' own code again, and wanfast holds none of its memory.

    Args:
        pipe: any diffusers pipeline; changed in place.

    Returns:
        The same pipeline.

    Raises:
        RequestError: it is not accelerated.
        torch.OutOfMemoryError: weights that stayed in host memory do not fit the device the pipeline was moved to. The
            modules are diffusers' own then, with these weights where they were.
    """
    modules: list[Any] = [
        module for module in getattr(pipe, "components", {}).values() if isinstance(module, tuple(_FAST.values()))
    ]
    if not modules:
        raise RequestError(f"pipe: must have been given to wanfast.accelerate before, got {type(pipe).__name__}")
    # All are diffusers' own before any is moved, which the device may have no room for.
    places = [_put_back(module) for module in modules]
    for module, place in zip(modules, places, strict=True):
        if place is not None:
            module.to(place)
    return pipe


def _parts(pipe: Any) -> dict[str, Any]:
    """Find the modules to take over, and hold each to the kind it must be."""
    if not isinstance(pipe, WanPipeline | WanImageToVideoPipeline):
        raise RequestError(
            f"pipe: must be a WanPipeline or WanImageToVideoPipeline of diffusers, got {type(pipe).__name__}"
        )
    wanted = {"transformer": WanTransformer3DModel, "transformer_2": WanTransformer3DModel, "vae": AutoencoderKLWan}
    parts = {name: module for name in wanted if (module := getattr(pipe, name, None)) is not None}
    if not parts.keys() & {"transformer", "transformer_2"}:
        raise RequestError("pipe: must have a transformer, got none")
    for name, module in parts.items():
        if type(module) not in (wanted[name], _FAST[wanted[name]]):
            raise RequestError(
                f"{name}: must be diffusers' {wanted[name].__name__} itself, got {type(module).__name__}; wrapped,"
                " compiled and derived ones compute something that wanfast does not know"
            )
    return parts


def _adopt(module: Any, kind: Any) -> None:
    """Change a module's class in place: its identity, parameters and hooks are those that others already hold."""
    _rebind(module, type(module).forward, kind.forward)
    module.__class__ = kind


def _put_back(module: Any) -> torch.device | None:
    """Make a module diffusers' own again; where its owner wants it, if its weights stayed behind in host memory."""
    kind = next(plain for plain, fast in _FAST.items() if isinstance(module, fast))
    device: torch.device | None = module.__dict__.pop("_wanfast_device", None)
    module.__dict__.pop("_wanfast", None)
    _rebind(module, type(module).forward, kind.forward)
    module.__class__ = kind
    return device


def _rebind(module: Any, old: Any, new: Any) -> None:
    """Let an offload hook that wraps the module's forward, or did so once, wrap the other one."""
    for name in ("forward", "_old_forward"):
        method = module.__dict__.get(name)
        if isinstance(method, MethodType) and method.__func__ is old:
            module.__dict__[name] = MethodType(new, module)
