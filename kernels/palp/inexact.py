"""Products of fewer bits for passes without a gradient: y = x W^T + bias + low B^T, inexact in x W^T alone.

int8: tl.dot of int8 tiles, summed in int32; fp16: tl.dot of fp16 tiles whose sum is fp16, as cards of the GeForce line
multiply at twice the rate, added up in fp32. Reference: palp_fast/reference/inexact.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from palp_fast.kernels.launch import launch, settings
from palp_fast.reference.inexact import TERMS, fp16_linear_ref, int8_linear_ref


@dataclass(frozen=True)
class Launch:
    """Tile of a product, warps and stages of its block.

    FEW_M: rows of a tile where tiles of BLOCK_M rows would be fewer than `blocks`, what keeps the card busy. TERMS: of
    an int8 tile; one of fp16 has those of the reference.
    """

    BLOCK_M: int = 64
    BLOCK_N: int = 64
    TERMS: int = 64
    FEW_M: int = 32
    num_warps: int = 4
    num_stages: int = 2
    blocks: int = 80


@dataclass(frozen=True)
class RowsLaunch:
    """Rows and columns of a tile that quantise_rows reads at a time, warps of a block."""

    BLOCK_M: int = 4
    BLOCK_N: int = 512
    num_warps: int = 4


LAUNCHES: dict[str, Launch | None] = {
    "generic": Launch(),
    "turing": None,  # Triton has no tensor-core product for it
    "consumer": Launch(BLOCK_M=128, FEW_M=64, num_warps=8, num_stages=3, blocks=100),
    "a100": Launch(BLOCK_M=128, TERMS=128, FEW_M=64, num_warps=8, num_stages=3, blocks=108),
    "hopper": Launch(BLOCK_M=128, TERMS=128, FEW_M=64, num_stages=3, blocks=132),
}
ROWS_LAUNCHES = {"generic": RowsLaunch()}
_RANK = 16  # columns of low at a time


@triton.jit
def quantise_rows_kernel(x_p, codes_p, scale_p, rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """x [rows, width] -> codes int8 [rows, width], scale fp32 [rows], contiguous; the second reading is of a cache."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_n = tl.arange(0, BLOCK_N)[None, :]
    b_most = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_bad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, width, BLOCK_N):
        b_x = tl.load(x_p + o_m * width + first + o_n, (o_m < rows) & (first + o_n < width), other=0.0).to(tl.float32)
        b_most = tl.maximum(b_most, tl.abs(b_x))
        b_bad += b_x * 0.0  # nan if x is not finite: maximum would not tell
    b_scale = tl.div_rn(tl.max(b_most, 1) + tl.sum(b_bad, 1), 127.0)[:, None]
    tl.store(scale_p + o_m, b_scale, o_m < rows)
    b_step = tl.where(b_scale > 0, b_scale, 1.0)
    for first in range(0, width, BLOCK_N):
        m_x = (o_m < rows) & (first + o_n < width)
        b_x = tl.load(x_p + o_m * width + first + o_n, m_x, other=0.0).to(tl.float32)
        b_code = tl.div_rn(b_x, tl.broadcast_to(b_step, b_x.shape))
        b_code = tl.minimum(tl.maximum(b_code, -127.0), 127.0)
        b_code = (b_code + 12582912.0) - 12582912.0  # 1.5 2^23: to the nearest integer, halves to the even one
        tl.store(codes_p + o_m * width + first + o_n, b_code.to(tl.int8), m_x)


