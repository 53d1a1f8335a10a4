"""What a diffusers module holds, by official names, and whether it has changed since it was last looked at.

A pipeline's owner may move the module, load LoRAs into it, replace or write to its parameters at any time. Instead of
following every door that leads there, each forward compares the module with what it was.
"""

import gc
import sys
from collections.abc import Iterator, Set
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from wanfast.checkpoint.names import dit_from_diffusers
from wanfast.checkpoint.reader import memory_reader
from wanfast.config import ExpertName
from wanfast.diffusers_backend.checks import has_hook
from wanfast.diffusers_backend.original import adapted_kind
from wanfast.errors import RequestError
from wanfast.lora import LayerKeys, Lora, LoraReport, LoraSpec
from wanfast.lora_names import Part

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Snapshot:
    """The identity of everything in a module that its output depends on."""

    __slots__ = ("_blocks", "_counted", "_layers", "_tables", "_tensors", "_values", "_were")

    def __init__(self, module: nn.Module, taken: Set[int] = frozenset()) -> None:
        """Take it; no data is read.

        Args:
            module: a transformer.
            taken: addresses of the data that is used where it is, so that writes to it need not be seen.
        """
        # Every child and every parameter. What their tables refer to is asked of Python's garbage collector, which
        # reads all of them in one call: between two forwards the caches go cold, and a look-up each takes far longer.
        tables = [table for owner in module.modules() for table in (owner._parameters, owner._modules)]
        self._tables = [table for table in tables if table]
        self._values = gc.get_referents(*self._tables)
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        copied = (tensor for tensor in self._tensors if tensor.data_ptr() not in taken)
        self._counted = [tensor for tensor in copied if not tensor.is_inference()]  # which count no writes
        self._layers = [layer for _, layer in tuner_layers(module)]
        self._blocks = list(getattr(module, "blocks", ()))
        self._were = self._contents()

    @property
    def has_adapters(self) -> bool:
        """Whether PEFT has wrapped any layer."""
        return bool(self._layers)

    def is_current(self) -> bool:
        """Whether the module is still the same; microseconds per block, so it can be asked before every forward."""
        values = gc.get_referents(*self._tables)
        return (
            len(values) == len(self._values)
            and all(map(is_, values, self._values))
            and self._contents() == self._were
            and not any(map(has_hook, self._blocks))
        )

    def _contents(self) -> tuple[object, ...]:
        """Where each tensor's data is, which a cast or a move changes; writes to copied ones; settings of adapters."""
        return (
            list(map(Tensor.data_ptr, self._tensors)),
            list(map(Tensor.is_contiguous, self._tensors)),  # a transposed matrix begins where it did
            list(map(attrgetter("_version"), self._counted)),
            list(map(_settings, self._layers)),
        )


def official_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Give a transformer's own parameters their official names, without a copy; LoRA factors are left out.

    Raises:
        RequestError: a parameter is not a plain tensor of 16 or 32 bits.
    """
    prefixes = tuple(f"{name}." for name, _ in tuner_layers(module))
    tensors = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name.startswith(prefixes):
            name, found, rest = name.rpartition(".base_layer.")
            if not found:
                continue
            name = f"{name}.{rest}"
        _check_plain(name, parameter)
        tensors[name] = parameter.data
    return {official: tensors[name] for name, official in dit_from_diffusers(tensors).items()}


def _check_plain(name: str, parameter: Tensor) -> None:
    if parameter.device.type == "meta":
        raise RequestError(
            f"transformer: its weights must be in memory, but {name} is on the meta device, as after"
            " enable_sequential_cpu_offload; load the pipeline anew and bound its memory with"
            " wanfast.accelerate(pipe, vram=...)"
        )
    if type(parameter) is not nn.Parameter or parameter.dtype not in _FLOATS:
        kind = type(parameter).__name__ if type(parameter) is not nn.Parameter else str(parameter.dtype)
        raise RequestError(
            f"transformer: its weights must be float32, bfloat16 or float16, got {name} as {kind}, as after"
            " quantisation or enable_layerwise_casting; load the pipeline without, or the quantised file itself with"
            " wanfast.load"
        )


def tuner_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that PEFT has wrapped, with their names; none as long as nothing has imported PEFT."""
    if kind := adapted_kind():
        named = module.named_modules(remove_duplicate=False)
        yield from ((name, layer) for name, layer in named if isinstance(layer, kind))


def _settings(layer: Any) -> tuple[object, ...]:
    """What, beside parameters, a wrapped layer's output depends on."""
    merged = tuple(getattr(layer, "merged_adapters", ()))
    return tuple(layer.active_adapters), layer.disable_adapters, merged, tuple(getattr(layer, "scaling", {}).items())


def unmerge_disabled(module: nn.Module) -> None:
    """Take adapters that are fused and then disabled out of the weights again, as PEFT's own forward does."""
    for _, layer in tuner_layers(module):
        if layer.disable_adapters and layer.merged:
            layer.unmerge()


def active_loras(module: nn.Module, expert: ExpertName, scale: float) -> tuple[Lora, ...]:
    """Read what PEFT's active adapters add to a transformer, one `Lora` per adapter.

    Args:
        module: a WanTransformer3DModel.
        expert: to name the layers' owner by.
        scale: every adapter's strength is multiplied by it, as by `attention_kwargs={"scale": ...}`.

    Raises:
        RequestError: an adapter is not a plain LoRA.
    """
    layers: dict[str, dict[str, LayerKeys]] = {}
    tensors: dict[str, Tensor] = {}
    for name, layer in tuner_layers(module):
        if layer.disable_adapters or layer.merged:
            continue
        official = next(iter(dit_from_diffusers([f"{name}.weight"]).values())).removesuffix(".weight")
        for adapter in layer.active_adapters:
            _check_plain_lora(name, layer, adapter)
            if adapter not in layer.lora_A:
                continue
            keys: dict[Part, str] = {"down": f"{adapter}.{official}.down", "up": f"{adapter}.{official}.up"}
            tensors[keys["down"]] = layer.lora_A[adapter].weight
            tensors[keys["up"]] = layer.lora_B[adapter].weight
            if layer.lora_B[adapter].bias is not None:
                keys["up_bias"] = f"{adapter}.{official}.up_bias"
                tensors[keys["up_bias"]] = layer.lora_B[adapter].bias
            layers.setdefault(adapter, {})[official] = LayerKeys(keys, layer.scaling[adapter])
    reader = memory_reader(tensors, "LoRA in the pipeline")
    report = LoraReport(tuple(tensors), (), {})
    return tuple(
        Lora(LoraSpec(adapter, strength=scale), reader, {expert: own}, report) for adapter, own in layers.items()
    )


def _check_plain_lora(name: str, layer: Any, adapter: str) -> None:
    lora = sys.modules["peft.tuners.lora"]
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    is_plain = isinstance(layer, lora.LoraLayer) and variant is None and not layer.use_dora.get(adapter, False)
    if not is_plain:
        kind = type(layer).__name__ if variant is None else type(variant).__name__
        raise RequestError(f"adapter {adapter}: must be a plain LoRA, got {kind} on {name}; unload it or restore(pipe)")
