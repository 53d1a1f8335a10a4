"""wan-tiny as diffusers sees it: the same tensors in diffusers' modules, saved in the Diffusers layout."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wanfast.checkpoint.names import dit_to_diffusers, text_to_transformers, vae_to_diffusers
from wanfast.checkpoint.reader import Reader
from wanfast.model import Model, open_model
from wanfast.tiny import write_tiny


def write_both_layouts(folder: Path) -> None:
    """Write `folder/official` and `folder/diffusers`, two folders of one model."""
    (folder / "official").mkdir()
    write_tiny(folder / "official")
    diffusers_pipeline(open_model(folder / "official")).save_pretrained(folder / "diffusers")


def diffusers_pipeline(model: Model) -> WanPipeline:
    """Build diffusers' text-to-video pipeline over the tensors of an open wanfast model, in fp32."""
    high, low = (_transformer(model, reader) for reader in model.experts.values())
    return WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=model.tokenizer.vocabulary, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=_text_encoder(model),
        vae=_vae(model),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=model.config.shift
        ),
        transformer=high,
        transformer_2=low,
        boundary_ratio=model.config.boundary,
    )


def _transformer(model: Model, reader: Reader) -> WanTransformer3DModel:
    config = model.config.dit
    transformer = WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        eps=config.eps,
    )
    transformer.load_state_dict({dit_to_diffusers(name): reader.load(name).float() for name in reader.names()})
    return transformer.eval()


def _vae(model: Model) -> AutoencoderKLWan:
    config = model.config.vae
    vae = AutoencoderKLWan(
        base_dim=config.encoder_dim,
        z_dim=config.z_dim,
        latents_mean=list(config.latents_mean),
        latents_std=list(config.latents_std),
    )
    tensors = {vae_to_diffusers(name, config.version): model.vae.load(name) for name in model.vae.names()}
    vae.load_state_dict(tensors)
    return vae.eval()


def _text_encoder(model: Model) -> UMT5EncoderModel:
    config = model.config.text
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.dim,
            d_kv=config.attention_dim // config.num_heads,
            d_ff=config.ffn_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            feed_forward_proj="gated-gelu",
        )
    )
    tensors = {text_to_transformers(name): model.text.load(name).float() for name in model.text.names()}
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    encoder.load_state_dict(tensors)
    return encoder.to(torch.float32).eval()
