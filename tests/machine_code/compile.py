"""Compiles a case ahead of time, as its launch would."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .case import Case

_INT32 = range(-(2**31), 2**31)


def compile_case(case: Case) -> Any:
    """Compile: the result's `asm` holds ttgir, ptx and cubin, its `metadata` shared memory and warps."""
    options: dict[str, Any] = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": True,
    }
    if case.maxnreg is not None:
        options["maxnreg"] = case.maxnreg
    return triton.compile(_source(case), target=GPUTarget("cuda", case.arch, 32), options=options)


def _source(case: Case) -> ASTSource:
    """Constants are built in, an int of 1 too; pointers and multiples of 16 are known to be that."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: list[int] = []
    left = dict(case.arguments)
    for index, parameter in enumerate(case.function.params):
        name = parameter.name
        value = left.pop(name) if name in left else parameter.default
        specialises = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialises):
            signature[name] = "constexpr"
            constants[name] = value
            continue
        signature[name] = _type_of(value)
        if specialises and (isinstance(value, str) or (type(value) is int and value % 16 == 0)):
            aligned.append(index)
    assert not left, f"{case.name}: {case.function.__name__} has no {', '.join(left)}"
    attrs = {(index,): [["tt.divisibility", 16]] for index in aligned}
    return ASTSource(fn=case.function, signature=signature, constexprs=constants, attrs=attrs)


def _type_of(value: Any) -> str:
    if isinstance(value, str):
        return f"*{value}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if value in _INT32 else "i64"
    assert isinstance(value, float), f"no argument of a launch: {value!r}"
    return "fp32"
