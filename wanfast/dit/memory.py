"""What a forward of the DiT holds beside its weights, counted from the tensors that `block.py` and `model.py` make.

Where a kernel's torch reference widens to fp32 and the GPU's kernel does not, the reference is counted.
"""

import math

import torch

from wanfast.config import DiTConfig
from wanfast.dit.chunking import KEPT_TEXT_BYTES
from wanfast.dit.packed import multiplies_e4m3

_FP32, _COMPLEX64 = 4, 8
_BLOCK_KEYS = 64  # that have four scales, and that the reference of 8-bit attention takes at a time


def dit_activations(
    config: DiTConfig,
    *,
    num_tokens: int,
    num_contexts: int,
    itemsize: int,
    chunk_tokens: int,
    is_expanded: bool = False,
    timestep_rows: int = 1,
) -> dict[str, int]:
    """Count what `predict_velocities` holds at its peak, for one sample.

    Args:
        config: sizes of the DiT.
        num_tokens: T.
        num_contexts: streams that are alive together: 2 with guidance, else 1.
        itemsize: bytes of a number in the dtype of the projections, 2 or 4.
        chunk_tokens: tokens computed at a time.
        is_expanded: whether projections are stored in fewer bits and expanded where they are used.
        timestep_rows: 2 where the first frame has a timestep of its own.

    Returns:
        Bytes by what they are for; their sum is the peak.
    """
    dim, run = config.dim, min(chunk_tokens, num_tokens)
    full_length = 3 * num_tokens * dim * itemsize
    # The loop over queries and keys: x, its projection, and in rms_norm, where it is of 16 bits, a wide copy, the
    # rounded one, that widened again, and the product with the weight.
    tensors = 2 * itemsize + 4 + 2 + 4 + 4 if itemsize < _FP32 else 3 * itemsize
    self_attention = full_length + run * dim * tensors
    # The loop over the FFN: x, the one of the run before, and the hidden layer before and after GELU.
    feed_forward = run * 2 * (dim + config.ffn_dim) * itemsize
    # The head: a normed run, the patches of every context, and those that are being rearranged.
    patch = math.prod(config.patch_size) * config.out_channels
    head = (run * dim + num_tokens * patch * (num_contexts + 1)) * _FP32
    if is_expanded:
        self_attention += 4 * dim * dim * itemsize
        feed_forward += 2 * dim * config.ffn_dim * itemsize
    largest = max(self_attention, feed_forward, head)
    full_length = full_length if largest == self_attention else 0
    return {
        "residual streams": num_contexts * num_tokens * dim * _FP32,
        "queries, keys, values": full_length,
        "one run of tokens": largest - full_length,
        "rotations": num_tokens * config.head_dim // 2 * _COMPLEX64,
        "text and timestep": num_contexts * config.text_len * dim * itemsize + timestep_rows * 13 * dim * _FP32,
    }


