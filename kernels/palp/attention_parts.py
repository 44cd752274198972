"""What the attention kernels share: heads of any width in two parts, and the products over them.

A head of 40 is 32 + 8 wide, not padded to 64. Matrix instructions take 16 at a time along the dimension that a product
sums over and 8 along the one that it keeps, hence two sizes of the second part: D2 to sum over, O2 to keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Launch:
    """Queries and keys of a tile, warps of a block, stages of the pipeline of loads."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class ByWidth:
    """Settings for 16-bit heads up to 48, 64, 96 and 160 wide; of 32 and 64 bits, up to 48 and wider."""

    upto_48: Launch
    upto_64: Launch
    upto_96: Launch
    upto_160: Launch
    precise: Launch = Launch(32, 32, 4, 1)
    precise_wide: Launch = Launch(16, 16, 4, 1)

    def at(self, width: int, itemsize: int) -> Launch:
        if itemsize > 2:
            return self.precise if width <= 48 else self.precise_wide
        return next(getattr(self, f"upto_{most}") for most in (48, 64, 96, 160) if width <= most)


# Triton has none for sm_75: small tiles, as for 32 bits.
WITHOUT_MATRIX_INSTRUCTIONS = ByWidth(Launch(32, 32, 4, 1), *[Launch(16, 16, 4, 1)] * 3)


class Parts(NamedTuple):
    """Sizes of both parts of a dimension: D1 + D2 where it is summed over, D1 + O2 where it is kept; 0: no second."""

    D1: int
    D2: int
    O2: int


def parts(size: int) -> Parts:
    """The least padding with two powers of two: 40 as 32 + 16 and 32 + 8, 80 as 64 + 16, 160 as 128 + 32."""
    padded = max(16, triton.next_power_of_2(size))
    first = padded // 2
    second = max(16, triton.next_power_of_2(max(1, size - first)))
    if first + second >= padded:
        return Parts(padded, 0, 0)
    return Parts(first, second, max(8, triton.next_power_of_2(size - first)))


def unit_stride(value: Tensor) -> Tensor:
    """As given if neighbours in the last dimension are neighbours in memory, else a copy."""
    return value if value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Of the batch and the row of each."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


@triton.jit
def mask_of(left, ROWS: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr):
    """Which elements of a tile exist: rows below `left` (all, if EVEN), columns below the head's width."""
    m_tile = tl.full([ROWS, SIZE], True, tl.int1)
    if not EVEN:
        m_tile = m_tile & (tl.arange(0, ROWS) < left)[:, None]
    if START + SIZE > D:
        m_tile = m_tile & (START + tl.arange(0, SIZE) < D)[None, :]
    return m_tile


@triton.jit
def load_part(
    p, stride, left, ROWS: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr
):
    """[ROWS, SIZE] from column START of a head whose first row is at p; 0 beyond its rows and its width."""
    p_tile = p + tl.arange(0, ROWS)[:, None] * stride + (START + tl.arange(0, SIZE))[None, :]
    if EVEN and START + SIZE <= D:
        b_tile = tl.load(p_tile)
    else:
        b_tile = tl.load(p_tile, mask=mask_of(left, ROWS, START, SIZE, D, EVEN), other=0.0)
    return b_tile


@triton.jit
def load_head(
    p, stride, left, ROWS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, EVEN: tl.constexpr
):
    """Both parts of the rows of a head; without a second one, the first twice."""
    b_1 = load_part(p, stride, left, ROWS, 0, D1, D, EVEN)
    b_2 = b_1
    if D2 > 0:
        b_2 = load_part(p, stride, left, ROWS, D1, D2, D, EVEN)
    return b_1, b_2


@triton.jit
def load_second(
    b_2, p, stride, left, ROWS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, O2: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The second part in the size to keep, given that in the size to sum over."""
    b_kept = b_2
    if O2 != D2:
        b_kept = load_part(p, stride, left, ROWS, D1, O2, D, EVEN)
    return b_kept


@triton.jit
def store_head(
    p, stride, left, b_1, b_2, ROWS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, O2: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Both parts of rows whose first is at p, rounded to the type of p."""
    p_1 = p + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, D1)[None, :]
    tl.store(p_1, b_1.to(p.dtype.element_ty), mask=mask_of(left, ROWS, 0, D1, D, EVEN))
    if O2 > 0:
        p_2 = p + tl.arange(0, ROWS)[:, None] * stride + (D1 + tl.arange(0, O2))[None, :]
        tl.store(p_2, b_2.to(p.dtype.element_ty), mask=mask_of(left, ROWS, D1, O2, D, EVEN))


@triton.jit
def zeros(ROWS: tl.constexpr, D1: tl.constexpr, O2: tl.constexpr, COMPUTE: tl.constexpr):
    """Two accumulators of `add_product`."""
    b_1 = tl.zeros([ROWS, D1], COMPUTE)
    b_2 = b_1
    if O2 > 0:
        b_2 = tl.zeros([ROWS, O2], COMPUTE)
    return b_1, b_2


@triton.jit
def products(a_1, a_2, b_1, b_2, D2: tl.constexpr, COMPUTE: tl.constexpr):
    """a b^T, summed over both parts of a head."""
    b_out = tl.dot(a_1, tl.trans(b_1), input_precision="ieee", out_dtype=COMPUTE)
    if D2 > 0:
        b_out = tl.dot(a_2, tl.trans(b_2), b_out, input_precision="ieee", out_dtype=COMPUTE)
    return b_out


@triton.jit
def add_product(acc_1, acc_2, b_weights, b_1, b_2, O2: tl.constexpr, COMPUTE: tl.constexpr):
    """acc + weights b, for both parts of a head."""
    b_rounded = b_weights.to(b_1.dtype)
    acc_1 = tl.dot(b_rounded, b_1, acc_1, input_precision="ieee", out_dtype=COMPUTE)
    if O2 > 0:
        acc_2 = tl.dot(b_rounded, b_2, acc_2, input_precision="ieee", out_dtype=COMPUTE)
    return acc_1, acc_2


@triton.jit
def row_dot(a_1, a_2, b_1, b_2, D2: tl.constexpr, COMPUTE: tl.constexpr):
    """Sum over a head of a b, per row."""
    b_out = tl.sum(a_1.to(COMPUTE) * b_1.to(COMPUTE), axis=1)
    if D2 > 0:
        b_out += tl.sum(a_2.to(COMPUTE) * b_2.to(COMPUTE), axis=1)
    return b_out


@triton.jit
def prompt_of(index_p, i_row, SHARED: tl.constexpr):
    """Number of the prompt that a row attends to."""
    i_prompt = i_row
    if SHARED:
        i_prompt = tl.load(index_p + i_row)
    return i_prompt.to(tl.int64)
