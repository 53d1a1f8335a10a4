"""A model ready to compute: open files, the device and precision, and which weights are there at the moment."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from wanfast.adapter import Adapter, attach, make_adapter
from wanfast.checkpoint.unchanged import file_states, refuse_written
from wanfast.config import ExpertName, ModelConfig
from wanfast.dit import packed
from wanfast.dit import weights as dit_weights
from wanfast.lora import Lora
from wanfast.model import Model
from wanfast.out_of_memory import OutOfMemory, attempt
from wanfast.plan import Precision, Wish
from wanfast.residency import Residency, Traffic, to_device
from wanfast.text import weights as text_weights
from wanfast.vae.weights import VAEWeights, compute_dtype, load_vae
from wanfast.weight_sizes import dtype_of, largest_block


class LoadedModel:
    """A model's weights on one device, in one precision; each is read when it is first used."""

    def __init__(
        self,
        model: Model,
        *,
        precision: Precision,
        device: torch.device,
        vram: int | None = None,
        ram: int | None = None,
        wish: Wish | None = None,
    ) -> None:
        """Read nothing yet.

        Args:
            model: from `open_model`.
            precision: "fp32" everywhere; "exact" = bf16 where the reference computes in bf16; "fp8" or "int8" = that,
                with the DiT's blocks multiplying in 8 bits.
            device: where everything is computed.
            vram: bytes of the device that an expert's blocks may keep; None is what is free, less room for activations.
            ram: bytes of host memory that blocks may take; None is what is free, less a reserve.
            wish: of each generation anew, where it may be another precision than the one of the last; None is
                `precision`, whatever it needs.
        """
        self.model = model
        self.wish = wish or Wish(precision)
        self.device = device
        self.vram, self.ram = vram, ram
        self._files = file_states(model.readers)
        self._prepare(precision)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided by names and places of files, and by what they hold, for the user to see."""
        why = self.wish.reason
        return (*self.model.notes, *(() if why is None else (f"precision {self.wish.precision}: {why}",)))

    def _prepare(self, precision: Precision) -> None:
        """Settle all that a precision decides; nothing is in memory then."""
        model, device = self.model, self.device
        self.precision: Precision = precision
        self.compute_dtype = dtype_of(precision)
        self._vae_dtype = compute_dtype(precision, device)
        self._eight_bit = packed.DTYPES.get(precision)
        if self._eight_bit is not None and device.type == "cuda":
            packed.refuse_unfit(model.config.dit, precision, device)
        self._largest = max(
            largest_block(reader, self.compute_dtype, in_8_bits=self._eight_bit is not None)
            for reader in model.experts.values()
        )
        layers = model.config.dit.num_layers
        self._residency = Residency(self._read_block, layers, device, self.vram, slot_bytes=self._largest, ram=self.ram)
        self._outers: dict[ExpertName, dit_weights.OuterWeights] = {}
        self._adapter: tuple[ExpertName, tuple[Lora, ...], Adapter] | None = None
        self._decoder: VAEWeights | None = None

    def compute_in(self, precision: Precision) -> None:
        """Compute in a precision from here on; another one than so far lets every weight go, the same changes nothing.

        Raises:
            RequestError: this model or this device has no arithmetic for it.
        """
        if precision != self.precision:
            self.release()
            self._prepare(precision)

    @property
    def config(self) -> ModelConfig:
        """The model's row of the table, with its own sizes."""
        return self.model.config

    @property
    def block_bytes(self) -> int:
        """What one of the experts' blocks takes on the device, at most."""
        return self._largest

    @property
    def traffic(self) -> Traffic:
        """What of the experts' blocks was copied to the device so far, and waited for."""
        return self._residency.traffic

    def expert(
        self, name: ExpertName, loras: tuple[Lora, ...] = (), *, is_exact: bool = False
    ) -> tuple[dit_weights.OuterWeights, Iterator[dit_weights.BlockWeights | packed.PackedBlock]]:
        """Give an expert's weights outside the blocks, and its blocks one by one, each until the next is asked for.

        LoRAs are attached to what is given, not to what is kept: with others, or none, nothing is read anew. Blocks
        that multiply in 8 bits are packed, unless `is_exact` asks for the arithmetic of "exact" with the same weights.
        """
        if name not in self._outers:
            self._outers = {}  # the other expert's make room
            self._outers = {name: self._read_outer(name)}
        outer, blocks = self._outers[name], self._residency.blocks(name)
        adapter = self._adapter_for(name, loras)
        if adapter is not None:
            outer, blocks = attach(outer, adapter.outer), map(attach, blocks, adapter.blocks)
        if self._eight_bit is None or is_exact:
            return outer, blocks
        return outer, map(partial(packed.pack_block, dtype=self._eight_bit), blocks)

    def refuse_written(self) -> None:
        """Refuse the model's files if they were written to since: what was computed from them means nothing.

        Raises:
            CheckpointError: one was; the message names it.
        """
        refuse_written(self._files)

    @contextmanager
    def passes(self, experts: Sequence[ExpertName]) -> Iterator[None]:
        """Announce the experts of the passes made inside, in order, so that their weights move ahead of their use."""
        if self.device.type == "cuda":  # a swap that hides the blocks would wait for what stands around them
            outers = attempt(partial(self._around, experts))
            self._outers = {} if isinstance(outers, OutOfMemory) else outers  # then each is read in its turn
        self._residency.begin(experts)
        try:
            yield
        finally:
            self._residency.end()

    @contextmanager
    def reading_ahead(self, experts: Sequence[ExpertName]) -> Iterator[None]:
        """Bring blocks of the passes that follow into host memory inside, where the device's is needed otherwise."""
        self._residency.read_ahead(experts)
        try:
            yield
        finally:
            self._residency.end()

    def _around(self, experts: Sequence[ExpertName]) -> dict[ExpertName, dit_weights.OuterWeights]:
        return {name: self._outers.get(name) or self._read_outer(name) for name in dict.fromkeys(experts)}

    def allow_blocks(self, budget: int) -> None:
        """Bound the bytes of the device that blocks may keep; activations have the rest."""
        self._residency.allow(budget)

    def allow_host(self, ram: int) -> None:
        """Bound the bytes of host memory that blocks may take, beside slots."""
        self._residency.allow_host(ram)

    @property
    def host_bytes(self) -> int:
        """Host memory that blocks take at the moment."""
        return self._residency.host_bytes

    def make_room(self) -> bool:
        """Let go from the device what a step can do without: the VAE, and half of the blocks.

        Returns:
            Whether there was anything to let go. Then the passes that are left are to be announced anew.
        """
        had_decoder, self._decoder = self._decoder is not None, None
        has_room = self._residency.shrink() or had_decoder
        if has_room and self.device.type == "cuda":
            torch.cuda.empty_cache()
        return has_room

    def announce(self, experts: Sequence[ExpertName]) -> None:
        """Say anew which passes are left; inside `passes` only."""
        self._residency.begin(experts)

    def text_encoder(self) -> tuple[text_weights.TextOuterWeights, Iterator[text_weights.TextBlockWeights]]:
        """Give the text encoder's weights outside the blocks, and its blocks, none of which is kept.

        At full size the encoder has 11 GB and is used once per video: it is streamed, of its token table only the rows
        are read that are looked up.
        """
        outer = text_weights.load_outer(self.model.text, self.config.text, self.compute_dtype)
        return replace(outer, norm=outer.norm.to(self.device)), self._text_blocks()

    def _text_blocks(self) -> Iterator[text_weights.TextBlockWeights]:
        layers = self.config.text.num_layers
        if self.device.type == "cpu":  # each is used once, where it was loaded: a copy would only cost
            yield from (self._read_text_block("text", index) for index in range(layers))
            return
        size = largest_block(self.model.text, self.compute_dtype)
        residency = Residency(self._read_text_block, layers, self.device, 0, slot_bytes=size, ram=0)
        try:
            yield from residency.blocks("text")
        finally:
            residency.release()

    def vae_encoder(self) -> VAEWeights:
        """Give the VAE's encoder; used once per video and not kept."""
        return load_vae(self.model.vae, self.config.vae, self._vae_dtype, device=self.device, decoder=False)

    def vae_decoder(self) -> VAEWeights:
        """Give the VAE's decoder."""
        if self._decoder is None:
            self._decoder = load_vae(
                self.model.vae, self.config.vae, self._vae_dtype, device=self.device, encoder=False
            )
        return self._decoder

    def widen_vae(self) -> bool:
        """Let the VAE compute in fp32 from here on; say whether it did not before."""
        was_narrow, self._vae_dtype = self._vae_dtype != torch.float32, torch.float32
        if was_narrow:
            self._decoder = None
        return was_narrow

    def release_experts(self) -> bool:
        """Let the diffusion transformers' weights go from the device; say whether there were any."""
        had_adapter = self._adapter is not None
        self._outers, self._adapter = {}, None
        return self._residency.clear_device() or had_adapter

    def release_device(self) -> bool:
        """Let every weight go from the device; what a GPU copies from stays on the host. Say whether there were any."""
        if self.device.type != "cuda":
            return self.release()
        had_decoder, self._decoder = self._decoder is not None, None
        return self.release_experts() or had_decoder

    def release(self) -> bool:
        """Let every weight go, the next use reads them again; say whether there were any."""
        had_decoder, self._decoder = self._decoder is not None, None
        had_experts = self.release_experts()
        return self._residency.release() or had_experts or had_decoder

    def _adapter_for(self, name: ExpertName, loras: tuple[Lora, ...]) -> Adapter | None:
        """Give what the LoRAs add to an expert, read once for as long as both stay the same."""
        loras = tuple(lora for lora in loras if name in lora.experts)
        if not loras:
            self._adapter = None
        elif self._adapter is None or self._adapter[:2] != (name, loras):
            self._adapter = None  # the old one's memory is free for the new one
            self._adapter = (name, loras, make_adapter(loras, name, self.config.dit, self.compute_dtype, self.device))
        return None if self._adapter is None else self._adapter[2]

    def _read_outer(self, expert: ExpertName) -> dit_weights.OuterWeights:
        outer = dit_weights.load_outer(self.model.experts[expert], self.config.dit, self.compute_dtype)
        return to_device(outer, self.device)

    def _read_block(self, expert: ExpertName, index: int) -> dit_weights.BlockWeights:
        block = dit_weights.load_block(self.model.experts[expert], self.config.dit, index, self.compute_dtype)
        return block if self._eight_bit is None else packed.prepare_block(block, self._eight_bit)

    def _read_text_block(self, _: str, index: int) -> text_weights.TextBlockWeights:
        return text_weights.load_block(self.model.text, self.config.text, index, self.compute_dtype)
