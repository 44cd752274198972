"""group_norm_silu forward: y = z sigmoid(z), z = weight (x - mean) rstd + bias, statistics in fp32.

Where all pixels of a group fit on chip, one pass. Else each chunk of pixels gives its moments, and a second pass adds
the chunks up in their order and writes y. Reference: palp_fast/reference/group_norm.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from palp_fast.kernels.group_norm_tile import LAUNCHES, channel_values, flat, group_sum, launch_tiles, place, plan
from palp_fast.kernels.group_norm_tile import start, tile
from palp_fast.kernels.launch import compute_type, contiguous, settings
from palp_fast.reference.dtypes import compute_dtype
from palp_fast.reference.layout import empty_in_layout_of


@triton.jit
def _output(b_xhat, b_weight, b_bias, SILU: tl.constexpr):
    b_z = b_xhat * b_weight + b_bias
    if SILU:
        b_z = b_z / (1 + tl.exp(-b_z))
    return b_z


@triton.jit
def group_norm_fwd_kernel(
    x_p, weight_p, bias_p, y_p, mean_p, rstd_p, groups, pixels, blocks, eps, x_sb, x_sc, x_sp, y_sb, y_sc, y_sp,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    SILU: tl.constexpr, COMPUTE: tl.constexpr,
):
    """x [B, groups WIDTH, pixels] -> y, mean and rstd [B, groups]; strides in elements."""
    i_g, i_p, i_b = place(blocks, 1)
    o_p, o_g, o_c, m_c = tile(i_g, groups, BLOCK_P, BLOCK_G, BLOCK_D, WIDTH)
    m_tile = m_c & (o_p < pixels)
    channel, count = i_g * BLOCK_G * WIDTH, pixels * WIDTH
    p_x = start(x_p, i_b, i_p, channel, x_sb, x_sc, x_sp) + o_p * x_sp + o_c * x_sc
    b_x = tl.load(p_x, m_tile, other=0).to(COMPUTE)
    b_mean = group_sum(b_x) / count
    b_x = tl.where(m_tile, b_x - b_mean, 0)
    b_rstd = 1 / tl.sqrt(group_sum(b_x * b_x) / count + eps)
    tl.store(mean_p + i_b * groups + o_g, b_mean, o_g < groups)
    tl.store(rstd_p + i_b * groups + o_g, b_rstd, o_g < groups)
    b_weight = channel_values(weight_p, channel, o_c, m_c, 1, COMPUTE)
    b_bias = channel_values(bias_p, channel, o_c, m_c, 0, COMPUTE)
    b_y = _output(b_x * b_rstd, b_weight, b_bias, SILU)
    p_y = start(y_p, i_b, i_p, channel, y_sb, y_sc, y_sp) + o_p * y_sp + o_c * y_sc
    tl.store(p_y, b_y.to(y_p.dtype.element_ty), m_tile)


@triton.jit
def group_norm_moments_kernel(
    x_p, chunk_mean_p, chunk_square_p, groups, pixels, blocks, chunk, chunks, x_sb, x_sc, x_sp,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Of each chunk and group: the mean, and the sum of squared deviations from it, [B, groups, chunks] each."""
    i_g, i_s, i_b = place(blocks, chunks)
    o_p, o_g, o_c, m_c = tile(i_g, groups, BLOCK_P, BLOCK_G, BLOCK_D, WIDTH)
    first = i_s * chunk
    last = tl.minimum(first + chunk, pixels)
    p_x = start(x_p, i_b, first, i_g * BLOCK_G * WIDTH, x_sb, x_sc, x_sp)
    # Deviations from the first pixel's values: sums of squares of x itself would cancel where means are large.
    b_shift = tl.load(p_x + o_c * x_sc, m_c, other=0).to(COMPUTE)
    b_sum = tl.zeros([BLOCK_P, BLOCK_G, BLOCK_D], COMPUTE)
    b_square = tl.zeros([BLOCK_P, BLOCK_G, BLOCK_D], COMPUTE)
    for pixel in range(first, last, BLOCK_P):
        m_tile = m_c & (pixel + o_p < pixels)
        b_x = tl.load(p_x + o_p * x_sp + o_c * x_sc, m_tile, other=0).to(COMPUTE)
        b_x = tl.where(m_tile, b_x - b_shift, 0)
        b_sum += b_x
        b_square += b_x * b_x
        p_x += BLOCK_P * x_sp
    count = last - first
    b_sum = tl.sum(b_sum, 0, keep_dims=True)
    b_channel = b_shift + b_sum / count
    b_mean = tl.sum(b_channel, 2, keep_dims=True) / WIDTH
    b_between = tl.where(m_c, b_channel - b_mean, 0)
    b_within = tl.sum(b_square, 0, keep_dims=True) - b_sum * b_sum / count
    b_square_sum = tl.sum(b_within + count * b_between * b_between, 2, keep_dims=True)
    o_out = (i_b * groups + o_g) * chunks + i_s
    tl.store(chunk_mean_p + o_out, b_mean, o_g < groups)
    tl.store(chunk_square_p + o_out, b_square_sum, o_g < groups)


