"""group_norm_silu backward, to x alone, from x and the statistics.

    dx = rstd (dxhat - average(dxhat) - xhat average(dxhat xhat)) over each group,   dxhat = weight dz

One pass or two, as the forward pass (group_norm.py). Reference: palp_fast/reference/group_norm.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from palp_fast.kernels.group_norm_tile import LAUNCHES, channel_values, flat, group_sum, launch_tiles, place, plan
from palp_fast.kernels.group_norm_tile import start, tile
from palp_fast.kernels.launch import compute_type, contiguous, settings
from palp_fast.reference.layout import channels_last, empty_in_layout_of, in_layout


@triton.jit
def _d_xhat(b_dy, b_xhat, b_weight, b_bias, SILU: tl.constexpr):
    b_dz = b_dy
    if SILU:
        b_z = b_xhat * b_weight + b_bias
        b_gate = 1 / (1 + tl.exp(-b_z))
        b_dz = b_dy * b_gate * (1 + b_z * (1 - b_gate))
    return b_dz * b_weight


@triton.jit
def _statistics(mean_p, rstd_p, i_b, o_g, groups):
    m_g = o_g < groups
    return tl.load(mean_p + i_b * groups + o_g, m_g, other=0), tl.load(rstd_p + i_b * groups + o_g, m_g, other=0)


@triton.jit
def group_norm_bwd_kernel(
    dy_p, x_p, weight_p, bias_p, mean_p, rstd_p, dx_p, groups, pixels, blocks,
    dy_sb, dy_sc, dy_sp, x_sb, x_sc, x_sp, dx_sb, dx_sc, dx_sp,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    SILU: tl.constexpr, COMPUTE: tl.constexpr,
):
    """dy, x [B, groups WIDTH, pixels], mean and rstd [B, groups] -> dx; strides in elements."""
    i_g, i_p, i_b = place(blocks, 1)
    o_p, o_g, o_c, m_c = tile(i_g, groups, BLOCK_P, BLOCK_G, BLOCK_D, WIDTH)
    m_tile = m_c & (o_p < pixels)
    channel, count = i_g * BLOCK_G * WIDTH, pixels * WIDTH
    b_mean, b_rstd = _statistics(mean_p, rstd_p, i_b, o_g, groups)
    b_weight = channel_values(weight_p, channel, o_c, m_c, 1, COMPUTE)
    b_bias = channel_values(bias_p, channel, o_c, m_c, 0, COMPUTE)
    p_x = start(x_p, i_b, i_p, channel, x_sb, x_sc, x_sp) + o_p * x_sp + o_c * x_sc
    p_dy = start(dy_p, i_b, i_p, channel, dy_sb, dy_sc, dy_sp) + o_p * dy_sp + o_c * dy_sc
    b_xhat = (tl.load(p_x, m_tile, other=0).to(COMPUTE) - b_mean) * b_rstd
    b_d = _d_xhat(tl.load(p_dy, m_tile, other=0).to(COMPUTE), b_xhat, b_weight, b_bias, SILU)
    b_average, b_slope = group_sum(b_d) / count, group_sum(b_d * b_xhat) / count
    b_dx = b_rstd * (b_d - b_average - b_xhat * b_slope)
    p_dx = start(dx_p, i_b, i_p, channel, dx_sb, dx_sc, dx_sp) + o_p * dx_sp + o_c * dx_sc
    tl.store(p_dx, b_dx.to(dx_p.dtype.element_ty), m_tile)


@triton.jit
def group_norm_bwd_sums_kernel(
    dy_p, x_p, weight_p, bias_p, mean_p, rstd_p, sum_p, slope_p, groups, pixels, blocks, chunk, chunks,
    dy_sb, dy_sc, dy_sp, x_sb, x_sc, x_sp,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    SILU: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Of each chunk and group: the sums of dxhat and of dxhat xhat, [B, groups, chunks] each."""
    i_g, i_s, i_b = place(blocks, chunks)
    o_p, o_g, o_c, m_c = tile(i_g, groups, BLOCK_P, BLOCK_G, BLOCK_D, WIDTH)
    channel, first = i_g * BLOCK_G * WIDTH, i_s * chunk
    b_mean, b_rstd = _statistics(mean_p, rstd_p, i_b, o_g, groups)
    b_weight = channel_values(weight_p, channel, o_c, m_c, 1, COMPUTE)
    b_bias = channel_values(bias_p, channel, o_c, m_c, 0, COMPUTE)
    p_x = start(x_p, i_b, first, channel, x_sb, x_sc, x_sp)
    p_dy = start(dy_p, i_b, first, channel, dy_sb, dy_sc, dy_sp)
    b_sum = tl.zeros([BLOCK_P, BLOCK_G, BLOCK_D], COMPUTE)
    b_slope = tl.zeros([BLOCK_P, BLOCK_G, BLOCK_D], COMPUTE)
    for pixel in range(first, tl.minimum(first + chunk, pixels), BLOCK_P):
        m_tile = m_c & (pixel + o_p < pixels)
        b_x = tl.load(p_x + o_p * x_sp + o_c * x_sc, m_tile, other=0).to(COMPUTE)
        b_dy = tl.load(p_dy + o_p * dy_sp + o_c * dy_sc, m_tile, other=0).to(COMPUTE)
        b_xhat = (b_x - b_mean) * b_rstd
        b_d = _d_xhat(b_dy, b_xhat, b_weight, b_bias, SILU)
        b_sum += b_d
        b_slope += b_d * b_xhat
        p_x += BLOCK_P * x_sp
        p_dy += BLOCK_P * dy_sp
    o_out = (i_b * groups + o_g) * chunks + i_s
    tl.store(sum_p + o_out, group_sum(b_sum), o_g < groups)
    tl.store(slope_p + o_out, group_sum(b_slope), o_g < groups)