@triton.jit
def inexact_linear_kernel(
    x_p, scale_p, weight_p, weight_scale_p, bias_p, low_p, lora_b_p, y_p, rows, d_in, d_out, rank,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TERMS: tl.constexpr, BLOCK_R: tl.constexpr, INT8: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x [rows, d_in], weight [d_out, d_in], low [rows, rank], lora_b [d_out, rank] -> y [rows, d_out], contiguous.

    scale [rows] and weight_scale [d_out] where INT8. TERMS are summed in fp16 where not.
    """
    columns = tl.cdiv(d_out, BLOCK_N)
    o_m = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (tl.program_id(0) % columns).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, TERMS)
    m_m, m_n = o_m < rows, o_n < d_out
    p_x = x_p + o_m[:, None] * d_in + o_k[None, :]
    p_w = weight_p + o_n[None, :] * d_in + o_k[:, None]
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INT8 else tl.float32)
    for first in range(0, d_in, TERMS):
        m_k = first + o_k < d_in
        b_x = tl.load(p_x + first, m_m[:, None] & m_k[None, :], other=0)
        b_w = tl.load(p_w + first, m_k[:, None] & m_n[None, :], other=0)
        if INT8:
            b_sum = tl.dot(b_x, b_w, b_sum)
        else:
            b_sum += tl.dot(b_x, b_w, out_dtype=tl.float16).to(tl.float32)
    b_y = b_sum.to(tl.float32)
    if INT8:
        b_y = b_y * tl.load(scale_p + o_m, m_m)[:, None] * tl.load(weight_scale_p + o_n, m_n)[None, :]
    if bias_p is not None:
        b_y += tl.load(bias_p + o_n, m_n).to(tl.float32)[None, :]
    if low_p is not None:
        for first in range(0, rank, BLOCK_R):
            o_r = first + tl.arange(0, BLOCK_R)
            m_r = o_r < rank
            b_low = tl.load(low_p + o_m[:, None] * rank + o_r[None, :], m_m[:, None] & m_r[None, :], other=0.0)
            b_b = tl.load(lora_b_p + o_n[None, :] * rank + o_r[:, None], m_n[None, :] & m_r[:, None], other=0.0)
            b_y = tl.dot(b_low.to(tl.float32), b_b.to(tl.float32), b_y, input_precision=PRECISION)
    p_y = y_p + o_m[:, None] * d_out + o_n[None, :]
    tl.store(p_y, b_y.to(y_p.dtype.element_ty), m_m[:, None] & m_n[None, :])


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """codes int8 [rows, d_in], scale fp32 [rows]."""
    x = x.contiguous()
    codes, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(len(x), dtype=torch.float32)
    chosen = settings(ROWS_LAUNCHES, x.device)
    grid = (triton.cdiv(len(x), chosen.BLOCK_M),)
    tile = chosen.BLOCK_M, chosen.BLOCK_N
    launch(quantise_rows_kernel, grid, x, x, codes, scale, *x.shape, *tile, num_warps=chosen.num_warps)
    return codes, scale


def int8_linear(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, low: Tensor | None,
    lora_b: Tensor | None, dtype: torch.dtype,
) -> Tensor:
    """y [rows, d_out]."""
    if settings(LAUNCHES, codes.device) is None:
        return int8_linear_ref(codes, scale, weight, weight_scale, bias, low, lora_b, dtype)
    return _product(codes, scale, weight, weight_scale, bias, low, lora_b, dtype)


def fp16_linear(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None, lora_b: Tensor | None) -> Tensor:
    """y [rows, d_out], fp16."""
    if settings(LAUNCHES, x.device) is None:
        return fp16_linear_ref(x, weight, bias, low, lora_b)
    return _product(x, None, weight.to(torch.float16), None, bias, low, lora_b, torch.float16)


def _product(x, scale, weight, weight_scale, bias, low, lora_b, dtype) -> Tensor:
    chosen, (rows, d_in), d_out = settings(LAUNCHES, x.device), x.shape, len(weight)
    x, weight, low, lora_b = (None if value is None else value.contiguous() for value in (x, weight, low, lora_b))
    y = x.new_empty((rows, d_out), dtype=dtype)
    tiles = triton.cdiv(d_out, chosen.BLOCK_N)
    block_m = chosen.BLOCK_M if triton.cdiv(rows, chosen.BLOCK_M) * tiles >= chosen.blocks else chosen.FEW_M
    launch(
        inexact_linear_kernel, (triton.cdiv(rows, block_m) * tiles,), x,
        x, scale, weight, weight_scale, bias, low, lora_b, y, rows, d_in, d_out, 0 if low is None else low.shape[1],
        block_m, chosen.BLOCK_N, TERMS if scale is None else chosen.TERMS, _RANK, scale is not None,
        "tf32" if y.element_size() == 2 else "ieee", num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )
    return y
