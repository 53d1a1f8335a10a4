"""Weights and tokenizers made on the spot, for benchmarks and tests that need no picture."""

import zlib
from collections.abc import Mapping

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

# fmt: off
_WORDS = (
    "a", "an", "the", "of", "on", "in", "and", "to", "with", "moves", "moving", "rolls", "slides", "left",
    "right", "up", "down", "slowly", "fast", "red", "green", "blue", "yellow", "white", "black", "circle",
    "square", "triangle", "ball", "box", "star", "background", "cat", "dog", "bird", "tree", "sky", "sea",
    "street", "night", "day", "light", "video", "camera",
)
# fmt: on


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: str) -> dict[str, Tensor]:
    """Draw tensors of healthy size: every layer keeps the scale of its input.

    Args:
        shapes: shape by official name.
        seed: another string gives other tensors.

    Returns:
        fp32 by name: norm weights near 1, biases and modulation small, matrices of unit gain; order does not matter.
    """
    tensors = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        values = torch.randn(shape, generator=generator)
        if name.endswith("gamma") or ("norm" in name and name.endswith(".weight")):
            tensors[name] = 1 + 0.1 * values
        elif name.endswith((".bias", "modulation")):
            tensors[name] = 0.1 * values
        else:
            tensors[name] = values / (values.numel() / shape[0]) ** 0.5
    return tensors


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """Build a small SentencePiece-like tokenizer: common words as pieces, everything else as bytes.

    Args:
        vocab_size: pieces at most; special tokens stand where T5 has them (pad 0, end 1, unknown 3).
    """
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("<unk>", 0.0)]
    scored += [(f"<0x{byte:02X}>", -8.0) for byte in range(256)]
    scored += [(f"▁{word}", -2.0) for word in _WORDS] + [("▁", -3.0)]
    scored += [(chr(letter), -4.0) for letter in range(ord("!"), ord("~") + 1)]
    tokenizer = Tokenizer(models.Unigram(scored[:vocab_size], unk_id=3, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer
