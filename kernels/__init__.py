"""wanfast's Triton kernels, each in a file of its own beside its torch reference: the public operations.

On a CUDA tensor an operation launches its kernel; on any other it runs its reference, which is also the kernel's
truth in tests. This package needs torch and Triton only, and nothing of wanfast above it.
"""

if __name__ == "wanfast.kernels":
    from ._conv_forms import PackedConv, pack_conv
    from ._heads import HEAD_DIMS
    from ._quantized import GROUP, Quantized, QuantizedWeight
    from ._quantized import rotate_reference as rotate
    from .attention import attention
    from .attention_8bit import attention_8bit
    from .attention_int8 import attention_int8, attention_int8_quantized
    from .attention_sparse import attention_sparse
    from .block_mask import (
        KEY_BLOCK,
        QUERY_BLOCK,
        BlockLists,
        block_mask,
        block_means,
        choose_blocks,
        choosing_bytes,
        lists_of_run,
    )
    from .block_mask import kept_at_most as blocks_kept_at_most
    from .causal_conv3d import causal_conv3d, runs_causal_conv3d
    from .dequantize_gguf import dequantize_gguf
    from .dequantize_scaled import dequantize_scaled
    from .gguf_blocks import gguf_scales
    from .guided_update import Correction, Update, guided_update
    from .layer_norm_quantize import layer_norm_modulate_quantize, layer_norm_quantize
    from .layernorm import layer_norm
    from .linear_8bit import linear_8bit
    from .linear_8bit_gelu import linear_8bit_gelu
    from .linear_8bit_residual import linear_8bit_residual
    from .linear_stored import linear_stored
    from .modulate import layer_norm_modulate
    from .quantize_keys import QuantizedKeys, empty_keys, quantize_keys, sampled_tokens
    from .quantize_queries import QuantizedQueries, quantize_queries
    from .quantize_rows import quantize_rows
    from .quantize_values import QuantizedValues, quantize_values
    from .quantize_weight import fit_weight, quantize_weight
    from .requantize_gguf import requantize_gguf
    from .residual import gated_residual
    from .residual_norm import residual_layer_norm, residual_layer_norm_modulate
    from .residual_norm_quantize import residual_layer_norm_modulate_quantize, residual_layer_norm_quantize
    from .rms_norm_rope import rms_norm_rope
    from .rms_norm_rope_quantize import rms_norm_rope_quantize
    from .rms_norm_rope_quantize_keys import rms_norm_rope_quantize_keys
    from .rms_norm_silu import rms_norm_silu
    from .rmsnorm import rms_norm
else:
    # From the repository root this folder is also found as `kernels`, the name of a package that transformers looks for
    # and imports: it must find a module, and a second copy of every kernel must not be loaded.
    def __getattr__(name: str) -> object:
        raise AttributeError(f"{name}: this package is wanfast.kernels; import it by that name, not as {__name__}")


__all__ = [
    "GROUP",
    "HEAD_DIMS",
    "KEY_BLOCK",
    "QUERY_BLOCK",
    "BlockLists",
    "Correction",
    "PackedConv",
    "Quantized",
    "QuantizedKeys",
    "QuantizedQueries",
    "QuantizedValues",
    "QuantizedWeight",
    "Update",
    "attention",
    "attention_8bit",
    "attention_int8",
    "attention_int8_quantized",
    "attention_sparse",
    "block_mask",
    "block_means",
    "blocks_kept_at_most",
    "causal_conv3d",
    "choose_blocks",
    "choosing_bytes",
    "dequantize_gguf",
    "dequantize_scaled",
    "empty_keys",
    "fit_weight",
    "gated_residual",
    "gguf_scales",
    "guided_update",
    "layer_norm",
    "layer_norm_modulate",
    "layer_norm_modulate_quantize",
    "layer_norm_quantize",
    "linear_8bit",
    "linear_8bit_gelu",
    "linear_8bit_residual",
    "linear_stored",
    "lists_of_run",
    "pack_conv",
    "quantize_keys",
    "quantize_queries",
    "quantize_rows",
    "quantize_values",
    "quantize_weight",
    "requantize_gguf",
    "residual_layer_norm",
    "residual_layer_norm_modulate",
    "residual_layer_norm_modulate_quantize",
    "residual_layer_norm_quantize",
    "rms_norm",
    "rms_norm_rope",
    "rms_norm_rope_quantize",
    "rms_norm_rope_quantize_keys",
    "rms_norm_silu",
    "rotate",
    "runs_causal_conv3d",
    "sampled_tokens",
]
