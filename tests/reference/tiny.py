"""wan-tiny as diffusers sees it: the same tensors in diffusers' modules, saved in the Diffusers layout."""

from pathlib import Path

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from reference.dit import diffusers_dit
from reference.text import umt5_encoder
from reference.vae import diffusers_vae
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

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
    transformer = diffusers_dit(model.config.dit)
    transformer.load_state_dict({dit_to_diffusers(name): reader.load(name).float() for name in reader.names()})
    return transformer


def _vae(model: Model) -> AutoencoderKLWan:
    config = model.config.vae
    vae = diffusers_vae(config)
    vae.load_state_dict({vae_to_diffusers(name, config.version): model.vae.load(name) for name in model.vae.names()})
    return vae


def _text_encoder(model: Model) -> UMT5EncoderModel:
    encoder = umt5_encoder(model.config.text)
    tensors = {text_to_transformers(name): model.text.load(name).float() for name in model.text.names()}
    encoder.load_state_dict(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]})
    return encoder
