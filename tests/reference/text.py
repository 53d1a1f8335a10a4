"""Small text encoders and tokenizers of transformers, with random weights under Wan's official names."""

import re
import zlib
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from wanfast.config import TextConfig

SMALL = TextConfig(
    vocab_size=99,
    dim=48,
    attention_dim=60,
    ffn_dim=84,
    num_heads=5,
    num_layers=3,
    num_buckets=32,
    max_distance=128,
    eps=1e-6,
)

_OFFICIAL = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}


def umt5_encoder(config: TextConfig, *, seed: int = 0, attention: str = "eager") -> UMT5EncoderModel:
    """Build transformers' encoder in fp32, with weights drawn so that attention is far from uniform."""
    model = UMT5EncoderModel._from_config(
        UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.dim,
            d_kv=config.attention_dim // config.num_heads,
            d_ff=config.ffn_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=config.max_distance,
            layer_norm_epsilon=config.eps,
            feed_forward_proj="gated-gelu",
        ),
        attn_implementation=attention,
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if name.endswith("layer_norm.weight"):
            parameter.data = 1 + 0.2 * drawn
        elif "relative_attention_bias" in name or "shared" in name:
            parameter.data = drawn
        elif name.endswith(("q.weight", "k.weight")):  # logits are not scaled: keep their spread near 2
            parameter.data = (
                drawn * (2 / parameter.shape[1]) ** 0.5 / (config.attention_dim // config.num_heads) ** 0.25
            )
        else:
            parameter.data = drawn / parameter.shape[1] ** 0.5
    return model.eval().requires_grad_(False)


def official_name(name: str) -> str:
    """Translate a parameter name of transformers into Wan's, from the table of correspondences alone."""
    if name in ("shared.weight", "encoder.embed_tokens.weight"):
        return "token_embedding.weight"
    if name == "encoder.final_layer_norm.weight":
        return "norm.weight"
    match = re.fullmatch(r"encoder\.block\.(\d+)\.(.+)\.weight", name)
    assert match is not None, name
    return f"blocks.{match[1]}.{_OFFICIAL[match[2]]}.weight"


def official_state(model: UMT5EncoderModel) -> dict[str, Tensor]:
    """Give a model's tensors under their official names."""
    return {official_name(name): tensor for name, tensor in model.state_dict().items()}


def golden_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Draw a parameter from its own name, as the golden values were made."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if "norm" in name and name.endswith(".weight"):
        return 1 + 0.1 * drawn
    return drawn / (drawn.numel() / shape[0]) ** 0.5


SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]
WORDS = [
    "▁",
    "▁a",
    "▁cat",
    "▁red",
    "▁ball",
    "▁roll",
    "▁the",
    "▁left",
    "▁猫",
    "ing",
    "ll",
    "ba",
    *"sabcdeltroingf,.猫在跑é<>&/",
]
PIECES = SPECIAL + list(dict.fromkeys(WORDS))


def write_tokenizer(folder: Path, pieces: list[str] = PIECES, *, settings_of_a_past_use: bool = False) -> Path:
    """Write a small unigram `tokenizer.json` shaped like umT5's: Metaspace, `</s>` by template, else `<unk>`."""
    scores = [(piece, 0.0 if piece in SPECIAL else -1.0 / len(piece)) for piece in pieces]
    tokenizer = tokenizers.Tokenizer(models.Unigram(scores, unk_id=pieces.index("<unk>"), byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens([tokenizers.AddedToken(piece, special=True) for piece in SPECIAL if piece in pieces])
    if "</s>" in pieces:
        end = pieces.index("</s>")
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    if settings_of_a_past_use:
        tokenizer.enable_truncation(3)
        tokenizer.enable_padding(length=7)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
