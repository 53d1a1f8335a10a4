"""A model ready to compute: open files, the device and precision, and which weights are there at the moment."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from wanfast.adapter import Adapter, attach, make_adapter
from wanfast.config import ExpertName, ModelConfig
from wanfast.dit import weights as dit_weights
from wanfast.lora import Lora
from wanfast.model import Model
from wanfast.plan import Precision
from wanfast.residency import Residency, to_device
from wanfast.text import weights as text_weights
from wanfast.vae.weights import VAEWeights, load_vae


class LoadedModel:
    """A model's weights on one device, in one precision; each is read when it is first used."""

    def __init__(self, model: Model, *, precision: Precision, device: torch.device, vram: int | None = None) -> None:
        """Read nothing yet.

        Args:
            model: from `open_model`.
            precision: "fp32" everywhere, or "exact" = bf16 where the reference computes in bf16.
            device: where everything is computed.
            vram: bytes of the device that an expert's blocks may keep; None is what is free, less room for activations.
        """
        self.model = model
        self.precision: Precision = precision
        self.device = device
        self.compute_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self._residency = Residency(self._read_block, model.config.dit.num_layers, device, vram)
        self._outer: tuple[ExpertName, dit_weights.OuterWeights] | None = None
        self._adapter: tuple[tuple[Lora, ...], Adapter] | None = None  # of the expert that is there
        self._decoder: VAEWeights | None = None

    @property
    def config(self) -> ModelConfig:
        """The model's row of the table, with its own sizes."""
        return self.model.config

    def expert(
        self, name: ExpertName, loras: tuple[Lora, ...] = ()
    ) -> tuple[dit_weights.OuterWeights, Iterator[dit_weights.BlockWeights]]:
        """Give an expert's weights outside the blocks, and its blocks one by one; the one before it is let go.

        LoRAs are attached to what is given, not to what is kept: with others, or none, nothing is read anew.
        """
        if self._outer is None or self._outer[0] != name:
            self.release_experts()
            outer = dit_weights.load_outer(self.model.experts[name], self.config.dit, self.compute_dtype)
            self._outer = (name, to_device(outer, self.device))
        outer, blocks = self._outer[1], self._residency.blocks(name)
        adapter = self._adapter_for(name, loras)
        if adapter is None:
            return outer, blocks
        return attach(outer, adapter.outer), map(attach, blocks, adapter.blocks)

    def text_encoder(self) -> tuple[text_weights.TextOuterWeights, Iterator[text_weights.TextBlockWeights]]:
        """Give the text encoder's weights outside the blocks, and its blocks, none of which is kept.

        At full size the encoder has 11 GB and is used once per video: it is streamed, its token table stays on disk.
        """
        outer = text_weights.load_outer(self.model.text, self.config.text, self.compute_dtype)
        indices = range(self.config.text.num_layers)
        blocks = (text_weights.load_block(self.model.text, self.config.text, i, self.compute_dtype) for i in indices)
        return replace(outer, norm=outer.norm.to(self.device)), (to_device(block, self.device) for block in blocks)

    def vae_encoder(self) -> VAEWeights:
        """Give the VAE's encoder, fp32 in every precision as in the reference; used once per video and not kept."""
        return load_vae(self.model.vae, self.config.vae, device=self.device, decoder=False)

    def vae_decoder(self) -> VAEWeights:
        """Give the VAE's decoder, fp32 in every precision, as in the reference."""
        if self._decoder is None:
            self._decoder = load_vae(self.model.vae, self.config.vae, device=self.device, encoder=False)
        return self._decoder

    def release_experts(self) -> None:
        """Let the diffusion transformers' weights go."""
        self._outer = self._adapter = None
        self._residency.release()

    def release(self) -> None:
        """Let every weight go; the next use reads them again."""
        self.release_experts()
        self._decoder = None

    def _adapter_for(self, name: ExpertName, loras: tuple[Lora, ...]) -> Adapter | None:
        """Give what the LoRAs add to an expert, read once for as long as both stay the same."""
        loras = tuple(lora for lora in loras if name in lora.experts)
        if not loras:
            self._adapter = None
        elif self._adapter is None or self._adapter[0] != loras:
            self._adapter = None  # the old one's memory is free for the new one
            self._adapter = (loras, make_adapter(loras, name, self.config.dit, self.compute_dtype, self.device))
        return None if self._adapter is None else self._adapter[1]

    def _read_block(self, expert: ExpertName, index: int) -> dit_weights.BlockWeights:
        return dit_weights.load_block(self.model.experts[expert], self.config.dit, index, self.compute_dtype)
