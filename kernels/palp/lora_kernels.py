"""The kernels of LoRA projections: one to three projections of one input x, each with its own A and B.

    forward     y = x W^T + bias + s (x A^T) B^T + residual,   s a factor per row
    low         low = s x A^T,  d_low = s dy B
    backward    dx = sum (dy W + d_low A),   dA = d_low^T x,   dB = dy^T low

Products of the low-rank term have 32-bit operands (TF32 for 16-bit inputs): fp16 would lose a small B, and small
gradients, to underflow; x and dy are exact in it. x A^T alone reads A in the dtype of x, as its shadow is.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pick(i, p_1, p_2, p_3):
    return tl.where(i == 0, p_1, tl.where(i == 1, p_2, p_3))


@triton.jit
def _nearest(b_value, PRECISION: tl.constexpr):
    """The operand of a TF32 product, rounded to nearest: the hardware would cut it off."""
    if PRECISION == "tf32":
        b_bits = (b_value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        b_value = tl.where(b_value == b_value, b_bits.to(tl.float32, bitcast=True), b_value)
    return b_value


@triton.jit
def _strength(gate_p, o_m, m_m, sample, scale, COMPUTE: tl.constexpr):
    """The factor of the low-rank term of each row, [BLOCK_M, 1]."""
    if gate_p is None:
        b_strength = tl.full(o_m.shape, 1, COMPUTE)
    else:
        b_strength = tl.load(gate_p + o_m // sample, m_m, other=0).to(COMPUTE)
    return b_strength * scale


@triton.jit
def _rows(i_m, rows, BLOCK_M: tl.constexpr):
    """Numbers of a tile's rows, [BLOCK_M, 1], and which of them exist."""
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    return o_m, o_m < rows


@triton.jit
def lora_fwd_kernel(
    x_p, weight_p, a_1, a_2, a_3, b_1, b_2, b_3, bias_p, residual_p, gate_p, low_p, y_1, y_2, y_3,
    rows, sample, d_in, d_out, rank, scale, stride_x, stride_residual,
    COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):
    """x [rows, d_in], weight [COUNT d_out, d_in], a [rank, d_in], b [d_out, rank] -> y [rows, d_out] each.

    low [rows, COUNT rank], scaled; None: made here from the tiles of x that the frozen product reads, rank <= BLOCK_R.
    """
    tiles = tl.cdiv(d_out, BLOCK_N)
    i_m, i_n = tl.program_id(0) // (COUNT * tiles), tl.program_id(0) % (COUNT * tiles)
    i_y, i_n = i_n // tiles, i_n % tiles
    o_m, m_m = _rows(i_m, rows, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    m_n = o_n < d_out
    o_k, o_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)[None, :]
    p_x = x_p + o_m * stride_x + o_k[None, :]
    p_w = weight_p + (i_y * d_out + o_n).to(tl.int64) * d_in + o_k[:, None]
    p_a = _pick(i_y, a_1, a_2, a_3) + o_r * d_in + o_k[:, None]
    b_y = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    b_low = tl.zeros([BLOCK_M, BLOCK_R], COMPUTE)
    for k in range(0, d_in, BLOCK_K):
        b_x = tl.load(p_x + k, m_m & (o_k[None, :] < d_in - k), other=0)
        b_w = tl.load(p_w + k, m_n & (o_k[:, None] < d_in - k), other=0).to(b_x.dtype)
        b_y = tl.dot(b_x, b_w, b_y, input_precision="ieee")
        if low_p is None:
            b_a = tl.load(p_a + k, (o_r < rank) & (o_k[:, None] < d_in - k), other=0).to(b_x.dtype)
            b_low = tl.dot(b_x, b_a, b_low, input_precision="ieee")
    p_b = _pick(i_y, b_1, b_2, b_3) + o_n * rank
    o_r_down = tl.arange(0, BLOCK_R)[:, None]
    if low_p is None:
        b_low = _nearest(b_low * _strength(gate_p, o_m, m_m, sample, scale, COMPUTE), PRECISION)
        b_b = tl.load(p_b + o_r_down, m_n & (o_r_down < rank), other=0).to(COMPUTE)
        b_y = tl.dot(b_low, _nearest(b_b, PRECISION), b_y, input_precision=PRECISION)
    else:
        p_low = low_p + o_m * COUNT * rank + i_y * rank + o_r
        for r in tl.range(0, rank, BLOCK_R, num_stages=1):
            b_low = tl.load(p_low + r, m_m & (o_r < rank - r), other=0)
            b_b = tl.load(p_b + r + o_r_down, m_n & (o_r_down < rank - r), other=0).to(COMPUTE)
            b_y = tl.dot(b_low, _nearest(b_b, PRECISION), b_y, input_precision=PRECISION)
    if bias_p is not None:
        b_y += tl.load(bias_p + o_n, m_n, other=0).to(COMPUTE)
    if residual_p is not None:
        b_y += tl.load(residual_p + o_m * stride_residual + o_n, m_m & m_n, other=0).to(COMPUTE)
    p_y = _pick(i_y, y_1, y_2, y_3)
    tl.store(p_y + o_m * d_out + o_n, b_y.to(p_y.dtype.element_ty), m_m & m_n)


