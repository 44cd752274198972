"""attention, forward: softmax(scale q k^T) v with a running maximum, one launch.

    m' = max(m, rowmax s),   l' = l exp2(m - m') + rowsum exp2(s - m'),   o' = o exp2(m - m') + exp2(s - m') v

with s = log2(e) scale q k^T (Dao et al., arXiv 2205.14135). Few keys take attention_cross.py.
Reference: palp_fast/reference/attention.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from palp_fast.kernels import attention_cross
from palp_fast.kernels.attention_parts import (
    LN2, LOG2E, WITHOUT_MATRIX_INSTRUCTIONS, ByWidth, Launch, Parts, add_product, load_head, parts, products, prompt_of,
    store_head, strides, unit_stride, zeros,
)  # fmt: skip
from palp_fast.kernels.launch import compute_type, launch, settings
from palp_fast.reference.dtypes import compute_dtype


LAUNCHES = {
    "generic": ByWidth(Launch(128, 64, 4, 3), Launch(128, 64, 4, 3), Launch(64, 64, 4, 2), Launch(64, 32, 4, 2)),
    "hopper": ByWidth(Launch(128, 128, 8, 3), Launch(128, 128, 8, 3), Launch(128, 64, 8, 3), Launch(128, 64, 8, 2)),
    "turing": WITHOUT_MATRIX_INSTRUCTIONS,
}


@triton.jit
def attention_fwd_kernel(
    q_p, k_p, v_p, out_p, lse_p, index_p, queries, keys, heads, q_row, q_stride, k_row, k_stride, v_row, v_stride,
    SCALE: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, O2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, SHARED: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head and row. SCALE includes log2(e); out is contiguous, lse [rows, heads, queries]."""
    i_m, i_head, i_row = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_prompt = prompt_of(index_p, i_row, SHARED)
    k_p += i_prompt * k_row + i_head * D
    v_p += i_prompt * v_row + i_head * D
    left = queries - i_m
    p_q = q_p + i_row * q_row + i_m * q_stride + i_head * D
    b_q1, b_q2 = load_head(p_q, q_stride, left, BLOCK_M, D, D1, D2, EVEN_M)
    b_o1, b_o2 = zeros(BLOCK_M, D1, O2, COMPUTE)
    b_max = tl.full([BLOCK_M], float("-inf"), COMPUTE)
    b_sum = tl.zeros([BLOCK_M], COMPUTE)
    for i_n in range(0, keys, BLOCK_N):
        b_k1, b_k2 = load_head(k_p, k_stride, keys - i_n, BLOCK_N, D, D1, D2, EVEN_N)
        b_s = products(b_q1, b_q2, b_k1, b_k2, D2, COMPUTE)
        if not EVEN_N:
            b_s = tl.where((i_n + tl.arange(0, BLOCK_N) < keys)[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1) * SCALE)
        b_p = tl.exp2(b_s * SCALE - b_new[:, None])
        b_shrink = tl.exp2(b_max - b_new)
        b_max = b_new
        b_sum = b_sum * b_shrink + tl.sum(b_p, axis=1)
        b_o1 *= b_shrink[:, None]
        if O2 > 0:
            b_o2 *= b_shrink[:, None]
        b_v1, b_v2 = load_head(v_p, v_stride, keys - i_n, BLOCK_N, D, D1, O2, EVEN_N)
        b_o1, b_o2 = add_product(b_o1, b_o2, b_p, b_v1, b_v2, O2, COMPUTE)
        k_p += BLOCK_N * k_stride
        v_p += BLOCK_N * v_stride
    width = heads * D
    p_out = out_p + (i_row * queries + i_m) * width + i_head * D
    store_head(p_out, width, left, b_o1 / b_sum[:, None], b_o2 / b_sum[:, None], BLOCK_M, D, D1, O2, EVEN_M)
    o_m = tl.arange(0, BLOCK_M)
    p_lse = lse_p + (i_row * heads + i_head) * queries + i_m + o_m
    tl.store(p_lse, (b_max + tl.log2(b_sum)) * LN2, mask=o_m < left)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, kv_index: Tensor | None, split: Parts | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse). split: parts of a head other than the least padded (tests)."""
    q, k, v = map(unit_stride, (q, k, v))
    rows, queries, total = q.shape
    keys, width = k.shape[1], total // heads
    split = split or parts(width)
    if few := attention_cross.setting(attention_cross.FWD_LAUNCHES, q, k, heads):
        return attention_cross.attention_cross_fwd(few, q, k, v, heads, scale, kv_index, split)
    out = q.new_empty(q.shape)
    lse = q.new_empty((rows, heads, queries), dtype=compute_dtype([q]))
    chosen = settings(LAUNCHES, q.device).at(width, q.element_size())
    launch(
        attention_fwd_kernel, (triton.cdiv(queries, chosen.BLOCK_M), heads, rows), q,
        q, k, v, out, lse, kv_index, queries, keys, heads, *strides(q, k, v), scale * LOG2E.value, width,
        *split, chosen.BLOCK_M, chosen.BLOCK_N, queries % chosen.BLOCK_M == 0, keys % chosen.BLOCK_N == 0,
        kv_index is not None, compute_type(q),
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    return out, lse
