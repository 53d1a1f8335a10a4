"""The umT5 encoder: token ids in, one vector per token out.

Numerics are the reference's: the residual stream and every step of it are rounded to the weights' dtype, norms and
softmax sum in fp32. Only a prompt's true tokens are computed. The reference pads to 512, hides padding from the
attention and drops its rows; a hidden key gets a weight of exactly 0 (its logit is the dtype's minimum, so its
exponential underflows), so the rows that are kept are the same sums with zeros left out.

Source: Wan-Video/Wan2.2, wan/modules/t5.py.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from wanfast.config import TextConfig
from wanfast.errors import RequestError
from wanfast.linear import linear
from wanfast.text.weights import TextBlockWeights, TextOuterWeights, embed_tokens

MAX_LOGITS = 2**19  # at once; those of all heads would be the largest tensor of the encoder


def relative_buckets(length: int, config: TextConfig) -> Tensor:
    """Number the bucket of every offset between two tokens: by direction, exact when near, coarser the further apart.

    Returns:
        [2 T - 1] int64 in [0, num_buckets), for key minus query = -(T - 1) ... T - 1.

    Source: Wan-Video/Wan2.2, wan/modules/t5.py, T5RelativeEmbedding; Raffel et al. 2020, arXiv:1910.10683, section 2.1.
    """
    per_direction = config.num_buckets // 2
    exact = per_direction // 2
    distance = torch.arange(length)
    # In fp32 and in the reference's order, so that a distance on the edge of a bucket falls on the same side.
    octave = torch.log(distance.clamp(min=exact).float() / exact) / math.log(config.max_distance / exact)
    far = (exact + (octave * (per_direction - exact)).long()).clamp(max=per_direction - 1)
    by_distance = torch.where(distance < exact, distance, far)
    return torch.cat([by_distance.flip(0), by_distance[1:] + per_direction])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each token by its root mean square in fp32, round to the weight's dtype, then multiply by the weight.

    Args:
        x: [T, C].
        weight: [C].
        eps: added to the mean square.

    Returns:
        [T, C] in the weight's dtype.
    """
    mean_square = x.float().square().mean(-1, keepdim=True)
    return (x * torch.rsqrt(mean_square + eps)).to(weight.dtype) * weight


def gelu(x: Tensor) -> Tensor:
    """Apply GELU by its tanh formula, each step rounded to x's dtype as in the reference; x is not written to."""
    inner = x.pow(3.0).mul_(0.044715).add_(x).mul_(math.sqrt(2.0 / math.pi))
    return inner.tanh_().add_(1.0).mul_(x).mul_(0.5)  # halving is exact, so its place is free


def attention(x: Tensor, block: TextBlockWeights, buckets: Tensor, num_heads: int) -> Tensor:
    """Let every token attend to all; logits are not scaled, the bias is the block's own.

    Args:
        x: [T, C], normalised.
        block: weights on x's device.
        buckets: [2 T - 1] of `relative_buckets`, on x's device.
        num_heads: divides attention_dim.

    Returns:
        [T, C].
    """
    q, k, v = (linear(x, layer).view(len(x), num_heads, -1).transpose(0, 1) for layer in (block.q, block.k, block.v))
    # Last query first: then the bias of query row r and key c depends on r + c alone, and its [N, T, T] is a view.
    q, bias = q.flip(1), block.position_table.t()[:, buckets].unfold(-1, len(x), 1)
    step = max(1, MAX_LOGITS // len(x) ** 2)
    some = [slice(head, head + step) for head in range(0, num_heads, step)]
    mixed = torch.cat([_attend(q[heads], k[heads], v[heads], bias[heads]) for heads in some])
    return linear(mixed.flip(1).transpose(0, 1).flatten(1), block.o)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention of some heads: q, k, v [N, T, D], bias [N, T, T]; gives [N, T, D]."""
    logits = (q @ k.transpose(1, 2)).add_(bias)
    return torch.softmax(logits, dim=-1, dtype=torch.float32).to(v.dtype) @ v


def encoder_block(x: Tensor, block: TextBlockWeights, buckets: Tensor, config: TextConfig) -> Tensor:
    """Run one block: attention and gated feed-forward, each on the normalised stream x [T, C] and added to it."""
    x = x + attention(rms_norm(x, block.attention_norm, config.eps), block, buckets, config.num_heads)
    y = rms_norm(x, block.ffn_norm, config.eps)
    return x + linear(gelu(linear(y, block.gate)).mul_(linear(y, block.up)), block.down)


def encode_texts(
    prompts: Sequence[Sequence[int]], outer: TextOuterWeights, blocks: Iterable[TextBlockWeights], config: TextConfig
) -> list[Tensor]:
    """Encode prompts in one pass over the blocks, each by itself: a result does not depend on what it was encoded with.

    Args:
        prompts: ids of the true tokens of each, `</s>` included, no padding.
        outer: its norm gives the dtype (fp32 or bf16) and the device to compute in.
        blocks: `config.num_layers` of that dtype and device, in order; each is used before the next is asked for.
        config: sizes of the weights.

    Returns:
        For each prompt [T, C] in the norm's dtype, on its device.

    Raises:
        RequestError: a prompt has no ids, or one outside the vocabulary.
        CheckpointError: the row of a token is not finite.

    Source: Wan-Video/Wan2.2, wan/modules/t5.py, T5Encoder.
    """
    for ids in prompts:
        if not ids or min(ids) < 0 or max(ids) >= config.vocab_size:
            raise RequestError(
                f"ids: must be at least one number in [0, {config.vocab_size}), got {sorted(ids)[-1:] or 'none'};"
                " use the tokenizer that belongs to this text encoder"
            )
    hidden = [embed_tokens(torch.tensor(ids), outer) for ids in prompts]
    buckets = {len(ids): relative_buckets(len(ids), config).to(outer.norm.device) for ids in prompts}
    for _, block in zip(range(config.num_layers), blocks, strict=True):
        hidden = [encoder_block(x, block, buckets[len(x)], config) for x in hidden]
    return [rms_norm(x, outer.norm, config.eps) for x in hidden]


def encode_text(
    ids: Sequence[int], outer: TextOuterWeights, blocks: Iterable[TextBlockWeights], config: TextConfig
) -> Tensor:
    """Encode one prompt [T] to [T, C], as `encode_texts` does."""
    return encode_texts([ids], outer, blocks, config)[0]