@triton.jit
def lora_low_kernel(
    x_p, dy_1, dy_2, dy_3, a_1, a_2, a_3, b_1, b_2, b_3, gate_p, low_p, d_low_p,
    rows, sample, d_in, d_out, rank, scale, stride_x,
    COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):
    """x [rows, d_in], dy [rows, d_out] each -> low and d_low [rows, COUNT rank], scaled; d_low None: low alone."""
    tiles = COUNT * tl.cdiv(rank, BLOCK_R)
    sides: tl.constexpr = 1 if d_low_p is None else 2
    i_m, i_t = tl.program_id(0) // (sides * tiles), tl.program_id(0) % (sides * tiles)
    i_y, i_r = i_t % COUNT, i_t % tiles // COUNT
    o_m, m_m = _rows(i_m, rows, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    m_r = o_r < rank
    o_k = tl.arange(0, BLOCK_K)
    b_low = tl.zeros([BLOCK_M, BLOCK_R], COMPUTE)
    p_out = low_p
    if i_t < tiles:
        p_x = x_p + o_m * stride_x + o_k[None, :]
        p_a = _pick(i_y, a_1, a_2, a_3) + o_r * d_in + o_k[:, None]
        for k in range(0, d_in, BLOCK_K):
            b_x = tl.load(p_x + k, m_m & (o_k[None, :] < d_in - k), other=0)
            b_a = tl.load(p_a + k, m_r & (o_k[:, None] < d_in - k), other=0).to(b_x.dtype)
            b_low = tl.dot(b_x, b_a, b_low, input_precision="ieee")
    else:
        if d_low_p is not None:
            p_out = d_low_p
            p_dy = _pick(i_y, dy_1, dy_2, dy_3) + o_m * d_out + o_k[None, :]
            p_b = _pick(i_y, b_1, b_2, b_3) + o_k[:, None] * rank + o_r
            for k in range(0, d_out, BLOCK_K):
                b_dy = tl.load(p_dy + k, m_m & (o_k[None, :] < d_out - k), other=0).to(COMPUTE)
                b_b = tl.load(p_b + k * rank, m_r & (o_k[:, None] < d_out - k), other=0).to(COMPUTE)
                b_low = tl.dot(b_dy, _nearest(b_b, PRECISION), b_low, input_precision=PRECISION)
    b_low = _nearest(b_low * _strength(gate_p, o_m, m_m, sample, scale, COMPUTE), PRECISION)
    tl.store(p_out + o_m * COUNT * rank + i_y * rank + o_r, b_low, m_m & m_r)


@triton.jit
def _input_gradient(
    pid, dy_1, dy_2, dy_3, weight_p, a_1, a_2, a_3, d_low_p, dx_p, rows, d_in, d_out, rank,
    COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):
    """A tile of dx [rows, d_in]: the products of all projections in one accumulator."""
    tiles = tl.cdiv(d_in, BLOCK_N)
    i_m, i_n = pid // tiles, pid % tiles
    o_m, m_m = _rows(i_m, rows, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    m_n = o_n < d_in
    o_k, o_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    b_dx = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    for i in tl.range(0, COUNT, num_stages=1):
        p_dy = _pick(i, dy_1, dy_2, dy_3) + o_m * d_out + o_k[None, :]
        p_w = weight_p + (i * d_out + o_k[:, None]).to(tl.int64) * d_in + o_n
        for k in range(0, d_out, BLOCK_K):
            b_dy = tl.load(p_dy + k, m_m & (o_k[None, :] < d_out - k), other=0)
            b_w = tl.load(p_w + k * d_in, m_n & (o_k[:, None] < d_out - k), other=0).to(b_dy.dtype)
            b_dx = tl.dot(b_dy, b_w, b_dx, input_precision="ieee")
        p_low = d_low_p + o_m * COUNT * rank + i * rank + o_r[None, :]
        p_a = _pick(i, a_1, a_2, a_3) + o_r[:, None] * d_in + o_n
        for r in tl.range(0, rank, BLOCK_R, num_stages=1):
            b_low = tl.load(p_low + r, m_m & (o_r[None, :] < rank - r), other=0)
            b_a = tl.load(p_a + r * d_in, m_n & (o_r[:, None] < rank - r), other=0).to(COMPUTE)
            b_dx = tl.dot(b_low, _nearest(b_a, PRECISION), b_dx, input_precision=PRECISION)
    tl.store(dx_p + o_m * d_in + o_n, b_dx.to(dx_p.dtype.element_ty), m_m & m_n)


@triton.jit
def _factor_gradients(
    pid, x_p, dy_1, dy_2, dy_3, low_p, d_low_p, partial_p, rows, d_in, d_out, rank, stride_x, split_rows,
    COUNT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):
    """The share of one range of rows in a tile of dA or of dB^T: partial [splits, COUNT, rank, d_in + d_out]."""
    tiles_x = tl.cdiv(d_in, BLOCK_C)
    columns, ranks = tiles_x + tl.cdiv(d_out, BLOCK_C), tl.cdiv(rank, BLOCK_R)
    i_c, i_t = pid % columns, pid // columns
    i_r, i_t = i_t % ranks, i_t // ranks
    i_y, i_split = i_t % COUNT, i_t // COUNT
    of_a = i_c < tiles_x
    right_p = tl.where(of_a, x_p, _pick(i_y, dy_1, dy_2, dy_3))
    left_p = tl.where(of_a, d_low_p, low_p) + i_y * rank
    stride, width = tl.where(of_a, stride_x, d_out), tl.where(of_a, d_in, d_out)
    o_c = tl.where(of_a, i_c, i_c - tiles_x) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    first = i_split.to(tl.int64) * split_rows
    o_m = first + tl.arange(0, BLOCK_ROWS)
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], COMPUTE)
    for m in range(0, split_rows, BLOCK_ROWS):
        m_m = o_m + m < rows
        p_left = left_p + (o_m + m)[None, :] * COUNT * rank + o_r[:, None]
        b_left = tl.load(p_left, m_m[None, :] & (o_r < rank)[:, None], other=0)
        b_right = tl.load(right_p + (o_m + m)[:, None] * stride + o_c, m_m[:, None] & (o_c < width), other=0)
        b_sum = tl.dot(b_left, b_right.to(COMPUTE), b_sum, input_precision=PRECISION)
    line = ((i_split.to(tl.int64) * COUNT + i_y) * rank + o_r[:, None]) * (d_in + d_out)
    p_partial = partial_p + line + tl.where(of_a, 0, d_in) + o_c
    tl.store(p_partial, b_sum, (o_r < rank)[:, None] & (o_c < width))


