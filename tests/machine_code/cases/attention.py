"""16-bit attention, dense and block-sparse: every tile of the table, each on a GPU that takes it."""

from typing import Any

from machine_code.case import Case, Design
from wanfast.kernels._attention_tiles import KEYS, AttentionTile, pick
from wanfast.kernels.attention import _attention_kernel
from wanfast.kernels.attention_sparse import _attention_sparse_kernel
from wanfast.kernels.block_mask import QUERY_BLOCK

TOKENS, HEADS = 32_760, 40


def _arguments(head_dim: int, dtype: str, tile: AttentionTile) -> dict[str, Any]:
    """Of a launch on q, k and v that are slices of one fused projection."""
    fused, own = 3 * HEADS * head_dim, HEADS * head_dim
    arguments: dict[str, Any] = {"lse_ptr": "fp32", "T": TOKENS, "S": TOKENS, "N": HEADS, "scale": 0.1275}
    for name, axis, token in (("q", "t", fused), ("k", "s", fused), ("v", "s", fused), ("out", "t", own)):
        strides = {"b": TOKENS * token, axis: token, "n": head_dim}
        arguments |= {f"{name}_ptr": dtype} | {f"{name}_stride_{key}": stride for key, stride in strides.items()}
    return arguments | {
        **{"D": head_dim, "QUERIES": tile.queries, "KEYS": KEYS, "PART": tile.part, "AHEAD": tile.ahead},
    }


def _tensor(head_dim: int, arch: int, dtype: str) -> frozenset[str]:
    """Products of scores, 64 keys wide, and of p and v, a part wide."""
    suffix = ".BF16" if dtype == "bf16" else ""
    if arch != 90:
        return frozenset({f"HMMA.16816.F32{suffix}"})
    return frozenset(f"HGMMA.64x{width}x16.F32{suffix}" for width in (KEYS, head_dim))


def _case(kernel: str, head_dim: int, arch: int, dtype: str = "bf16") -> Case:
    sparse = kernel == "attention_sparse"
    tile = pick(arch, head_dim)
    lists = {"columns_ptr": "i32", "counts_ptr": "i32", "M": 256, "QUERY_BLOCK": QUERY_BLOCK}
    return Case(
        kernel=kernel,
        variant=f"D{head_dim}-{dtype}",
        arch=arch,
        function=_attention_sparse_kernel if sparse else _attention_kernel,
        arguments=_arguments(head_dim, dtype, tile) | (lists if sparse else {"last_bias": 0.0}),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        design=Design(
            ctas_per_sm=1 if arch == 90 else 2,
            tensor=_tensor(head_dim, arch, dtype),
            shuffles=8,  # the largest and the sum of a row lie in four lanes
            overhead=6.0 if head_dim == 64 else 3.4,
            stores=frozenset({"128 bit", "32 bit"}),  # results, and the log-sum-exp of a row
        ),
    )


CASES = [
    *(_case(kernel, 128, arch) for kernel in ("attention", "attention_sparse") for arch in (89, 90, 120)),
    *(_case("attention", 64, arch) for arch in (89, 90)),
    _case("attention_sparse", 64, 89),
    _case("attention", 128, 89, "fp16"),
]
