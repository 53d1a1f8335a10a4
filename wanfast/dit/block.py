"""One DiT block: three steps, each added to the residual stream.

    hidden += gate_attn * self_attention(norm(hidden) * (1 + scale_attn) + shift_attn)
    hidden += cross_attention(norm3(hidden), text)
    hidden += gate_ffn * ffn(norm(hidden) * (1 + scale_ffn) + shift_ffn)

Norms, modulation, gates and the residual stream are fp32; projections and attention run in the dtype of the weights.
Source: Wan-Video/Wan2.2, wan/modules/model.py, WanAttentionBlock.forward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wanfast.dit.attention import attention
from wanfast.dit.weights import AttentionWeights, BlockWeights
from wanfast.kernels import gated_residual, layer_norm, layer_norm_modulate, rms_norm
from wanfast.linear import Linear, linear
from wanfast.rope import apply_rope

# The FFN's hidden layer is the block's largest tensor by far, so it exists for this many tokens at a time: few enough
# that it no longer sets the peak, enough to fill a large GPU.
FFN_CHUNK_TOKENS = 2048


def dit_block(
    hidden: Tensor,
    block: BlockWeights,
    modulation: Tensor,
    text: Tensor,
    rotations: Tensor,
    *,
    num_heads: int,
    eps: float,
    first_tokens: int = 0,
) -> Tensor:
    """Run one block.

    Args:
        hidden: [B, T, C], the residual stream: fp32, or before the first block the weights' dtype. Not written to.
        block: its weights, on hidden's device.
        modulation: [B, R, 6, C] fp32: shift, scale and gate of self-attention, then of the FFN. R is 1, or 2 where the
            first tokens have a timestep of their own.
        text: [B, S, C], embedded text; every row is attended to.
        rotations: [T, D / 2] complex64, from `rope_rotations`.
        num_heads: attention heads N; C = N * D.
        eps: added to the variance in every norm.
        first_tokens: tokens [0, first_tokens) take modulation row 0, the others the last row.

    Returns:
        [B, T, C] fp32.
    """
    shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = modulation.unbind(2)
    dtype = block.self_attn.q.weight.dtype

    x = _modulated_norm(hidden, scale_attn, shift_attn, dtype, eps=eps, first_tokens=first_tokens)
    x = _self_attention(x, block.self_attn, rotations, num_heads=num_heads, eps=eps)
    hidden = gated_residual(hidden.float(), x, gate_attn, first_tokens=first_tokens)

    x = layer_norm(hidden, block.norm3_weight, block.norm3_bias, eps=eps, out_dtype=dtype)
    hidden = hidden + _cross_attention(x, text, block.cross_attn, num_heads=num_heads, eps=eps)

    x = layer_norm_modulate(hidden, scale_ffn, shift_ffn, eps=eps, first_tokens=first_tokens, out_dtype=dtype)
    return gated_residual(hidden, _ffn(x, block), gate_ffn, first_tokens=first_tokens)


def _modulated_norm(
    hidden: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, *, eps: float, first_tokens: int
) -> Tensor:
    """Norm and modulate into `dtype`; a 16-bit stream, which only the first block sees, is rounded between the two."""
    if hidden.dtype == torch.float32:
        return layer_norm_modulate(hidden, scale, shift, eps=eps, first_tokens=first_tokens, out_dtype=dtype)
    normed = F.layer_norm(hidden, hidden.shape[-1:], eps=eps)
    first, rest = normed[:, :first_tokens], normed[:, first_tokens:]
    modulated = [first * (1 + scale[:, :1]) + shift[:, :1], rest * (1 + scale[:, -1:]) + shift[:, -1:]]
    return torch.cat(modulated, dim=1).to(dtype)


def _self_attention(x: Tensor, weights: AttentionWeights, rotations: Tensor, *, num_heads: int, eps: float) -> Tensor:
    q = apply_rope(_heads(x, weights.q, weights.norm_q, num_heads, eps), rotations).to(x.dtype)
    k = apply_rope(_heads(x, weights.k, weights.norm_k, num_heads, eps), rotations).to(x.dtype)
    v = _split_heads(linear(x, weights.v), num_heads)
    return linear(attention(q, k, v), weights.o)


def _cross_attention(x: Tensor, text: Tensor, weights: AttentionWeights, *, num_heads: int, eps: float) -> Tensor:
    q = _heads(x, weights.q, weights.norm_q, num_heads, eps).to(x.dtype)
    k = _heads(text, weights.k, weights.norm_k, num_heads, eps).to(x.dtype)
    v = _split_heads(linear(text, weights.v), num_heads)
    return linear(attention(q, k, v), weights.o)


def _heads(x: Tensor, projection: Linear, norm: Tensor, num_heads: int, eps: float) -> Tensor:
    """Project to queries or keys, normalise over all heads together, then split them: [B, T, N, D], fp32."""
    return _split_heads(rms_norm(linear(x, projection), norm, eps=eps), num_heads)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.view(*x.shape[:-1], num_heads, -1)


def _ffn(x: Tensor, block: BlockWeights) -> Tensor:
    chunks = [
        linear(F.gelu(linear(chunk, block.ffn_up), approximate="tanh"), block.ffn_down)
        for chunk in torch.split(x, FFN_CHUNK_TOKENS, dim=1)
    ]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)