@triton.jit
def lora_bwd_kernel(
    x_p, dy_1, dy_2, dy_3, weight_p, a_1, a_2, a_3, low_p, d_low_p, dx_p, partial_p,
    rows, d_in, d_out, rank, stride_x, split_rows, dx_tiles,
    COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):
    """dx [rows, d_in], by the first dx_tiles blocks, beside partial sums of dA and dB; dx None: those alone."""
    pid = tl.program_id(0)
    if dx_p is not None:
        if pid < dx_tiles:
            _input_gradient(pid, dy_1, dy_2, dy_3, weight_p, a_1, a_2, a_3, d_low_p, dx_p, rows, d_in, d_out, rank,
                            COUNT, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, COMPUTE, PRECISION)
    if pid >= dx_tiles:
        _factor_gradients(pid - dx_tiles, x_p, dy_1, dy_2, dy_3, low_p, d_low_p, partial_p, rows, d_in, d_out, rank,
                          stride_x, split_rows, COUNT, BLOCK_K, BLOCK_N, BLOCK_R, COMPUTE, PRECISION)


@triton.jit
def lora_sum_kernel(
    partial_p, da_1, da_2, da_3, db_1, db_2, db_3, splits, d_in, d_out, rank,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):
    """partial [splits, COUNT, rank, d_in + d_out], added in order -> da [rank, d_in] and db [d_out, rank] each."""
    i_y = tl.program_id(1)
    size = rank * (d_in + d_out)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], COMPUTE)
    for i in range(0, splits):
        b_sum += tl.load(partial_p + (i * COUNT + i_y) * size + o, o < size, other=0)
    o_r, o_c = o // (d_in + d_out), o % (d_in + d_out)
    da_p, db_p = _pick(i_y, da_1, da_2, da_3), _pick(i_y, db_1, db_2, db_3)
    tl.store(da_p + o_r * d_in + o_c, b_sum.to(da_p.dtype.element_ty), (o < size) & (o_c < d_in))
    tl.store(db_p + (o_c - d_in) * rank + o_r, b_sum.to(db_p.dtype.element_ty), (o < size) & (o_c >= d_in))
