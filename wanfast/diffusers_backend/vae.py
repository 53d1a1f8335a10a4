"""`WanFastAutoencoder`: diffusers' Wan VAE with wanfast's encoder and decoder.

Its weights stay diffusers' own. wanfast lays half of them out for its convolutions, while that half is used.
"""

from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from wanfast.checkpoint.names import vae_from_diffusers, vae_version
from wanfast.checkpoint.reader import Reader, memory_reader
from wanfast.config import VAEConfig
from wanfast.diffusers_backend.checks import REFUSED, NotCompiled, check_module, refuse_gradient, refused
from wanfast.diffusers_backend.experts import Experts
from wanfast.vae.conv import prepare
from wanfast.vae.decode import decode
from wanfast.vae.encode import encode
from wanfast.vae.weights import CausalConv, VAEWeights, load_vae, vae_config

_Base: Any = AutoencoderKLWan  # diffusers' annotations stop half-way


class WanFastAutoencoder(_Base):  # type: ignore[misc]
    """A pipeline's AutoencoderKLWan, computed by wanfast.

    While tiling is on, diffusers' own code runs, tile by tile: its tiles overlap and blend, so they are part of the
    result.
    """

    _wanfast: Experts | None = None  # the pipeline's transformers
    _torchdynamo_orig_callable = NotCompiled()

    # `torch.compile(pipe.vae.decode)` runs it as it is: tracing it would take minutes.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _decode(self, z: Tensor, return_dict: bool = True) -> Any:
        refuse_gradient("z", z)
        if self._wanfast is not None and z.device.type != "cpu":
            self._wanfast.release()  # the activations need the room
        if self.use_tiling:
            return super()._decode(z, return_dict=return_dict)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            frames = torch.cat(list(decode(decoder_of(self, z.device), z)), dim=2).to(z.dtype)
        return DecoderOutput(sample=frames) if return_dict else (frames,)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _encode(self, x: Tensor) -> Any:
        refuse_gradient("x", x)
        if self.use_tiling:
            return super()._encode(x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return encode(encoder_of(self, x.device), x).to(x.dtype)


def decoder_of(module: Any, device: torch.device) -> VAEWeights:
    """Lay out the decoder of an AutoencoderKLWan, for latents that are not normalised."""
    reader, config = _open(module)
    return load_vae(reader, config, module.dtype, device=device, encoder=False)


def encoder_of(module: Any, device: torch.device) -> VAEWeights:
    """Lay out the encoder, to give all moments: the latents' mean, then their log variance, not normalised."""
    reader, config = _open(module)
    vae = load_vae(reader, config, module.dtype, device=device, decoder=False)
    assert vae.encoder is not None
    weight, bias = (
        tensor.data.to(device, module.dtype) for tensor in (module.quant_conv.weight, module.quant_conv.bias)
    )
    return replace(vae, encoder=replace(vae.encoder, to_mean=CausalConv(prepare(weight), bias)))


def _open(module: Any) -> tuple[Reader, VAEConfig]:
    check_module("vae", module)
    tensors = {name: parameter.data for name, parameter in module.named_parameters(remove_duplicate=False)}
    version = vae_version(tensors)
    official = {new: tensors[name] for name, new in vae_from_diffusers(tensors, version).items()}
    reader = memory_reader(official, "VAE of the pipeline")
    z_dim = module.config.z_dim
    config = vae_config(reader, [0.0] * z_dim, [1.0] * z_dim)
    return reader, replace(config, latents_mean=(0.0,), latents_std=(1.0,))


for _name in REFUSED:
    setattr(WanFastAutoencoder, _name, refused(_name))
WanFastAutoencoder.__name__ = AutoencoderKLWan.__name__  # as of WanFastTransformer3DModel
WanFastAutoencoder.__module__ = AutoencoderKLWan.__module__
