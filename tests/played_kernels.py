"""Kernels that compute nothing: they make the results a GPU's would make, and count what those would read and write.

So the memory and the traffic of the DiT in 8 bits can be seen where the references, which widen numbers that kernels
keep in registers, would show others.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from wanfast import kernels
from wanfast.kernels import Quantized, QuantizedKeys, QuantizedQueries, QuantizedValues


class Played:
    """Bytes of tokens that go through memory, by operation; the rows of weights that stay in cache are not counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes: Counter[str] = Counter()
        for name in dir(type(self)):
            if name.startswith("play_"):
                monkeypatch.setattr(kernels, name.removeprefix("play_"), getattr(self, name))

    def _count(self, name: str, *tensors: Any) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self.bytes[name] += tensor.nbytes
            else:
                self._count(name, tensor.values, tensor.scale)

    def _rows(self, shape: torch.Size, dtype: torch.dtype, groups: int, rotated: bool) -> Quantized:
        scale = torch.empty(*shape[:-1], groups, dtype=torch.float32)
        return Quantized(torch.empty(shape, dtype=dtype), scale, rotated)

    def play_layer_norm_modulate_quantize(
        self, x: Tensor, scale: Any, shift: Any, dtype: Any, **more: Any
    ) -> Quantized:
        out = self._rows(x.shape, dtype, 1, more["rotated"])
        self._count("norm", x, out)
        return out

    def play_layer_norm_quantize(self, x: Tensor, weight: Any, bias: Any, dtype: Any, **more: Any) -> Quantized:
        return self.play_layer_norm_modulate_quantize(x, weight, bias, dtype, **more)

    def play_quantize_rows(self, x: Tensor, dtype: Any, *, groups: int = 1, rotated: bool = False) -> Quantized:
        out = self._rows(x.shape, dtype, groups, rotated)
        self._count("round attention to text", x, out)
        return out

    def play_linear_8bit(self, x: Quantized, weight: Any, bias: Any, *, out: Tensor | None = None, **_: Any) -> Tensor:
        return torch.empty(*x.shape[:-1], weight.shape[0], dtype=torch.bfloat16) if out is None else out

    def play_linear_8bit_gelu(self, x: Quantized, weight: Any, bias: Any, *, rotated: bool, **_: Any) -> Quantized:
        hidden = weight.shape[0]
        out = self._rows(torch.Size((*x.shape[:-1], hidden)), x.values.dtype, hidden // 128, rotated)
        self._count("GELU", out)
        return out

    def play_linear_8bit_residual(
        self, x: Any, weight: Any, bias: Any, residual: Tensor, gate: Any, **_: Any
    ) -> Tensor:
        self._count("residual", residual, residual)
        return residual

    def play_rms_norm(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        out = torch.empty_like(x)
        self._count("queries for text", x, out)
        return out

    def play_rms_norm_rope(
        self, x: Tensor, weight: Any, rotations: Tensor, *, out_dtype: torch.dtype, **_: Any
    ) -> Tensor:
        out = torch.empty(x.unflatten(-1, (-1, 2 * rotations.shape[1])).shape, dtype=out_dtype)
        self._count("mean of keys", x, out, out)
        return out

    def play_rms_norm_rope_quantize(self, x: Tensor, weight: Any, rotations: Tensor, **_: Any) -> QuantizedQueries:
        heads = x.unflatten(-1, (-1, 2 * rotations.shape[1]))
        out = QuantizedQueries(torch.empty(heads.shape, dtype=torch.int8), torch.empty(heads.shape[:-1]))
        self._count("norm and turn", x, out)
        return out

    def play_rms_norm_rope_quantize_keys(
        self, x: Tensor, weight: Any, rotations: Any, mean: Any, *, out: QuantizedKeys, **_: Any
    ) -> QuantizedKeys:
        self._count("norm and turn", x)
        written = x.shape[1] / out.tokens  # the second look at x finds it in the cache
        self.bytes["norm and turn"] += int(written * (out.values.nbytes + out.scale.nbytes))
        return out

    def play_quantize_values(self, v: Tensor, *, dtype: torch.dtype) -> QuantizedValues:
        batch, tokens, heads, dim = v.shape
        values = torch.empty(batch, heads, -(-tokens // 64), dim, 64, dtype=dtype)
        scale, mean = torch.empty(2, batch, heads, dim)
        self._count("round values", v, v, values)
        return QuantizedValues(values, scale, mean, tokens)

    def play_attention_int8_quantized(
        self, q: Any, k: Any, v: Any, dtype: Any, *, rotated: bool, lists: None
    ) -> Quantized:
        batch, tokens, heads, dim = q.values.shape
        out = self._rows(torch.Size((batch, tokens, heads * dim)), dtype, heads, rotated)
        self._count("attention", out)
        return out

    def play_attention(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return torch.empty_like(q)
