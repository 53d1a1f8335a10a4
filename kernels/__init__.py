"""wanfast's Triton kernels, each in a file of its own beside its torch reference: the public operations.

On a CUDA tensor an operation launches its kernel; on any other it runs its reference, which is also the kernel's
truth in tests. This package needs torch and Triton only, and nothing of wanfast above it.
"""

if __name__ == "wanfast.kernels":
    from .dequantize_gguf import dequantize_gguf
    from .dequantize_scaled import dequantize_scaled
    from .gguf_blocks import gguf_scales
    from .layernorm import layer_norm
    from .modulate import layer_norm_modulate
    from .residual import gated_residual
    from .rmsnorm import rms_norm
else:
    # From the repository root this folder is also found as `kernels`, the name of a package that transformers looks for
    # and imports: it must find a module, and a second copy of every kernel must not be loaded.
    def __getattr__(name: str) -> object:
        raise AttributeError(f"{name}: this package is wanfast.kernels; import it by that name, not as {__name__}")


__all__ = [
    "dequantize_gguf",
    "dequantize_scaled",
    "gated_residual",
    "gguf_scales",
    "layer_norm",
    "layer_norm_modulate",
    "rms_norm",
]