@triton.jit
def group_norm_bwd_apply_kernel(
    dy_p, x_p, weight_p, bias_p, mean_p, rstd_p, sum_p, slope_p, dx_p, groups, pixels, blocks, chunk, chunks,
    dy_sb, dy_sc, dy_sp, x_sb, x_sc, x_sp, dx_sb, dx_sc, dx_sp,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    SILU: tl.constexpr, COMPUTE: tl.constexpr,
):
    """dx, from what group_norm_bwd_sums_kernel found of each chunk."""
    # From the end: what the first pass read last may still be in the cache.
    i_g, i_s, i_b = place(blocks, chunks, FROM_END=True)
    o_p, o_g, o_c, m_c = tile(i_g, groups, BLOCK_P, BLOCK_G, BLOCK_D, WIDTH)
    channel, first, count = i_g * BLOCK_G * WIDTH, i_s * chunk, pixels * WIDTH
    o_s = tl.arange(0, BLOCK_S)[:, None, None]
    m_in = (o_s < chunks) & (o_g < groups)
    o_in = (i_b * groups + o_g) * chunks + o_s
    b_average = tl.sum(tl.load(sum_p + o_in, m_in, other=0), 0, keep_dims=True) / count
    b_slope = tl.sum(tl.load(slope_p + o_in, m_in, other=0), 0, keep_dims=True) / count
    b_mean, b_rstd = _statistics(mean_p, rstd_p, i_b, o_g, groups)
    b_weight = channel_values(weight_p, channel, o_c, m_c, 1, COMPUTE)
    b_bias = channel_values(bias_p, channel, o_c, m_c, 0, COMPUTE)
    p_x = start(x_p, i_b, first, channel, x_sb, x_sc, x_sp)
    p_dy = start(dy_p, i_b, first, channel, dy_sb, dy_sc, dy_sp)
    p_dx = start(dx_p, i_b, first, channel, dx_sb, dx_sc, dx_sp)
    for pixel in range(first, tl.minimum(first + chunk, pixels), BLOCK_P):
        m_tile = m_c & (pixel + o_p < pixels)
        b_x = tl.load(p_x + o_p * x_sp + o_c * x_sc, m_tile, other=0).to(COMPUTE)
        b_dy = tl.load(p_dy + o_p * dy_sp + o_c * dy_sc, m_tile, other=0).to(COMPUTE)
        b_xhat = (b_x - b_mean) * b_rstd
        b_d = _d_xhat(b_dy, b_xhat, b_weight, b_bias, SILU)
        b_dx = b_rstd * (b_d - b_average - b_xhat * b_slope)
        tl.store(p_dx + o_p * dx_sp + o_c * dx_sc, b_dx.to(dx_p.dtype.element_ty), m_tile)
        p_x += BLOCK_P * x_sp
        p_dy += BLOCK_P * dy_sp
        p_dx += BLOCK_P * dx_sp


def group_norm_silu_bwd(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, silu: bool
) -> Tensor:
    """Gradient to x, in its dtype and layout."""
    dx = empty_in_layout_of(x)
    if x.numel() == 0:
        return dx
    if channels_last(grad) != channels_last(x):  # right either way, but neighbours in memory would be read far apart
        grad = in_layout(grad, channels_last(x))
    groups = mean.shape[1]
    grad, x, out, compute = flat(grad), flat(x), flat(dx), compute_type(x)
    laid = plan(x, groups, held=2)
    given, sizes = (grad, x, *contiguous(weight, bias, mean, rstd)), (groups, x.shape[2], laid.blocks)
    strides = (*grad.stride(), *x.stride(), *out.stride())
    if laid.chunks == 0:
        launch_tiles(group_norm_bwd_kernel, laid, x, groups, *given, out, *sizes, *strides, SILU=silu, COMPUTE=compute)
        return dx
    sums = torch.empty((2, *mean.shape, laid.chunks), dtype=mean.dtype, device=x.device)
    sizes = (*sizes, laid.chunk, laid.chunks)
    launch_tiles(group_norm_bwd_sums_kernel, laid, x, groups, *given, *sums, *sizes, *strides[:6], SILU=silu,
                 COMPUTE=compute)
    launch_tiles(group_norm_bwd_apply_kernel, laid, x, groups, *given, *sums, out, *sizes, *strides,
                 BLOCK_S=settings(LAUNCHES, x.device).CHUNKS, SILU=silu, COMPUTE=compute)
    return dx
