"""Public kernels whose speed on Ada GPUs is published, as recipes of the same tile: what the model is held to."""

from dataclasses import dataclass
from typing import Any

import recipes
import triton.language as tl
from machine_code.case import Case

TOKENS = 32_768


@dataclass(frozen=True, slots=True)
class Published:
    """One public figure, and the case that stands for its kernel."""

    case: Case
    tops: float  # as published, on the GPU below
    gpu: str
    multiprocessors: int
    clock: float  # Hz, boost
    source: str


RTX_4090 = ("RTX 4090", 128, 2.52e9)
RTX_4080 = ("RTX 4080", 76, 2.505e9)
RTX_4060 = ("RTX 4060", 24, 2.46e9)


def _flash(name: str, dtype: str, head_dim: int, tile: tuple[int, int], stages: int) -> Case:
    transposed = dtype.startswith("fp8")
    return Case(
        kernel=name,
        variant=f"D{head_dim}",
        arch=89,
        function=recipes.flash_attention_kernel,
        arguments={
            **{"q_ptr": dtype, "k_ptr": dtype, "v_ptr": dtype, "out_ptr": "fp16", "scale": 0.125},
            **_strides(head_dim, transposed),
            **{"D": head_dim, "BLOCK_Q": tile[0], "BLOCK_K": tile[1]},
        },
        num_warps=4,
        num_stages=stages,
    )


def _strides(head_dim: int, transposed: bool) -> dict[str, int]:
    token, channel = (1, TOKENS) if transposed else (head_dim, 1)
    return {"T": TOKENS, "head_stride": TOKENS * head_dim, "v_stride_t": token, "v_stride_d": channel}


def _sage(name: str, values: str, sums: Any, warps: int, stages: int) -> Case:
    return Case(
        kernel=name,
        variant="D128",
        arch=89,
        function=recipes.sage_attention_kernel,
        arguments={
            **{"q_ptr": "i8", "k_ptr": "i8", "v_ptr": values, "out_ptr": "fp16"},
            **{"q_scale_ptr": "fp32", "k_scale_ptr": "fp32"},
            **_strides(128, transposed=values != "fp16"),
            **{"SUM": sums, "P_LOG2": 0.0 if values == "fp16" else 8.807, "D": 128, "BLOCK_Q": 128, "BLOCK_K": 64},
        },
        num_warps=warps,
        num_stages=stages,
    )


def _matmul(name: str, sums: Any) -> Case:
    return Case(
        kernel=name,
        variant="2048",
        arch=89,
        function=recipes.matmul_kernel,
        arguments={
            **{"a_ptr": "fp16", "b_ptr": "fp16", "c_ptr": "fp16", "M": 2048, "N": 2048, "K": 2048, "SUM": sums},
            **{"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "GROUP": 8},
        },
        num_warps=4,
        num_stages=3,
    )


_SAGE = "thu-ml/SageAttention, assets/4090_hd128.png"
_TUTORIAL = "triton-lang/triton#3479, 16,384 tokens"
_SUMS = "triton-lang/triton#10851, share of the tensor pipe; its tile is not told"

PUBLISHED = (
    Published(_flash("FlashAttention-2", "fp16", 128, (128, 32), 2), 164, *RTX_4090, source=_SAGE),
    Published(_sage("SageAttention 1", "fp16", tl.float16, 8, 4), 322, *RTX_4090, source=_SAGE),
    Published(_sage("SageAttention 2", "fp8e4nv", tl.float32, 4, 3), 431, *RTX_4090, source=_SAGE),
    Published(_sage("SageAttention 2++", "fp8e4nv", tl.float16, 4, 3), 493, *RTX_4090, source=_SAGE),
    Published(_flash("Triton's tutorial, fp16", "fp16", 64, (128, 64), 4), 94.9, *RTX_4080, source=_TUTORIAL),
    Published(_flash("Triton's tutorial, e4m3", "fp8e4nv", 64, (128, 64), 4), 183.3, *RTX_4080, source=_TUTORIAL),
    Published(_matmul("matmul, fp32 sums", tl.float32), 0.9573 * 30.2, *RTX_4060, source=_SUMS),
    Published(_matmul("matmul, fp16 sums", tl.float16), 0.8991 * 60.5, *RTX_4060, source=_SUMS),
)
