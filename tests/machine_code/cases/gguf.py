"""Kernels that expand GGUF blocks: every kind on Ada, the most used ones on Hopper and consumer Blackwell too."""

from machine_code.case import Case, Design
from wanfast.kernels._gguf_triton import KERNELS, NUM_WARPS

KINDS = {89: tuple(KERNELS), 90: ("Q8_0", "Q4_K", "Q6_K"), 120: ("Q8_0", "Q4_K", "Q6_K")}
TENSORS = {"blocks_ptr": "u8", "halves_ptr": "fp16", "out_ptr": "bf16"}


def _case(kind: str, arch: int) -> Case:
    function, constants = KERNELS[kind]
    return Case(
        kernel="dequantize_gguf",
        variant=kind,
        arch=arch,
        function=function,
        arguments=TENSORS | {"num_blocks": 5120 * 13824 // 256} | constants,
        num_warps=NUM_WARPS,
        design=Design(stores=frozenset({"128 bit"})),  # most blocks are no multiple of 16 bytes, or not even of 4
    )


CASES = [_case(kind, arch) for arch, kinds in KINDS.items() for kind in kinds]
