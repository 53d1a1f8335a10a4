"""The transformers of a pipeline as wanfast's DiT reads them: from the modules that own their weights."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from wanfast.adapter import Adapter, attach, make_adapter
from wanfast.checkpoint.bind import check_names
from wanfast.checkpoint.reader import Reader, memory_reader
from wanfast.config import DiTConfig, ExpertName
from wanfast.diffusers_backend.checks import check_module
from wanfast.diffusers_backend.mapped import own_written_pages
from wanfast.diffusers_backend.snapshot import Snapshot, active_loras, official_tensors, unmerge_disabled
from wanfast.dit import packed
from wanfast.dit.packed import PackedBlock
from wanfast.dit.weights import BlockWeights, OuterWeights, expected_tensors, load_block, load_outer
from wanfast.errors import RequestError
from wanfast.residency import Residency, map_tensors, parse_bytes, to_device
from wanfast.residency.memory import free_host_memory, named_tensors
from wanfast.residency.store import RESERVE_BYTES

PRECISIONS = ("auto", "fp32", "exact", "fp8", "int8")
Blocks = Callable[[], Iterator[BlockWeights]]


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert, ready for passes over its blocks."""

    config: DiTConfig  # text_len is 0: a pipeline's prompts have any length
    outer: OuterWeights
    exact_blocks: Blocks  # the blocks in order, anew at each call; with 8-bit weights they compute in 16 bits
    eight_bit: torch.dtype | None  # in which blocks multiply
    configs: dict[int, DiTConfig]  # by length of the text, those that were asked for

    def config_for(self, text_len: int) -> DiTConfig:
        """Let the text have as many rows as it has: diffusers attends to what it is given, unpadded."""
        if text_len not in self.configs:
            self.configs[text_len] = replace(self.config, text_len=text_len)
        return self.configs[text_len]

    def blocks(self) -> Iterator[BlockWeights | PackedBlock]:
        """Give the blocks in order, as the expert's precision multiplies."""
        if self.eight_bit is None:
            return self.exact_blocks()
        return map(partial(packed.pack_block, dtype=self.eight_bit), self.exact_blocks())


@dataclass(frozen=True, slots=True)
class _Held:
    """One expert's weights where its module has them; views, but for what is computed in another dtype."""

    snapshot: Snapshot
    reader: Reader
    config: DiTConfig
    dtype: torch.dtype  # of the computation
    outer: OuterWeights
    blocks: tuple[BlockWeights, ...]  # empty where each is cast or rounded as it is used
    eight_bit: torch.dtype | None
    rounded: dict[int, BlockWeights] = field(default_factory=dict)  # to 8 bits, as many as the host has room for
    configs: dict[int, DiTConfig] = field(default_factory=dict)
    ready: Expert | None = None  # where nothing of it depends on the forward: weights in place, no adapters

    def expert(self, outer: OuterWeights, blocks: Blocks) -> Expert:
        return Expert(self.config, outer, blocks, self.eight_bit, self.configs)

    def block(self, index: int) -> BlockWeights:
        if self.blocks:
            return self.blocks[index]
        if index in self.rounded:
            return self.rounded[index]
        block = load_block(self.reader, self.config, index, self.dtype)
        if self.eight_bit is not None:
            block = packed.prepare_block(block, self.eight_bit)
            if free_host_memory() > RESERVE_BYTES + sum(tensor.nbytes for _, tensor in named_tensors(block)):
                self.rounded[index] = block
        return block


_Modules = dict[ExpertName, ReferenceType[nn.Module]]