def dit_activations_8bit(
    config: DiTConfig,
    *,
    num_tokens: int,
    num_contexts: int,
    chunk_tokens: int,
    is_expanded: bool = False,
    timestep_rows: int = 1,
    device: str = "cuda",
) -> dict[str, int]:
    """Count what `predict_velocities` holds at its peak on a GPU where blocks multiply in 8 bits, for one sample.

    The references that run without a GPU widen what kernels keep in registers, and hold more.

    Args:
        config: sizes of the DiT.
        num_tokens: T.
        num_contexts: streams that are alive together.
        chunk_tokens: tokens computed at a time.
        is_expanded: whether weights are rounded to 8 bits for each use.
        timestep_rows: 2 where the first frame has a timestep of its own.
        device: the GPU; as if it had e4m3 where none is in this machine.

    Returns:
        Bytes by what they are for; their sum is the peak.
    """
    dim, run, heads = config.dim, min(chunk_tokens, num_tokens), config.num_heads
    # Queries and keys in 8 bits with their scales, values in 16; then, while values are rounded, those as well. While
    # they are projected, of a run its tokens in 8 bits, and queries and keys in 16.
    full_length = num_tokens * (dim * (1 + 1 + 2) + heads * _FP32 * (_BLOCK_KEYS + 4) // _BLOCK_KEYS)
    value_bytes = 1 if not torch.cuda.is_available() or multiplies_e4m3(torch.device(device)) else 2
    full_length += dim * max(num_tokens * value_bytes, run * (1 + 2 + 2))
    # Around a run: its tokens in 8 bits, queries for the text in 16 and normed, what they attend to, that in 8 bits.
    text_run = run * dim * (1 + 2 + 2 + 2 + 1)
    # The FFN: its input and its hidden layer in 8 bits, with a scale per 128 channels.
    feed_forward = run * (dim + config.ffn_dim + config.ffn_dim // 128 * _FP32)
    patch = math.prod(config.patch_size) * config.out_channels
    head = (run * dim + num_tokens * patch * (num_contexts + 1)) * _FP32
    largest = max(full_length, text_run, feed_forward, head)
    full_length = full_length if largest == full_length else 0
    weights = 0
    if is_expanded:  # a block in 8 bits and the next one, and its largest matrix in 16, in fp32 and scaled
        weights = 2 * (8 * dim * dim + 2 * dim * config.ffn_dim) + dim * config.ffn_dim * (2 + 4 + 4)
    return {
        "residual streams": num_contexts * num_tokens * dim * _FP32,
        "queries, keys, values": full_length,
        "one run of tokens": largest - full_length,
        "weights in 8 bits": weights,
        "rotations": num_tokens * config.head_dim // 2 * _COMPLEX64,
        "text and timestep": num_contexts * config.text_len * dim * 2 + timestep_rows * 13 * dim * _FP32,
    }


def dit_activations_8bit_reference(
    config: DiTConfig,
    *,
    num_tokens: int,
    num_contexts: int,
    chunk_tokens: int,
    is_int8: bool,
    is_expanded: bool = False,
    timestep_rows: int = 1,
) -> dict[str, int]:
    """Count what `predict_velocities` holds at its peak where blocks in 8 bits run without a GPU, for one sample.

    The references widen to fp32 what kernels keep in registers: tokens, keys and values, and e4m3 weights.

    Args:
        config: sizes of the DiT.
        num_tokens: T.
        num_contexts: streams that are alive together.
        chunk_tokens: tokens computed at a time.
        is_int8: rather than e4m3: products are then summed in integers, and the FFN's hidden layer is rotated.
        is_expanded: whether weights are rounded to 8 bits for each use.
        timestep_rows: 2 where the first frame has a timestep of its own.

    Returns:
        Bytes by what they are for; their sum is the peak.
    """
    dim, ffn, run = config.dim, config.ffn_dim, min(chunk_tokens, num_tokens)
    scales = num_tokens * config.num_heads * _FP32 * (_BLOCK_KEYS + 4) // _BLOCK_KEYS
    moments = {
        # Keys of a run: it, its queries and keys in 16 bits; turned, padded, in groups, scaled, in fp32, and rounded.
        "keys": (num_tokens * dim * (1 + 1 + 2) + scales, run * dim * (1 + 2 + 2 + 4 * _FP32 + 1)),
        # Values: queries and keys in 8 bits; values in 16, scaled, in another order, in fp32, and rounded twice.
        "values": (num_tokens * dim * (1 + 1 + 2 + 2 * _FP32 + 2) + scales, 0),
        # Attention: all three in 8 bits, keys and values in fp32; of a run queries, sums, what 64 keys give.
        "attention": (
            num_tokens * dim * (3 + 2 * _FP32) + scales,
            run * (2 * dim + 8 * config.num_heads * _BLOCK_KEYS) * _FP32,
        ),
        # Queries and keys of a run together, summed: in integers, as fp32, scaled, and the sum. e4m3: weights in fp32.
        "projections": (
            num_tokens * dim * (1 + 1 + 2) + scales,
            run * dim * (1 + 6 * _FP32) if is_int8 else run * dim * (1 + 3 * _FP32) + 2 * dim * dim * _FP32,
        ),
        # The FFN's hidden layer: int8 has it, rotated, scaled and rounded; e4m3 scaled beside the weights in fp32.
        "hidden layer": (
            0,
            run * (dim + ffn * (3 * _FP32 + 1))
            if is_int8
            else max(run * ffn * (2 * _FP32 + 1), run * (ffn * (_FP32 + 1) + dim * (_FP32 + 1)) + dim * ffn * _FP32),
        ),
        "head": (
            0,
            (run * dim + num_tokens * math.prod(config.patch_size) * config.out_channels * (num_contexts + 1)) * _FP32,
        ),
    }
    full_length, one_run = max(moments.values(), key=sum)
    weights = 2 * dim * dim  # queries' and keys' as one, where they do not lie together
    if is_expanded:  # as on a GPU
        weights = 2 * (8 * dim * dim + 2 * dim * ffn) + dim * ffn * (2 + 4 + 4)
    return {
        "residual streams": num_contexts * num_tokens * dim * _FP32,
        "queries, keys, values": full_length,
        "one run of tokens": one_run,
        "weights in 8 bits": weights,
        "rotations": num_tokens * config.head_dim // 2 * _COMPLEX64,
        "text and timestep": num_contexts * config.text_len * dim * 2 + timestep_rows * 13 * dim * _FP32,
    }


def kept_text_bytes(config: DiTConfig, *, num_contexts: int, itemsize: int, limit: int = KEPT_TEXT_BYTES) -> int:
    """Bytes of keys and values that are kept from step to step, for prompts of full length."""
    return min(limit, num_contexts * config.num_layers * 2 * config.text_len * config.dim * itemsize)
