"""What encoding the prompts holds beside the weights, counted from the tensors that `umt5.py` makes."""

from wanfast.config import TextConfig
from wanfast.text.umt5 import MAX_LOGITS

_FP32 = 4


def text_activations(config: TextConfig, *, num_tokens: int, num_prompts: int, itemsize: int) -> int:
    """Count what `encode_texts` holds at its peak, in bytes.

    Args:
        config: sizes of the encoder.
        num_tokens: of the longest prompt.
        num_prompts: encoded together.
        itemsize: bytes of a number in the dtype of the weights, 2 or 4.
    """
    dim, attention, tokens = config.dim, config.attention_dim, num_tokens
    streams = (2 * num_prompts - 1) * tokens * dim * itemsize  # at the last prompt: all before the block, others after
    # encoder_block, at the FFN: the stream with attention, its norm, and two of the wide layer.
    feed_forward = tokens * 2 * (dim + config.ffn_dim) * itemsize
    # attention: the norm, queries, those turned, keys and values; of some heads logits and softmax, in fp32.
    some_heads = min(max(1, MAX_LOGITS // tokens**2), config.num_heads)
    logit_bytes = 2 * _FP32 + (itemsize if itemsize < _FP32 else 0)
    self_attention = tokens * (dim + 4 * attention) * itemsize + some_heads * tokens**2 * logit_bytes
    # At its end: the norm, queries, keys and values, what they gave, that turned back, and with its heads joined.
    joining = tokens * (dim + 6 * attention) * itemsize
    return streams + max(feed_forward, self_attention, joining) + config.num_heads * 2 * tokens * itemsize
