"""attention, backward: two launches, dq and then dk with dv, each element summed by one program in a fixed order.

    p = exp(scale q k^T - lse),   delta = rowsum(dO out),   ds = p (dO v^T - delta)
    dq = scale ds k,   dk = scale ds^T q,   dv = p^T dO

(Dao et al., arXiv 2205.14135, algorithm 4). The first kernel computes delta and leaves it to the second.
Few keys take attention_cross.py. Reference: palp_fast/reference/attention.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from palp_fast.kernels import attention_cross
from palp_fast.kernels.attention_parts import (
    LOG2E, WITHOUT_MATRIX_INSTRUCTIONS, ByWidth, Launch, Parts, add_product, load_head, load_second, parts, products,
    prompt_of, row_dot, store_head, strides, unit_stride, zeros,
)  # fmt: skip
from palp_fast.kernels.launch import compute_type, launch, settings

# BLOCK_M: queries, BLOCK_N: keys.
DQ_LAUNCHES = {
    "generic": ByWidth(Launch(64, 64, 4, 2), Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(64, 16, 4, 2)),
    "hopper": ByWidth(Launch(128, 64, 8, 2), Launch(128, 64, 8, 2), Launch(128, 64, 8, 2), Launch(64, 64, 4, 2)),
    "turing": WITHOUT_MATRIX_INSTRUCTIONS,
}
DKV_LAUNCHES = {
    "generic": ByWidth(Launch(64, 64, 4, 2), Launch(64, 64, 4, 2), Launch(32, 64, 4, 2), Launch(16, 64, 4, 2)),
    "hopper": ByWidth(Launch(64, 128, 8, 2), Launch(64, 128, 8, 2), Launch(64, 128, 8, 2), Launch(64, 64, 8, 2)),
    "turing": WITHOUT_MATRIX_INSTRUCTIONS,
}


@triton.jit
def attention_bwd_dq_kernel(
    grad_p, q_p, k_p, v_p, out_p, lse_p, delta_p, dq_p, index_p, queries, keys, heads,
    grad_row, grad_stride, q_row, q_stride, k_row, k_stride, v_row, v_stride, out_row, out_stride,
    SCALE: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, O2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, SHARED: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """dq and delta of a tile of queries; delta as lse, dq contiguous."""
    i_m, i_head, i_row = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_prompt = prompt_of(index_p, i_row, SHARED)
    k_p += i_prompt * k_row + i_head * D
    v_p += i_prompt * v_row + i_head * D
    left = queries - i_m
    p_grad = grad_p + i_row * grad_row + i_m * grad_stride + i_head * D
    p_out = out_p + i_row * out_row + i_m * out_stride + i_head * D
    p_q = q_p + i_row * q_row + i_m * q_stride + i_head * D
    b_q1, b_q2 = load_head(p_q, q_stride, left, BLOCK_M, D, D1, D2, EVEN_M)
    b_g1, b_g2 = load_head(p_grad, grad_stride, left, BLOCK_M, D, D1, D2, EVEN_M)
    b_out1, b_out2 = load_head(p_out, out_stride, left, BLOCK_M, D, D1, D2, EVEN_M)
    b_delta = row_dot(b_g1, b_g2, b_out1, b_out2, D2, COMPUTE)
    o_m = tl.arange(0, BLOCK_M)
    o_stat = (i_row * heads + i_head) * queries + i_m + o_m
    tl.store(delta_p + o_stat, b_delta, mask=o_m < left)
    b_lse = tl.load(lse_p + o_stat, mask=o_m < left, other=0.0) * LOG2E
    b_dq1, b_dq2 = zeros(BLOCK_M, D1, O2, COMPUTE)
    for i_n in range(0, keys, BLOCK_N):
        b_k1, b_k2 = load_head(k_p, k_stride, keys - i_n, BLOCK_N, D, D1, D2, EVEN_N)
        b_v1, b_v2 = load_head(v_p, v_stride, keys - i_n, BLOCK_N, D, D1, D2, EVEN_N)
        b_p = tl.exp2(products(b_q1, b_q2, b_k1, b_k2, D2, COMPUTE) * (SCALE * LOG2E) - b_lse[:, None])
        if not EVEN_N:
            b_p = tl.where((i_n + tl.arange(0, BLOCK_N) < keys)[None, :], b_p, 0.0)
        b_ds = b_p * (products(b_g1, b_g2, b_v1, b_v2, D2, COMPUTE) - b_delta[:, None])
        b_k2 = load_second(b_k2, k_p, k_stride, keys - i_n, BLOCK_N, D, D1, D2, O2, EVEN_N)
        b_dq1, b_dq2 = add_product(b_dq1, b_dq2, b_ds, b_k1, b_k2, O2, COMPUTE)
        k_p += BLOCK_N * k_stride
        v_p += BLOCK_N * v_stride
    width = heads * D
    p_dq = dq_p + (i_row * queries + i_m) * width + i_head * D
    store_head(p_dq, width, left, b_dq1 * SCALE, b_dq2 * SCALE, BLOCK_M, D, D1, O2, EVEN_M)


@triton.jit
def _over_queries(
    b_dk1, b_dk2, b_dv1, b_dv2, b_k1, b_k2, b_v1, b_v2, q_p, q_stride, grad_p, grad_stride, lse_p, delta_p, queries,
    SCALE: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, O2: tl.constexpr,
    BLOCK_M: tl.constexpr, EVEN_M: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Adds what the queries of one row and head give to dk (without its scale) and dv of a tile of keys."""
    for i_m in range(0, queries, BLOCK_M):
        left = queries - i_m
        o_m = i_m + tl.arange(0, BLOCK_M)
        b_q1, b_q2 = load_head(q_p, q_stride, left, BLOCK_M, D, D1, D2, EVEN_M)
        b_lse = tl.load(lse_p + o_m, mask=o_m < queries, other=0.0) * LOG2E
        b_p = tl.exp2(products(b_k1, b_k2, b_q1, b_q2, D2, COMPUTE) * (SCALE * LOG2E) - b_lse[None, :])
        b_g1, b_g2 = load_head(grad_p, grad_stride, left, BLOCK_M, D, D1, D2, EVEN_M)
        b_delta = tl.load(delta_p + o_m, mask=o_m < queries, other=0.0)
        b_ds = b_p * (products(b_v1, b_v2, b_g1, b_g2, D2, COMPUTE) - b_delta[None, :])
        b_g2 = load_second(b_g2, grad_p, grad_stride, left, BLOCK_M, D, D1, D2, O2, EVEN_M)
        b_dv1, b_dv2 = add_product(b_dv1, b_dv2, b_p, b_g1, b_g2, O2, COMPUTE)
        b_q2 = load_second(b_q2, q_p, q_stride, left, BLOCK_M, D, D1, D2, O2, EVEN_M)
        b_dk1, b_dk2 = add_product(b_dk1, b_dk2, b_ds, b_q1, b_q2, O2, COMPUTE)
        q_p += BLOCK_M * q_stride
        grad_p += BLOCK_M * grad_stride
    return b_dk1, b_dk2, b_dv1, b_dv2


