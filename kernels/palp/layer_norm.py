"""layer_norm: y = weight (x - mean) rstd + bias over rows; the backward pass needs rstd and either x and mean, or y.

    dx = rstd (dxhat - average(dxhat) - xhat average(dxhat xhat)),   dxhat = weight dy

A block holds whole rows. Reference: palp_fast/reference/layer_norm.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from palp_fast.kernels.launch import compute_type, contiguous, launch, settings
from palp_fast.reference.dtypes import compute_dtype


@dataclass(frozen=True)
class Launch:
    """Sizes in elements, those masked off included."""

    TILE: int = 4096  # of a block, if rows are short
    PER_WARP: int = 512  # that a warp holds of it


LAUNCHES = {"generic": Launch()}


@triton.jit
def _tile(rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column numbers of this block's tile, and which rows, columns and elements exist."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_n = tl.arange(0, BLOCK_N)[None, :]
    return o_m, o_n, o_m < rows, o_n < width, (o_m < rows) & (o_n < width)


@triton.jit
def _column_values(p, o_n, m_n, absent: tl.constexpr, COMPUTE: tl.constexpr):
    """Weights or biases [1, N], or `absent` where there are none."""
    if p is None:
        return tl.full(o_n.shape, absent, COMPUTE)
    else:
        # Columns that do not exist get a 1: divided by, it makes no NaN.
        return tl.load(p + o_n, m_n, other=1).to(COMPUTE)


@triton.jit
def layer_norm_fwd_kernel(
    x_p, weight_p, bias_p, y_p, mean_p, rstd_p, rows, width, eps, x_s,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr,
):
    """x [rows, width] with rows x_s elements apart -> y contiguous, mean and rstd [rows]."""
    o_m, o_n, m_m, m_n, m_tile = _tile(rows, width, BLOCK_M, BLOCK_N)
    b_x = tl.load(x_p + o_m * x_s + o_n, m_tile, other=0).to(COMPUTE)
    b_mean = tl.sum(b_x, 1, keep_dims=True) / width
    b_x = tl.where(m_tile, b_x - b_mean, 0)
    b_rstd = 1 / tl.sqrt(tl.sum(b_x * b_x, 1, keep_dims=True) / width + eps)
    tl.store(mean_p + o_m, b_mean, m_m)
    tl.store(rstd_p + o_m, b_rstd, m_m)
    b_weight = _column_values(weight_p, o_n, m_n, 1, COMPUTE)
    b_bias = _column_values(bias_p, o_n, m_n, 0, COMPUTE)
    b_y = b_x * b_rstd * b_weight + b_bias
    tl.store(y_p + o_m * width + o_n, b_y.to(y_p.dtype.element_ty), m_tile)


@triton.jit
def layer_norm_bwd_kernel(
    dy_p, kept_p, weight_p, bias_p, mean_p, rstd_p, dx_p, rows, width, dy_s, kept_s,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr,
):
    """dy, kept [rows, width], rows dy_s and kept_s elements apart -> dx contiguous; kept is y where mean_p is None."""
    o_m, o_n, m_m, m_n, m_tile = _tile(rows, width, BLOCK_M, BLOCK_N)
    b_d = tl.load(dy_p + o_m * dy_s + o_n, m_tile, other=0).to(COMPUTE)
    b_xhat = tl.load(kept_p + o_m * kept_s + o_n, m_tile, other=0).to(COMPUTE)
    b_rstd = tl.load(rstd_p + o_m, m_m, other=0)
    b_weight = _column_values(weight_p, o_n, m_n, 1, COMPUTE)
    if mean_p is None:
        b_xhat = (b_xhat - _column_values(bias_p, o_n, m_n, 0, COMPUTE)) / b_weight
    else:
        b_xhat = (b_xhat - tl.load(mean_p + o_m, m_m, other=0)) * b_rstd
    b_d *= b_weight
    b_average = tl.sum(b_d, 1, keep_dims=True) / width
    b_slope = tl.sum(b_d * b_xhat, 1, keep_dims=True) / width
    b_dx = b_rstd * (b_d - b_average - b_xhat * b_slope)
    tl.store(dx_p + o_m * width + o_n, b_dx.to(dx_p.dtype.element_ty), m_tile)


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, from_output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., d] -> (y in its dtype, contiguous, mean, rstd [...]); from_output is the backward pass's concern."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=compute_dtype([x]), device=x.device) for _ in range(2))
    flat = _rows(x)
    given = flat, *contiguous(weight, bias)
    _launch(layer_norm_fwd_kernel, flat, *given, y, mean, rstd, *flat.shape, eps, flat.stride(0))
    return y, mean, rstd


def layer_norm_bwd(
    grad: Tensor, kept: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Gradient to x; kept: x, or y where mean is None."""
    dx = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
    grad, kept = _rows(grad), _rows(kept)
    given = grad, kept, *contiguous(weight, bias, mean, rstd)
    _launch(layer_norm_bwd_kernel, kept, *given, dx, *kept.shape, grad.stride(0), kept.stride(0))
    return dx


def _rows(x: Tensor) -> Tensor:
    """[rows, d] with neighbouring columns: a view where strides allow it."""
    flat = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _launch(kernel, like: Tensor, *args) -> None:
    rows, width = like.shape
    chosen, block_n = settings(LAUNCHES, like.device), triton.next_power_of_2(width)
    block_m = max(1, chosen.TILE // block_n)
    warps = min(16, max(1, block_m * block_n // chosen.PER_WARP))
    launch(kernel, (triton.cdiv(rows, block_m),), like, *args, BLOCK_M=block_m, BLOCK_N=block_n,
           COMPUTE=compute_type(like), num_warps=warps)
