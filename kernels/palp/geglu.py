"""geglu: y = h gelu(g) for x = [h, g], exact gelu; one pass forward, one backward that needs x alone.

    gelu(g) = g Phi(g),   gelu'(g) = Phi(g) + g phi(g),   Phi the normal distribution, phi its density

Reference: palp_fast/reference/geglu.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from palp_fast.kernels.launch import compute_type, launch, settings


@dataclass(frozen=True)
class Launch:
    """Rows and columns of a tile, warps of a block."""

    BLOCK_M: int = 4
    BLOCK_N: int = 256
    num_warps: int = 4


LAUNCHES = {"generic": Launch()}


@triton.jit
def _tile(rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column numbers of this block's tile, and which of its elements exist."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return o_m, o_n, (o_m < rows) & (o_n < width)


@triton.jit
def _normal_distribution(b_g):
    return 0.5 * (1 + tl.math.erf(b_g * 0.7071067811865476))


@triton.jit
def geglu_fwd_kernel(x_p, y_p, rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr):
    """x [rows, 2 width] -> y [rows, width], both contiguous."""
    o_m, o_n, m_tile = _tile(rows, width, BLOCK_M, BLOCK_N)
    p_h = x_p + o_m * 2 * width + o_n
    b_h = tl.load(p_h, m_tile).to(COMPUTE)
    b_g = tl.load(p_h + width, m_tile).to(COMPUTE)
    b_y = b_h * b_g * _normal_distribution(b_g)
    tl.store(y_p + o_m * width + o_n, b_y.to(y_p.dtype.element_ty), m_tile)


@triton.jit
def geglu_bwd_kernel(
    dy_p, x_p, dx_p, rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr
):
    """dy [rows, width], x [rows, 2 width] -> dx [rows, 2 width], all contiguous."""
    o_m, o_n, m_tile = _tile(rows, width, BLOCK_M, BLOCK_N)
    o_h = o_m * 2 * width + o_n
    b_h = tl.load(x_p + o_h, m_tile).to(COMPUTE)
    b_g = tl.load(x_p + o_h + width, m_tile).to(COMPUTE)
    b_dy = tl.load(dy_p + o_m * width + o_n, m_tile).to(COMPUTE)
    b_below = _normal_distribution(b_g)
    b_density = 0.3989422804014327 * tl.exp(-0.5 * b_g * b_g)
    tl.store(dx_p + o_h, (b_dy * b_g * b_below).to(dx_p.dtype.element_ty), m_tile)
    b_dg = b_dy * b_h * (b_below + b_g * b_density)
    tl.store(dx_p + o_h + width, b_dg.to(dx_p.dtype.element_ty), m_tile)


def geglu_fwd(x: Tensor) -> Tensor:
    """x [..., 2 d] -> y [..., d]."""
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    _launch(geglu_fwd_kernel, y, x, y)
    return y


def geglu_bwd(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient to x."""
    grad, x = grad.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    _launch(geglu_bwd_kernel, grad, grad, x, dx)
    return dx


def _launch(kernel, y: Tensor, *tensors: Tensor) -> None:
    width = y.shape[-1]
    rows = y.numel() // max(1, width)
    chosen = settings(LAUNCHES, y.device)
    grid = (triton.cdiv(rows, chosen.BLOCK_M), triton.cdiv(width, chosen.BLOCK_N))
    launch(kernel, grid, y, *tensors, rows, width, chosen.BLOCK_M, chosen.BLOCK_N, compute_type(y),
           num_warps=chosen.num_warps)
