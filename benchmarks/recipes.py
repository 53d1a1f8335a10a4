"""Kernels of published recipes: what the computed speeds are calibrated on, and peers of wanfast's own on a GPU.

Written from the papers' and repositories' descriptions, for their tiles; no length is masked here, so lengths are
multiples of the tile. q, k, v [H, T, D]; 8-bit v [H, D, T].

    flash_attention   FlashAttention-2 and Triton's tutorial: exact softmax, fp32 sums, P in v's dtype
    sage_attention    SageAttention 1, 2 and 2++: int8 QK with a scale per block, 16- or 8-bit PV
    matmul            Triton's tutorial: one dot per step, sums in fp32, fp16 or int32
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["T"])
def flash_attention_kernel(
    q_ptr,  # [H, T, D]
    k_ptr,  # [H, T, D]
    v_ptr,  # [H, T, D] or, as v_stride_t of 1 says, [H, D, T]
    out_ptr,  # [H, T, D]
    scale,  # of the logits, times log2(e)
    T,
    head_stride,
    v_stride_t,
    v_stride_d,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = tl.program_id(1).to(tl.int64) * head_stride
    d = tl.arange(0, D)
    q = tl.load(q_ptr + head + rows[:, None] * D + d[None, :])
    keys = tl.arange(0, BLOCK_K)
    k_at = k_ptr + head + keys[None, :] * D + d[:, None]
    v_at = v_ptr + head + keys[:, None] * v_stride_t + d[None, :] * v_stride_d
    top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    for _ in range(0, T // BLOCK_K):
        logits = tl.dot(q, tl.load(k_at))
        new_top = tl.maximum(top, tl.max(logits, 1) * scale)
        p = tl.exp2(logits * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_at)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = new_top
        k_at += BLOCK_K * D
        v_at += BLOCK_K * v_stride_t
    tl.store(out_ptr + head + rows[:, None] * D + d[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def sage_attention_kernel(
    q_ptr,  # [H, T, D] int8
    k_ptr,  # [H, T, D] int8
    v_ptr,  # [H, T, D] fp16, or [H, D, T] e4m3 with the tokens of each 32 in the order of a PV operand
    q_scale_ptr,  # [H, T / BLOCK_Q], the logits' scale and log2(e) in it
    k_scale_ptr,  # [H, T / BLOCK_K]
    out_ptr,  # [H, T, D]
    T,
    head_stride,
    v_stride_t,
    v_stride_d,
    SUM: tl.constexpr,  # the dtype that one tile's PV is summed in
    P_LOG2: tl.constexpr,  # of the largest P: it spans the range of an 8-bit float
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = tl.program_id(1).to(tl.int64) * head_stride
    d = tl.arange(0, D)
    q = tl.load(q_ptr + head + rows[:, None] * D + d[None, :])
    q_scale = tl.load(q_scale_ptr + tl.program_id(1) * (T // BLOCK_Q) + tl.program_id(0))
    k_scale_at = k_scale_ptr + tl.program_id(1) * (T // BLOCK_K)
    keys = tl.arange(0, BLOCK_K)
    k_at = k_ptr + head + keys[None, :] * D + d[:, None]
    v_at = v_ptr + head + keys[:, None] * v_stride_t + d[None, :] * v_stride_d
    top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    for _ in range(0, T // BLOCK_K):
        logits = tl.dot(q, tl.load(k_at)).to(tl.float32) * (q_scale * tl.load(k_scale_at))
        new_top = tl.maximum(top, tl.max(logits, 1))
        p = tl.exp2(logits + (P_LOG2 - new_top)[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_at)
        p_low = p.to(v.dtype)
        if v.dtype.primitive_bitwidth == 8:  # a thread's logits become its part of the operand, without shuffles
            p_low = p_low.reshape(BLOCK_Q, BLOCK_K // 32, 2, 2, 4, 2).permute(0, 1, 2, 4, 3, 5)
            p_low = p_low.reshape(BLOCK_Q, BLOCK_K)
        acc = acc * shrink[:, None] + tl.dot(p_low, v, out_dtype=SUM).to(tl.float32)
        top = new_top
        k_at += BLOCK_K * D
        v_at += BLOCK_K * v_stride_t
        k_scale_at += 1
    tl.store(out_ptr + head + rows[:, None] * D + d[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty))


@triton.jit
def matmul_kernel(
    a_ptr,  # [M, K]
    b_ptr,  # [N, K]
    c_ptr,  # [M, N]
    M,
    N,
    K,
    SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,  # row tiles that share the columns' tiles in L2
):
    program = tl.program_id(0)
    rows, columns = M // BLOCK_M, N // BLOCK_N
    first = program // (GROUP * columns) * GROUP
    height = min(rows - first, GROUP)
    row = first + program % (GROUP * columns) % height
    column = program % (GROUP * columns) // height
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_at = a_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
    b_at = b_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    for _ in range(0, K // BLOCK_K):
        acc = tl.dot(tl.load(a_at), tl.load(b_at).T, acc, out_dtype=SUM)
        a_at += BLOCK_K
        b_at += BLOCK_K
    tl.store(c_ptr + m.to(tl.int64)[:, None] * N + n[None, :], acc.to(c_ptr.dtype.element_ty))


FLASH_TILE = {"BLOCK_Q": 128, "BLOCK_K": 64}  # of Triton's tutorial, for head dimension 128 on a large GPU
FLASH_WARPS, FLASH_STAGES = 8, 3


def tutorial_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run Triton's tutorial's recipe on a GPU: q, k, v [H, T, D] of 16 bits, contiguous, T a multiple of 128."""
    heads, tokens, width = q.shape
    out = torch.empty_like(q)
    flash_attention_kernel[(tokens // FLASH_TILE["BLOCK_Q"], heads)](
        *(q, k, v, out),
        width**-0.5 * 1.4426950408889634,
        *(tokens, tokens * width, width, 1),
        D=width,
        **FLASH_TILE,
        num_warps=FLASH_WARPS,
        num_stages=FLASH_STAGES,
    )
    return out
