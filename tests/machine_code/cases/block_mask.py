"""Means of blocks of tokens, for the choice of blocks: of keys and of queries, these in 8 bits too."""

from machine_code.case import Case, Design
from wanfast.kernels.block_mask import KEY_BLOCK, QUERY_BLOCK, _pool_blocks_kernel


def _case(name: str, block: int, head_dim: int, arch: int, *, dtype: str = "bf16") -> Case:
    scale = "fp32" if dtype == "i8" else None
    arguments = {
        **{"x_ptr": dtype, "scale_ptr": scale, "mean_ptr": "fp32", "T": 32_760, "N": 40, "D": head_dim, "BLOCK": block},
        **{"x_stride_b": 32_760 * 120 * head_dim, "x_stride_t": 120 * head_dim, "x_stride_n": head_dim},
    }
    # A row's scale is one number of 4 bytes beside its 64 or 128 of one.
    widths = {"bf16": {"128 bit"}, "i8": {"128 bit", "32 bit"}}
    design = Design(ctas_per_sm=4, loads=frozenset(widths[dtype]))
    return Case(
        kernel="pool_blocks",
        variant=f"{name}-D{head_dim}{'-i8' if dtype == 'i8' else ''}",
        arch=arch,
        function=_pool_blocks_kernel,
        arguments=arguments,
        num_warps=4,
        design=design,
    )


CASES = [
    *(_case("queries", QUERY_BLOCK, 128, arch) for arch in (89, 90, 120)),
    _case("keys", KEY_BLOCK, 128, 89),
    _case("keys", KEY_BLOCK, 64, 89),
    *(_case("queries", QUERY_BLOCK, 128, arch, dtype="i8") for arch in (89, 90, 120)),
    _case("queries", QUERY_BLOCK, 64, 89, dtype="i8"),
]