@triton.jit
def attention_bwd_dkv_kernel(
    grad_p, q_p, k_p, v_p, lse_p, delta_p, dk_p, dv_p, index_p, rows, queries, keys, heads,
    grad_row, grad_stride, q_row, q_stride, k_row, k_stride, v_row, v_stride,
    SCALE: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, O2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, SHARED: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys of one prompt and head, over the prompt's rows in turn; both contiguous."""
    i_n, i_head = tl.program_id(0).to(tl.int64) * BLOCK_N, tl.program_id(1)
    i_prompt = tl.program_id(2).to(tl.int64)
    left = keys - i_n
    k_p += i_prompt * k_row + i_n * k_stride + i_head * D
    v_p += i_prompt * v_row + i_n * v_stride + i_head * D
    b_k1, b_k2 = load_head(k_p, k_stride, left, BLOCK_N, D, D1, D2, EVEN_N)
    b_v1, b_v2 = load_head(v_p, v_stride, left, BLOCK_N, D, D1, D2, EVEN_N)
    b_dk1, b_dk2 = zeros(BLOCK_N, D1, O2, COMPUTE)
    b_dv1, b_dv2 = zeros(BLOCK_N, D1, O2, COMPUTE)
    q_p += i_head * D
    grad_p += i_head * D
    lse_p += i_head * queries
    delta_p += i_head * queries
    if SHARED:
        for i_row in range(0, rows):
            # Another prompt's row counts as one without queries.
            count = tl.where(tl.load(index_p + i_row) == i_prompt, queries, 0)
            b_dk1, b_dk2, b_dv1, b_dv2 = _over_queries(
                b_dk1, b_dk2, b_dv1, b_dv2, b_k1, b_k2, b_v1, b_v2, q_p, q_stride, grad_p, grad_stride, lse_p, delta_p,
                count, SCALE, D, D1, D2, O2, BLOCK_M, EVEN_M, COMPUTE,
            )  # fmt: skip
            q_p += q_row
            grad_p += grad_row
            lse_p += heads * queries
            delta_p += heads * queries
    else:
        o_stat = i_prompt * heads * queries
        b_dk1, b_dk2, b_dv1, b_dv2 = _over_queries(
            b_dk1, b_dk2, b_dv1, b_dv2, b_k1, b_k2, b_v1, b_v2, q_p + i_prompt * q_row, q_stride,
            grad_p + i_prompt * grad_row, grad_stride, lse_p + o_stat, delta_p + o_stat, queries,
            SCALE, D, D1, D2, O2, BLOCK_M, EVEN_M, COMPUTE,
        )  # fmt: skip
    width = heads * D
    o_tile = (i_prompt * keys + i_n) * width + i_head * D
    store_head(dk_p + o_tile, width, left, b_dk1 * SCALE, b_dk2 * SCALE, BLOCK_N, D, D1, O2, EVEN_N)
    store_head(dv_p + o_tile, width, left, b_dv1, b_dv2, BLOCK_N, D, D1, O2, EVEN_N)


def attention_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, heads: int, scale: float,
    kv_index: Tensor | None, need_kv: bool = True, split: Parts | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), the last two empty unless need_kv. split: parts of a head other than the least padded (tests)."""
    grad, q, k, v, out = map(unit_stride, (grad, q, k, v, out))
    width = q.shape[-1] // heads
    split = split or parts(width)
    few = attention_cross.setting(attention_cross.BWD_LAUNCHES, q, k, heads)
    if few and need_kv:
        return attention_cross.attention_cross_bwd(few, grad, q, k, v, out, lse, heads, scale, kv_index, split)
    dq, delta = _dq(grad, q, k, v, out, lse, heads, scale, kv_index, split)
    if not need_kv:
        return dq, k.new_empty(0), v.new_empty(0)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    (rows, queries, _), (prompts, keys, _) = q.shape, k.shape
    chosen = settings(DKV_LAUNCHES, q.device).at(width, q.element_size())
    launch(
        attention_bwd_dkv_kernel, (triton.cdiv(keys, chosen.BLOCK_N), heads, prompts), q,
        grad, q, k, v, lse, delta, dk, dv, kv_index, rows, queries, keys, heads, *strides(grad, q, k, v), scale, width,
        *split, chosen.BLOCK_M, chosen.BLOCK_N, queries % chosen.BLOCK_M == 0, keys % chosen.BLOCK_N == 0,
        kv_index is not None, compute_type(q), num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    return dq, dk, dv


def _dq(grad, q, k, v, out, lse, heads: int, scale: float, kv_index, split: Parts) -> tuple[Tensor, Tensor]:
    """dq and delta."""
    (rows, queries, total), keys = q.shape, k.shape[1]
    dq, delta = q.new_empty(q.shape), torch.empty_like(lse)
    chosen = settings(DQ_LAUNCHES, q.device).at(total // heads, q.element_size())
    launch(
        attention_bwd_dq_kernel, (triton.cdiv(queries, chosen.BLOCK_M), heads, rows), q,
        grad, q, k, v, out, lse, delta, dq, kv_index, queries, keys, heads, *strides(grad, q, k, v, out), scale,
        total // heads, *split, chosen.BLOCK_M, chosen.BLOCK_N, queries % chosen.BLOCK_M == 0,
        keys % chosen.BLOCK_N == 0, kv_index is not None, compute_type(q),
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    return dq, delta
