"""Repairs to Triton's interpreter, which holds bfloat16 and float8 as raw bits and computes on the bits.

What `install` mends, each with its test in tests/kernels/test_interpreter.py:

- bfloat16 and float8 arithmetic, comparisons, reductions and dots run in fp32 and round to nearest even.
- fp32 to bfloat16 rounds instead of truncating; casts to float8 round and saturate, as `cvt.rn.satfinite` does.
- float16, int8 and float8 dots go through BLAS, exactly, instead of a slow numpy loop.
- `range` over a run-time bound works with Triton 3.6 on numpy 2.4, which refuses int() of a one-element array.
- `@triton.autotune` takes its first configuration instead of asking for a GPU.

It replaces private parts of `triton.runtime.interpreter`, as they are in Triton 3.6 and 3.7. Call it after
TRITON_INTERPRET=1 is set and before a kernel runs.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import autotuner
from triton.runtime import interpreter as stock

Builder, Handle = stock.InterpreterBuilder, stock.TensorHandle

# Types that numpy lacks: their torch dtype, and the dtype of their bits in numpy and in torch.
RAW = {
    tl.bfloat16: (torch.bfloat16, np.uint16, torch.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8, torch.uint8),
    tl.float8e5: (torch.float8_e5m2, np.uint8, torch.uint8),
}
NATIVE = {tl.float16: np.float16, tl.float32: np.float32, tl.float64: np.float64}
LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}  # casts to float8 saturate here

COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}

_stock_convert_float = stock._convert_float
_stock_binary_op = Builder.binary_op
_stock_ternary_op = Builder.ternary_op
_stock_unary_op = Builder.unary_op
_stock_cast = Builder.cast_impl
_stock_fma = Builder.create_fma
_stock_reduce = stock.ReduceOps.apply_impl
_stock_patch_tensor = stock._patch_lang_tensor


def to_fp32(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Values of an interpreter array, in fp32."""
    if dtype not in RAW:
        return data.astype(np.float32, copy=False)
    torch_dtype, bits, _ = RAW[dtype]
    return torch.from_numpy(np.ascontiguousarray(data).view(bits)).view(torch_dtype).float().numpy()


