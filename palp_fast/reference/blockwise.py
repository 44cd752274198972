"""Block-wise 8-bit quantisation with a dynamic map (Dettmers et al., arXiv 2110.02861).

A value is stored as the nearest of 256 levels times the largest magnitude of its block. The levels cover seven
decades, each decade with twice as many as the one below it, so small moments keep their order of magnitude: 0, 1 and
the midpoints of equal cells of (0.1, 1] 10^-k.

Within a decade, levels are linear in the code. So both directions are a multiply-add, rounded once, with fp32 constants
of the decade; every implementation computes the same numbers (csrc/include/palp_fast/blockwise.h).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

DECADES = 7


class _Map(NamedTuple):
    """Level of n = code + 1, or of n = 2 |code - zero| + 1 if signed: width n + offset. [7] each, by decade.

    |code - zero| of a ratio: floor(min(slope ratio + shift, last)). [8] each: first for the lowest decade and what is
    below, last for what is nearest to 1.
    """

    width: Tensor
    offset: Tensor
    slope: Tensor
    shift: Tensor
    last: Tensor
    above: Tensor  # [7]: ratios above entry i belong to entry i + 1 or higher


def _fp32(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(torch.float32)


@lru_cache(maxsize=None)
def _map(signed: bool) -> _Map:
    cells = [2**decade if signed else 2 ** (decade + 1) for decade in range(DECADES)]
    powers = [10.0 ** (decade - DECADES + 1) for decade in range(DECADES)]
    sizes = [power * 0.9 / count for power, count in zip(powers, cells)]
    lowest = [power * 0.1 + size / 2 for power, size in zip(powers, sizes)]
    step = 2 if signed else 1
    first = [2 * count + 1 if signed else count for count in cells]
    width = _fp32([size / step for size in sizes])
    offset = _fp32([low - n * w for low, n, w in zip(lowest, first, width.double().tolist())])
    bottom = _multiply_add(torch.tensor(first), width, offset).double()
    highest = [n + step * (count - 1) for n, count in zip(first, cells)]
    top = _multiply_add(torch.tensor(highest), width, offset).double()
    next_level = torch.cat([bottom[1:], torch.ones(1, dtype=torch.float64)])
    # The line of the lowest decade goes through the boundaries around its first level.
    start = bottom[0].item() / 2
    size = start if signed else (bottom[0].item() + top[0].item()) / 2 - start
    end = 128.0 if signed else 255.0
    codes = [count if signed else count - 1 for count in cells]
    shifts = [code - count / 9.0 for code, count in zip(codes, cells)]
    return _Map(
        width,
        offset,
        slope=_fp32([1 / size, *(1 / size for size in sizes[1:]), 0.0]),
        shift=_fp32([1 - start / size, *shifts[1:], end]),
        last=_fp32([*(code + count - 0.5 for code, count in zip(codes, cells)), end]),
        above=((top + next_level) / 2).to(torch.float32),
    )


def _multiply_add(left: Tensor, right: Tensor, addend: Tensor) -> Tensor:
    """left right + addend in fp32, rounded once: for the numbers here, fp64 holds product and sum exactly."""
    return (left.double() * right.double() + addend.double()).to(torch.float32)


@lru_cache(maxsize=None)
def dynamic_levels(signed: bool) -> Tensor:
    """The 256 levels in ascending order, fp32."""
    table = _map(signed)
    decade = torch.repeat_interleave(torch.arange(DECADES), 2 ** torch.arange(DECADES) * (1 if signed else 2))
    n = 2 * torch.arange(1, 128) + 1 if signed else torch.arange(2, 256)
    magnitudes = _multiply_add(n, table.width[decade], table.offset[decade])
    negative = -magnitudes.flip(0) if signed else magnitudes[:0]
    return torch.cat([negative, torch.zeros(1), magnitudes, torch.ones(1)])


@lru_cache(maxsize=None)
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, _Map]:
    """(levels, map) on one device."""
    table = _map(signed)
    tensors = {name: getattr(table, name).to(device) for name in ("slope", "shift", "last", "above")}
    return dynamic_levels(signed).to(device), table._replace(**tensors)


def zero_code(signed: bool) -> int:
    """The code that stands for 0."""
    return 127 if signed else 0


def quantise(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """[blocks, size] fp32 -> (codes uint8 of that shape, scales [blocks] fp32); an all-zero block has scale 0.

    A block whose largest magnitude is subnormal counts as zero: its inverse would not be finite.
    """
    _, table = _tables(signed, values.device)
    scales = values.abs().amax(1)
    inverse = torch.where(scales >= torch.finfo(torch.float32).tiny, 1 / scales, 0.0)
    ratio = values * inverse[:, None]
    magnitude = ratio.abs()
    entry = torch.bucketize(magnitude, table.above, out_int32=True)
    position = _multiply_add(magnitude, table.slope[entry], table.shift[entry])
    distance = torch.minimum(position, table.last[entry]).to(torch.int32)
    # There is no level at -1.
    codes = (zero_code(signed) + torch.where(ratio < 0, -distance, distance)).clamp_(min=0)
    return codes.to(torch.uint8), scales


def dequantise(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The inverse: level[code] times the block's scale, fp32."""
    levels, _ = _tables(signed, codes.device)
    return levels.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape) * scales[:, None]