@triton.jit
def group_norm_apply_kernel(
    x_p, weight_p, bias_p, chunk_mean_p, chunk_square_p, y_p, mean_p, rstd_p, groups, pixels, blocks, chunk, chunks,
    eps, x_sb, x_sc, x_sp, y_sb, y_sc, y_sp,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    SILU: tl.constexpr, COMPUTE: tl.constexpr,
):
    """y, mean and rstd as group_norm_fwd_kernel, from what group_norm_moments_kernel found of each chunk."""
    # From the end: what the first pass read last may still be in the cache.
    i_g, i_s, i_b = place(blocks, chunks, FROM_END=True)
    o_p, o_g, o_c, m_c = tile(i_g, groups, BLOCK_P, BLOCK_G, BLOCK_D, WIDTH)
    o_s = tl.arange(0, BLOCK_S)[:, None, None]
    m_in = (o_s < chunks) & (o_g < groups)
    o_in = (i_b * groups + o_g) * chunks + o_s
    b_chunk = tl.load(chunk_mean_p + o_in, m_in, other=0)
    b_share = tl.minimum(chunk, pixels - o_s * chunk).to(COMPUTE) / pixels
    b_mean = tl.sum(b_chunk * b_share, 0, keep_dims=True)
    b_between = tl.where(m_in, b_chunk - b_mean, 0)
    b_square = tl.load(chunk_square_p + o_in, m_in, other=0) / (pixels * WIDTH) + b_share * b_between * b_between
    b_rstd = 1 / tl.sqrt(tl.sum(b_square, 0, keep_dims=True) + eps)
    tl.store(mean_p + i_b * groups + o_g, b_mean, (o_g < groups) & (i_s == 0))
    tl.store(rstd_p + i_b * groups + o_g, b_rstd, (o_g < groups) & (i_s == 0))
    channel, first = i_g * BLOCK_G * WIDTH, i_s * chunk
    b_weight = channel_values(weight_p, channel, o_c, m_c, 1, COMPUTE)
    b_bias = channel_values(bias_p, channel, o_c, m_c, 0, COMPUTE)
    p_x = start(x_p, i_b, first, channel, x_sb, x_sc, x_sp)
    p_y = start(y_p, i_b, first, channel, y_sb, y_sc, y_sp)
    for pixel in range(first, tl.minimum(first + chunk, pixels), BLOCK_P):
        m_tile = m_c & (pixel + o_p < pixels)
        b_x = tl.load(p_x + o_p * x_sp + o_c * x_sc, m_tile, other=0).to(COMPUTE)
        b_y = _output((b_x - b_mean) * b_rstd, b_weight, b_bias, SILU)
        tl.store(p_y + o_p * y_sp + o_c * y_sc, b_y.to(y_p.dtype.element_ty), m_tile)
        p_x += BLOCK_P * x_sp
        p_y += BLOCK_P * y_sp


def group_norm_silu_fwd(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, C, ...] -> (y in its dtype and layout, mean, rstd [B, groups])."""
    make, dtype = torch.empty if x.numel() else torch.zeros, compute_dtype([x])
    y = empty_in_layout_of(x)
    mean, rstd = (make((x.shape[0], groups), dtype=dtype, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return y, mean, rstd
    x, out, compute = flat(x), flat(y), compute_type(x)
    weight, bias = contiguous(weight, bias)
    laid = plan(x, groups, held=1)
    sizes, strides = (groups, x.shape[2], laid.blocks), (*x.stride(), *out.stride())
    if laid.chunks == 0:
        launch_tiles(group_norm_fwd_kernel, laid, x, groups, x, weight, bias, out, mean, rstd, *sizes, eps, *strides,
                     SILU=silu, COMPUTE=compute)
        return y, mean, rstd
    moments = torch.empty((2, x.shape[0], groups, laid.chunks), dtype=dtype, device=x.device)
    sizes = (*sizes, laid.chunk, laid.chunks)
    launch_tiles(group_norm_moments_kernel, laid, x, groups, x, *moments, *sizes, *x.stride(), COMPUTE=compute)
    launch_tiles(group_norm_apply_kernel, laid, x, groups, x, weight, bias, *moments, out, mean, rstd, *sizes, eps,
                 *strides, BLOCK_S=settings(LAUNCHES, x.device).CHUNKS, SILU=silu, COMPUTE=compute)
    return y, mean, rstd