def from_fp32(values: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """The interpreter's array for fp32 values, rounded to nearest even; float8 saturates."""
    if dtype not in RAW:
        return np.asarray(values).astype(NATIVE[dtype])
    torch_dtype, _, bits = RAW[dtype]
    wide = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    if dtype in LARGEST:
        wide = wide.clamp(-LARGEST[dtype], LARGEST[dtype])
    return wide.to(torch_dtype).view(bits).numpy().reshape(np.shape(values))


def _convert_float(data, source, target, rounding_mode):
    known = all(dtype in RAW or dtype in NATIVE for dtype in (source, target))
    if not known or "RTZ" in str(rounding_mode):
        return _stock_convert_float(data, source, target, rounding_mode)
    return from_fp32(to_fp32(data, source), target)


def _cast(self, source, target_type):
    dtype, target = source.dtype.scalar, target_type.scalar
    if dtype not in RAW and target not in RAW:
        return _stock_cast(self, source, target_type)
    values = to_fp32(source.data, dtype)
    if target in RAW or target in NATIVE:
        return Handle(from_fp32(values, target), target)
    return Handle(values.astype(stock._get_np_dtype(target)), target)


def _fp_to_fp(self, source, target_type, rounding_mode):
    target = target_type.scalar
    data = _convert_float(source.data, source.dtype.scalar, target, rounding_mode)
    return Handle(data.view(stock._get_np_dtype(target)), target)


def _unary_op(self, arg, op):
    dtype = arg.dtype.scalar
    if dtype not in RAW:
        return _stock_unary_op(self, arg, op)
    return Handle(from_fp32(op(to_fp32(arg.data, dtype)), dtype), dtype)


def _binary_op(self, left, right, op):
    dtype = left.dtype.scalar
    if dtype not in RAW or op in BITWISE:
        return _stock_binary_op(self, left, right, op)
    result = op(to_fp32(left.data, dtype), to_fp32(right.data, right.dtype.scalar))
    return Handle(result, tl.int1) if op in COMPARISONS else Handle(from_fp32(result, dtype), dtype)


def _ternary_op(self, first, second, third, op):
    dtype = third.dtype.scalar
    if op is np.where or dtype not in RAW:  # choosing between bits, or pointers, is choosing between values
        return _stock_ternary_op(self, first, second, third, op)
    return Handle(from_fp32(op(*(to_fp32(arg.data, dtype) for arg in (first, second, third))), dtype), dtype)


def _fma(self, x, y, z):
    dtype = z.dtype.scalar
    if dtype not in RAW:
        return _stock_fma(self, x, y, z)
    product = to_fp32(x.data, dtype) * to_fp32(y.data, dtype)
    return Handle(from_fp32(product + to_fp32(z.data, dtype), dtype), dtype)


def _dot(self, a, b, acc, input_precision=None, max_num_imprecise_acc=None):
    if a.dtype.is_int():
        fits_fp32 = a.data.shape[-1] * 2**14 < 2**24  # the largest sum of int8 products is an exact fp32 integer
        exact = np.float32 if fits_fp32 else np.float64
        product = np.matmul(a.data.astype(exact), b.data.astype(exact)).astype(acc.data.dtype)
    elif a.dtype.scalar == tl.float64:
        product = np.matmul(a.data, b.data)
    else:
        product = np.matmul(to_fp32(a.data, a.dtype.scalar), to_fp32(b.data, b.dtype.scalar))
    if acc.data.dtype == np.float16:  # an fp16 accumulator rounds the products' sum, then the running sum
        product = product.astype(np.float16)
    return Handle((product + acc.data).astype(acc.data.dtype, copy=False), acc.dtype.scalar)


def _erf(self, arg):
    return self.unary_op(arg, lambda data: torch.erf(torch.from_numpy(np.ascontiguousarray(data))).numpy())


def _rsqrt(self, arg):
    return self.unary_op(arg, lambda data: 1 / np.sqrt(data))


def _reduce(self, inputs):
    dtype = inputs[0].dtype.scalar
    if len(inputs) != 1 or dtype not in RAW:
        return _stock_reduce(self, inputs)
    results = _stock_reduce(self, (self.to_tensor(to_fp32(inputs[0].handle.data, dtype), tl.float32),))
    results = results if isinstance(results, (tuple, list)) else (results,)
    return tuple(_narrowed(self, result, dtype) for result in results)


def _narrowed(self, result, dtype):
    if result.dtype.scalar == tl.int32:  # the index of an argmin or argmax
        return result
    bits = from_fp32(result.handle.data.reshape(result.shape).astype(np.float32), dtype)
    return self.to_tensor(bits if bits.shape else bits.item(), dtype)


def _patch_tensor(tensor, scope):
    _stock_patch_tensor(tensor, scope)
    tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])


def _rank_by_order(self, *_args, config=None, **_meta):
    order = getattr(self, "_configs_seen", 0)
    self._configs_seen = order + 1
    return [float(order)] * 3


def install() -> None:
    """Replace the interpreter's faulty parts, once and for the whole process."""
    stock._convert_float = _convert_float
    stock._patch_lang_tensor = _patch_tensor
    stock.ReduceOps.apply_impl = _reduce
    autotuner.Autotuner._bench = _rank_by_order
    Builder.cast_impl = _cast
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(Builder, f"create_{name}", _cast)
    Builder.create_fp_to_fp = _fp_to_fp
    Builder.unary_op = _unary_op
    Builder.binary_op = _binary_op
    Builder.ternary_op = _ternary_op
    Builder.create_fma = _fma
    Builder.create_dot = _dot
    Builder.create_erf = _erf
    Builder.create_rsqrt = _rsqrt