class Experts:
    """The weights of a pipeline's transformers, with what of them is on the device where there is a bound.

    Without a bound weights are used where the module's owner put them. With one, or in 8 bits, they stay in host
    memory: one expert at a time has blocks on the device, as many as the bound or the device allows; others pass.
    """

    def __init__(self, modules: Mapping[ExpertName, nn.Module], precision: str, vram: int | str | None) -> None:
        """Read nothing yet.

        Args:
            modules: WanTransformer3DModels by expert.
            precision: "auto", "fp32", "exact", "fp8" or "int8".
            vram: bytes of the device that blocks may keep; None is no bound.

        Raises:
            RequestError: precision or vram is not as above.
        """
        if precision not in PRECISIONS:
            raise RequestError(f"precision: must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.budget = None if vram is None else parse_bytes("vram", vram)
        self.precision = precision
        self._eight_bit = packed.DTYPES.get(precision)
        # Weak, so that a module nobody else holds is gone at once, and what is held of it with it.
        self._modules: _Modules = {name: ref(module) for name, module in modules.items()}
        self._held: WeakKeyDictionary[nn.Module, _Held] = WeakKeyDictionary()
        self._residency: Residency[BlockWeights] | None = None
        self._device: torch.device | None = None
        self._outer: tuple[ExpertName, OuterWeights] | None = None
        self._adapters: dict[ExpertName, tuple[tuple[object, ...], Adapter | None]] = {}

    def __deepcopy__(self, memo: object) -> "Experts":
        """A copied module finds that these are another's, and makes its own."""
        return self

    @property
    def is_hosted(self) -> bool:
        """Whether the modules' own weights stay in host memory, wherever the pipeline computes."""
        return self.budget is not None or self._eight_bit is not None

    def check_fit(self, config: DiTConfig, device: torch.device) -> None:
        """Refuse a model or a GPU that cannot multiply as the precision asks.

        Raises:
            RequestError: no kernel multiplies the model's channels in 8 bits there.
        """
        if self._eight_bit is not None and device.type == "cuda":
            packed.refuse_unfit(config, self.precision, device)

    def owns(self, name: ExpertName, module: nn.Module) -> bool:
        """Whether an expert's weights are this module's."""
        return self._modules[name]() is module

    def open(self, name: ExpertName, device: torch.device, *, lora_scale: float = 1.0) -> Expert:
        """Give an expert's weights as its module has them now.

        Args:
            name: of the expert.
            device: where they are used.
            lora_scale: multiplies the strength of every LoRA.

        Raises:
            RequestError: the module is in a state that wanfast cannot compute, or on another device.
            CheckpointError: its tensors are not those of a Wan 2.2 transformer, or not finite.
        """
        held = self._current(name)
        if not self.is_hosted:
            _check_device(held, device)
            if held.ready is not None:
                return held.ready
            outer, blocks = held.outer, held.blocks.__iter__
        else:
            outer, blocks = self._stream(name, held, device)
        adapter = self._adapter(name, held, lora_scale, device)
        if adapter is None:
            return held.expert(outer, blocks)
        attached: Blocks = lambda: map(attach, blocks(), adapter.blocks)  # noqa: E731
        return held.expert(attach(outer, adapter.outer), attached)

    def release(self) -> None:
        """Let go what was brought to the device for a bound; the next forward brings it anew."""
        self._outer = None
        if self._residency is not None:
            self._residency.release()

    def _current(self, name: ExpertName) -> _Held:
        module = _module(self._modules, name)
        held = self._held.get(module)
        if held is None or not held.snapshot.is_current():
            self.release()
            self._adapters.pop(name, None)
            held = self._held.pop(module, None)
            held = None  # what it copied is free before the next copies are made
            held = self._held[module] = self._hold(name, module)
        return held

    def _hold(self, name: ExpertName, module: nn.Module) -> _Held:
        check_module(name, module)
        unmerge_disabled(module)
        if self.is_hosted:
            own_written_pages(module)
        tensors = official_tensors(module)
        config = config_of(module)
        reader = memory_reader(tensors, f"{name} transformer of the pipeline")
        check_names(reader, expected_tensors(config), part=f"{name} diffusion transformer")
        stored = tensors["blocks.0.self_attn.q.weight"].dtype
        dtype = _compute_dtype(self.precision, stored)
        is_kept = self._eight_bit is None and (self.budget is None or dtype == stored)
        indices = range(config.num_layers) if is_kept else ()
        outer = load_outer(reader, config, dtype)
        blocks = tuple(load_block(reader, config, index, dtype) for index in indices)
        taken = frozenset() if self.is_hosted else _addresses((outer, blocks))
        held = _Held(Snapshot(module, taken), reader, config, dtype, outer, blocks, self._eight_bit)
        is_settled = not self.is_hosted and not held.snapshot.has_adapters
        return replace(held, ready=held.expert(outer, blocks.__iter__)) if is_settled else held

    def _stream(self, name: ExpertName, held: _Held, device: torch.device) -> tuple[OuterWeights, Blocks]:
        if self._residency is None or self._device != device:
            self.check_fit(held.config, device)
            self.release()  # of the device before
            # No pinned copies in host memory: the weights are there already, with their owner.
            load = partial(_load, self._modules, self._held)  # not a method: it would keep `self` alive
            self._residency = Residency(load, held.config.num_layers, device, self.budget, ram=0)
            self._device = device
        if self._outer is None or self._outer[0] != name:
            self._outer = None
            self._outer = (name, to_device(held.outer, device))
        return self._outer[1], partial(self._residency.blocks, name)

    def _adapter(self, name: ExpertName, held: _Held, scale: float, device: torch.device) -> Adapter | None:
        """Give what active LoRAs add, read once for as long as module, scale and device stay the same."""
        if not held.snapshot.has_adapters:
            return None
        key = (scale, device)
        if name not in self._adapters or self._adapters[name][0] != key:
            loras = active_loras(_module(self._modules, name), name, scale)
            adapter = make_adapter(loras, name, held.config, held.dtype, device) if loras else None
            self._adapters[name] = (key, adapter)
        return self._adapters[name][1]


def _module(modules: _Modules, name: ExpertName) -> nn.Module:
    module = modules[name]()
    assert module is not None, "a module asks for its own weights"
    return module


def _load(modules: _Modules, held: Mapping[nn.Module, _Held], name: ExpertName, index: int) -> BlockWeights:
    return held[_module(modules, name)].block(index)


def _addresses(weights: object) -> frozenset[int]:
    found = set()

    def note(tensor: Tensor) -> Tensor:
        found.add(tensor.data_ptr())
        return tensor

    map_tensors(weights, note)
    return frozenset(found)


def config_of(module: Any) -> DiTConfig:
    """Read a transformer's sizes from its diffusers config.

    Raises:
        RequestError: it has a part that Wan 2.2 does not have.
    """
    config = module.config
    foreign = [name for name in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len") if config[name] is not None]
    if foreign:
        raise RequestError(
            f"transformer: must be of Wan 2.2, got one with {foreign[0]}, the image attention of Wan 2.1; "
            "wanfast does not have it"
        )
    if config["qk_norm"] != "rms_norm_across_heads":
        raise RequestError(f"transformer: its qk_norm must be rms_norm_across_heads, got {config['qk_norm']!r}")
    pf, ph, pw = config["patch_size"]
    return DiTConfig(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"] or config["in_channels"],
        dim=config["num_attention_heads"] * config["attention_head_dim"],
        ffn_dim=config["ffn_dim"],
        num_heads=config["num_attention_heads"],
        num_layers=config["num_layers"],
        text_dim=config["text_dim"],
        text_len=0,
        freq_dim=config["freq_dim"],
        patch_size=(pf, ph, pw),
        eps=config["eps"],
    )


def _compute_dtype(precision: str, stored: torch.dtype) -> torch.dtype:
    """Settle what blocks compute in; "exact" is 16 bits, of the weights' own kind where they have one.

    What is not 8-bit in an 8-bit precision is bf16, as in wanfast's own runs.
    """
    if precision == "fp32" or (precision == "auto" and stored == torch.float32):
        return torch.float32
    if precision in packed.DTYPES:
        return torch.bfloat16
    return torch.bfloat16 if stored == torch.float32 else stored


def _check_device(held: _Held, device: torch.device) -> None:
    place = held.outer.head.weight.device
    if place != device:
        raise RequestError(
            f"transformer: must be on the device of its inputs, {device}, got {place}; move it with"
            f" pipe.to({str(device)!r}), or leave it in host memory with wanfast.accelerate(pipe, vram=...)"
        )
