"""attention to few keys: those of a head stay on chip, one pass without a running maximum.

77 keys are taken as 64 + 16, as the parts of a head's width. Forward one launch, backward two: dq with what each chunk
of queries gives to dk and dv, then the sum of the chunks per prompt, in their order.
Reference: palp_fast/reference/attention.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from palp_fast.kernels.attention_parts import (
    LN2, LOG2E, ByWidth, Launch, Parts, add_product, load_head, load_second, parts, products, prompt_of, row_dot,
    store_head, strides, zeros,
)  # fmt: skip
from palp_fast.kernels.launch import compute_type, launch, settings
from palp_fast.reference.dtypes import compute_dtype

MOST_KEYS = 128
_PROGRAMS = 128  # of one row; a longer row gives each program more tiles, so that fewer sums are stored and added
_MOST_TILES = 8

_NOT_HERE = Launch(0, 0)  # too many registers or no matrix instructions: the kernels for many keys take these
FWD_LAUNCHES = {
    "generic": ByWidth(*[Launch(64, 0, 4, 2)] * 3, Launch(64, 0, 4, 1), Launch(32, 0, 4, 1), _NOT_HERE),
    "turing": ByWidth(*[_NOT_HERE] * 6),
}
BWD_LAUNCHES = {
    "generic": ByWidth(
        Launch(64, 0, 8, 2), Launch(32, 0, 8, 2), Launch(64, 0, 8, 1), _NOT_HERE, Launch(16, 0, 8, 1), _NOT_HERE),
    "hopper": ByWidth(*[Launch(64, 0, 8, 2)] * 3, _NOT_HERE, Launch(16, 0, 8, 1), _NOT_HERE),
    "turing": ByWidth(*[_NOT_HERE] * 6),
}  # fmt: skip
SUM_BLOCK = 512  # elements that one program of the second stage sums


@triton.jit
def _masked(b_s, START: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Scores of a part of the keys, -inf where there is none."""
    if START + SIZE > KEYS:
        b_s = tl.where((START + tl.arange(0, SIZE) < KEYS)[None, :], b_s, float("-inf"))
    return b_s


