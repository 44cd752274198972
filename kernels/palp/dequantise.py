"""dequantise: a weight's matrix from int8 or NF4 codes and their scales, one pass.

    w = code scale,   w = level[code] scale,   in fp32, rounded once

Reference: palp_fast/reference/quantised.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from palp_fast.kernels.launch import launch, settings
from palp_fast.reference.quantised import BLOCK, nf4_levels


@dataclass(frozen=True)
class Launch:
    """Rows and columns of a tile of the matrix, warps of a block."""

    BLOCK_M: int = 4
    BLOCK_N: int = 512
    num_warps: int = 4


LAUNCHES = {"generic": Launch()}
_levels = lru_cache(maxsize=None)(nf4_levels)


@triton.jit
def _rows_and_columns(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row numbers [BLOCK_M, 1] and column numbers [1, BLOCK_N] of this block's tile."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    return o_m, tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def dequantise_int8_kernel(codes_p, scale_p, out_p, rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """codes int8 [rows, width], scale fp32 [rows] -> out [rows, width], all contiguous."""
    o_m, o_n = _rows_and_columns(BLOCK_M, BLOCK_N)
    m_tile = (o_m < rows) & (o_n < width)
    b_scale = tl.load(scale_p + o_m, o_m < rows)
    b_w = tl.load(codes_p + o_m * width + o_n, m_tile).to(tl.float32) * b_scale
    tl.store(out_p + o_m * width + o_n, b_w.to(out_p.dtype.element_ty), m_tile)


@triton.jit
def dequantise_nf4_kernel(
    codes_p, scale_p, levels_p, out_p, rows, width, blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, QUANTISED: tl.constexpr,
):
    """codes [rows, blocks QUANTISED / 2] bytes, scale fp32 [rows, blocks], levels fp32 [16] -> out [rows, width].

    All contiguous. The half of a byte with the higher value is the first number. QUANTISED: numbers of a scale.
    """
    o_m, o_n = _rows_and_columns(BLOCK_M, BLOCK_N)
    o_byte = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[None, :]
    m_byte = (o_m < rows) & (2 * o_byte < width)
    b_byte = tl.load(codes_p + o_m * (blocks * (QUANTISED // 2)) + o_byte, m_byte, other=0).to(tl.int32)
    b_scale = tl.load(scale_p + o_m * blocks + o_byte // (QUANTISED // 2), m_byte)
    b_first = tl.load(levels_p + (b_byte >> 4)) * b_scale
    b_second = tl.load(levels_p + (b_byte & 15)) * b_scale
    b_w = tl.interleave(b_first, b_second)
    tl.store(out_p + o_m * width + o_n, b_w.to(out_p.dtype.element_ty), (o_m < rows) & (o_n < width))


def dequantise_rows(codes: Tensor, scale: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The matrix [d_out, width]."""
    codes, scale = codes.contiguous(), scale.contiguous()
    rows, out = codes.shape[0], codes.new_empty((codes.shape[0], width), dtype=dtype)
    chosen = settings(LAUNCHES, codes.device)
    grid = triton.cdiv(rows, chosen.BLOCK_M), triton.cdiv(width, chosen.BLOCK_N)
    tile = chosen.BLOCK_M, chosen.BLOCK_N
    if codes.dtype == torch.int8:
        launch(dequantise_int8_kernel, grid, out, codes, scale, out, rows, width, *tile, num_warps=chosen.num_warps)
    else:
        launch(dequantise_nf4_kernel, grid, out, codes, scale, _levels(codes.device), out, rows, width,
               scale.shape[1], *tile, BLOCK, num_warps=chosen.num_warps)
    return out