@triton.jit
def attention_cross_fwd_kernel(
    q_p, k_p, v_p, out_p, lse_p, index_p, queries, heads, q_row, q_stride, k_row, k_stride, v_row, v_stride, TILES,
    SCALE: tl.constexpr, KEYS: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, O2: tl.constexpr,
    BLOCK_M: tl.constexpr, EVEN_M: tl.constexpr, SHARED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """TILES tiles of queries of one head and row; arguments as attention_fwd_kernel's."""
    i_m = tl.program_id(0).to(tl.int64) * TILES * BLOCK_M
    i_head, i_row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_prompt = prompt_of(index_p, i_row, SHARED)
    width = heads * D
    k_p += i_prompt * k_row + i_head * D
    v_p += i_prompt * v_row + i_head * D
    b_k1, b_k2 = load_head(k_p, k_stride, KEYS, K1, D, D1, D2, K1 <= KEYS)
    b_v1, b_v2 = load_head(v_p, v_stride, KEYS, K1, D, D1, O2, K1 <= KEYS)
    if K2 > 0:
        k_p += K1 * k_stride
        v_p += K1 * v_stride
        b_l1, b_l2 = load_head(k_p, k_stride, KEYS - K1, K2, D, D1, D2, K1 + K2 <= KEYS)
        b_w1, b_w2 = load_head(v_p, v_stride, KEYS - K1, K2, D, D1, O2, K1 + K2 <= KEYS)
    q_p += i_row * q_row + i_m * q_stride + i_head * D
    out_p += (i_row * queries + i_m) * width + i_head * D
    lse_p += (i_row * heads + i_head) * queries + i_m
    left = (queries - i_m).to(tl.int32)
    for _ in range(0, tl.minimum(TILES, tl.cdiv(left, BLOCK_M))):
        b_q1, b_q2 = load_head(q_p, q_stride, left, BLOCK_M, D, D1, D2, EVEN_M)
        b_s = _masked(products(b_q1, b_q2, b_k1, b_k2, D2, COMPUTE), 0, K1, KEYS)
        b_max = tl.max(b_s, axis=1)
        if K2 > 0:
            b_t = _masked(products(b_q1, b_q2, b_l1, b_l2, D2, COMPUTE), K1, K2, KEYS)
            b_max = tl.maximum(b_max, tl.max(b_t, axis=1))
        b_max *= SCALE
        b_p = tl.exp2(b_s * SCALE - b_max[:, None])
        b_sum = tl.sum(b_p, axis=1)
        b_o1, b_o2 = zeros(BLOCK_M, D1, O2, COMPUTE)
        b_o1, b_o2 = add_product(b_o1, b_o2, b_p, b_v1, b_v2, O2, COMPUTE)
        if K2 > 0:
            b_r = tl.exp2(b_t * SCALE - b_max[:, None])
            b_sum += tl.sum(b_r, axis=1)
            b_o1, b_o2 = add_product(b_o1, b_o2, b_r, b_w1, b_w2, O2, COMPUTE)
        store_head(out_p, width, left, b_o1 / b_sum[:, None], b_o2 / b_sum[:, None], BLOCK_M, D, D1, O2, EVEN_M)
        o_m = tl.arange(0, BLOCK_M)
        tl.store(lse_p + o_m, (b_max + tl.log2(b_sum)) * LN2, mask=o_m < left)
        q_p += BLOCK_M * q_stride
        out_p += BLOCK_M * width
        lse_p += BLOCK_M
        left -= BLOCK_M


@triton.jit
def attention_cross_bwd_kernel(
    grad_p, q_p, k_p, v_p, out_p, lse_p, dq_p, dk_p, dv_p, index_p, queries, heads,
    grad_row, grad_stride, q_row, q_stride, k_row, k_stride, v_row, v_stride, out_row, out_stride, TILES,
    SCALE: tl.constexpr, KEYS: tl.constexpr, PADDED: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, O2: tl.constexpr,
    BLOCK_M: tl.constexpr, EVEN_M: tl.constexpr, SHARED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dq of TILES tiles of queries, and what they give to dk and dv: [rows, chunks, KEYS, heads D] to compute with."""
    i_chunk, i_head, i_row = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_m = i_chunk * TILES * BLOCK_M
    i_prompt = prompt_of(index_p, i_row, SHARED)
    width = heads * D
    k_p += i_prompt * k_row + i_head * D
    v_p += i_prompt * v_row + i_head * D
    b_k1, b_k2 = load_head(k_p, k_stride, KEYS, PADDED, D, D1, D2, PADDED == KEYS)
    b_ko = load_second(b_k2, k_p, k_stride, KEYS, PADDED, D, D1, D2, O2, PADDED == KEYS)
    b_v1, b_v2 = load_head(v_p, v_stride, KEYS, PADDED, D, D1, D2, PADDED == KEYS)
    b_dk1, b_dk2 = zeros(PADDED, D1, O2, COMPUTE)
    b_dv1, b_dv2 = zeros(PADDED, D1, O2, COMPUTE)
    q_p += i_row * q_row + i_m * q_stride + i_head * D
    grad_p += i_row * grad_row + i_m * grad_stride + i_head * D
    out_p += i_row * out_row + i_m * out_stride + i_head * D
    dq_p += (i_row * queries + i_m) * width + i_head * D
    lse_p += (i_row * heads + i_head) * queries + i_m
    left = (queries - i_m).to(tl.int32)
    for _ in range(0, tl.minimum(TILES, tl.cdiv(left, BLOCK_M))):
        o_m = tl.arange(0, BLOCK_M)
        b_q1, b_q2 = load_head(q_p, q_stride, left, BLOCK_M, D, D1, D2, EVEN_M)
        b_g1, b_g2 = load_head(grad_p, grad_stride, left, BLOCK_M, D, D1, D2, EVEN_M)
        b_out1, b_out2 = load_head(out_p, out_stride, left, BLOCK_M, D, D1, D2, EVEN_M)
        b_delta = row_dot(b_g1, b_g2, b_out1, b_out2, D2, COMPUTE)
        b_lse = tl.load(lse_p + o_m, mask=o_m < left, other=0.0) * LOG2E
        # Keys are rows here: p and ds are then left factors as they are, and only dq needs ds turned.
        b_p = tl.exp2(products(b_k1, b_k2, b_q1, b_q2, D2, COMPUTE) * (SCALE * LOG2E) - b_lse[None, :])
        if PADDED > KEYS:
            b_p = tl.where((tl.arange(0, PADDED) < KEYS)[:, None], b_p, 0.0)
        b_ds = b_p * (products(b_v1, b_v2, b_g1, b_g2, D2, COMPUTE) - b_delta[None, :])
        b_g2 = load_second(b_g2, grad_p, grad_stride, left, BLOCK_M, D, D1, D2, O2, EVEN_M)
        b_dv1, b_dv2 = add_product(b_dv1, b_dv2, b_p, b_g1, b_g2, O2, COMPUTE)
        b_q2 = load_second(b_q2, q_p, q_stride, left, BLOCK_M, D, D1, D2, O2, EVEN_M)
        b_dk1, b_dk2 = add_product(b_dk1, b_dk2, b_ds, b_q1, b_q2, O2, COMPUTE)
        b_dq1, b_dq2 = zeros(BLOCK_M, D1, O2, COMPUTE)
        b_dq1, b_dq2 = add_product(b_dq1, b_dq2, tl.trans(b_ds.to(b_k1.dtype)), b_k1, b_ko, O2, COMPUTE)
        store_head(dq_p, width, left, b_dq1 * SCALE, b_dq2 * SCALE, BLOCK_M, D, D1, O2, EVEN_M)
        q_p += BLOCK_M * q_stride
        grad_p += BLOCK_M * grad_stride
        out_p += BLOCK_M * out_stride
        dq_p += BLOCK_M * width
        lse_p += BLOCK_M
        left -= BLOCK_M
    o_part = (i_row * tl.num_programs(0) + i_chunk) * KEYS * width + i_head * D
    store_head(dk_p + o_part, width, KEYS, b_dk1 * SCALE, b_dk2 * SCALE, PADDED, D, D1, O2, PADDED == KEYS)
    store_head(dv_p + o_part, width, KEYS, b_dv1, b_dv2, PADDED, D, D1, O2, PADDED == KEYS)


@triton.jit
def attention_cross_sum_kernel(
    dk_part_p, dv_part_p, dk_p, dv_p, index_p, rows, chunks, size, BLOCK: tl.constexpr, SHARED: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Parts [rows, chunks, size] -> dk and dv [prompts, size]: rows of the prompt and their chunks in order."""
    i_prompt = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < size
    b_dk, b_dv = tl.zeros([BLOCK], COMPUTE), tl.zeros([BLOCK], COMPUTE)
    first, count = i_prompt * chunks, chunks
    if SHARED:
        first, count = i_prompt * 0, rows * chunks
    dk_part_p += first * size + o_n
    dv_part_p += first * size + o_n
    for i_part in range(0, count):
        m_part = m_n
        if SHARED:
            m_part = m_n & (tl.load(index_p + i_part // chunks) == i_prompt)
        b_dk += tl.load(dk_part_p, mask=m_part, other=0.0)
        b_dv += tl.load(dv_part_p, mask=m_part, other=0.0)
        dk_part_p += size
        dv_part_p += size
    o_out = i_prompt * size + o_n
    tl.store(dk_p + o_out, b_dk.to(dk_p.dtype.element_ty), mask=m_n)
    tl.store(dv_p + o_out, b_dv.to(dv_p.dtype.element_ty), mask=m_n)


def setting(table: dict[str, ByWidth], q: Tensor, k: Tensor, heads: int) -> Launch | None:
    """The launch for these keys if they are few enough to stay on chip, else None."""
    chosen = settings(table, q.device).at(q.shape[-1] // heads, q.element_size())
    return chosen if k.shape[1] <= MOST_KEYS and chosen.BLOCK_M else None


def tiles_of_program(queries: int, heads: int, block: int) -> int:
    """How many tiles of queries one program takes."""
    return max(1, min(_MOST_TILES, triton.cdiv(queries, block) * heads // _PROGRAMS))


def attention_cross_fwd(
    chosen: Launch, q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, kv_index: Tensor | None, split: Parts
) -> tuple[Tensor, Tensor]:
    """(out, lse) for at most MOST_KEYS keys; the last dimension of q, k, v has stride 1."""
    rows, queries, total = q.shape
    keys, width = k.shape[1], total // heads
    out = q.new_empty(q.shape)
    lse = q.new_empty((rows, heads, queries), dtype=compute_dtype([q]))
    tiles = tiles_of_program(queries, heads, chosen.BLOCK_M)
    launch(
        attention_cross_fwd_kernel, (triton.cdiv(queries, tiles * chosen.BLOCK_M), heads, rows), q,
        q, k, v, out, lse, kv_index, queries, heads, *strides(q, k, v), tiles, scale * LOG2E.value, keys,
        *parts(keys)[:2], width, *split, chosen.BLOCK_M, queries % chosen.BLOCK_M == 0, kv_index is not None,
        compute_type(q), num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    return out, lse


def attention_cross_bwd(
    chosen: Launch, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, heads: int, scale: float,
    kv_index: Tensor | None, split: Parts,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) for at most MOST_KEYS keys; the last dimension of grad, q, k, v, out has stride 1."""
    (rows, queries, total), (prompts, keys, _) = q.shape, k.shape
    width = total // heads
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    tiles = tiles_of_program(queries, heads, chosen.BLOCK_M)
    chunks = triton.cdiv(queries, tiles * chosen.BLOCK_M)
    dk_part, dv_part = (lse.new_empty((rows, chunks, keys, total)) for _ in range(2))
    launch(
        attention_cross_bwd_kernel, (chunks, heads, rows), q,
        grad, q, k, v, out, lse, dq, dk_part, dv_part, kv_index, queries, heads, *strides(grad, q, k, v, out), tiles,
        scale, keys, max(16, triton.next_power_of_2(keys)), width, *split, chosen.BLOCK_M,
        queries % chosen.BLOCK_M == 0, kv_index is not None, compute_type(q),
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    size = keys * total
    launch(
        attention_cross_sum_kernel, (triton.cdiv(size, SUM_BLOCK), prompts), k,
        dk_part, dv_part, dk, dv, kv_index, rows, chunks, size, SUM_BLOCK, kv_index is not None, compute_type(q),
    )  # fmt: skip
    return dq, dk, dv
