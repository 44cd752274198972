"""Block-wise 8-bit quantisation with a dynamic map (Dettmers et al., arXiv 2110.02861).

A value is stored as the nearest of 256 levels times the largest magnitude of its block. The levels cover seven
decades, each decade with twice as many as the one below it, so small moments keep their order of magnitude.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

DECADES = 7


@lru_cache(maxsize=None)
def dynamic_levels(signed: bool) -> Tensor:
    """The 256 levels in ascending order, fp32: 0, 1 and the midpoints of equal cells of (0.1, 1] 10^-k."""
    levels = [0.0, 1.0]
    for decade in range(DECADES):
        cells = 2**decade if signed else 2 ** (decade + 1)
        width = 0.9 / cells
        magnitudes = [10.0 ** (decade - DECADES + 1) * (0.1 + (i + 0.5) * width) for i in range(cells)]
        levels += magnitudes
        if signed:
            levels += [-magnitude for magnitude in magnitudes]
    return torch.tensor(sorted(levels), dtype=torch.float64).to(torch.float32)


class _Tables(NamedTuple):
    """What `quantise` looks up, on one device."""

    levels: Tensor  # [256] fp32
    above: Tensor  # [256] fp32: the boundary half-way to the next level, infinite for the last
    first: Tensor  # [65536] int32: by the upper 16 bits of an fp32 value, the code of the least such value


@lru_cache(maxsize=None)
def _tables(signed: bool, device: torch.device) -> _Tables:
    levels = dynamic_levels(signed)
    boundaries = (levels[:-1] + levels[1:]) / 2
    upper = torch.arange(65536, dtype=torch.int64)
    # Among negative values with equal upper bits, the least has all lower bits set.
    bits = (upper << 16) + torch.where(upper >= 32768, 0xFFFF, 0)
    least = (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)
    first = torch.bucketize(least, boundaries, out_int32=True)
    above = torch.cat([boundaries, torch.tensor([float("inf")])])
    return _Tables(levels.to(device), above.to(device), first.to(device))


def zero_code(signed: bool) -> int:
    """The code that stands for 0."""
    return int((dynamic_levels(signed) == 0).nonzero().item())


def quantise(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """[blocks, size] fp32 -> (codes uint8 of that shape, scales [blocks] fp32); an all-zero block has scale 0.

    A block whose largest magnitude is subnormal counts as zero: its inverse would not be finite.
    """
    tables = _tables(signed, values.device)
    scales = values.abs().amax(1)
    inverse = torch.where(scales >= torch.finfo(torch.float32).tiny, 1 / scales, 0.0)
    ratio = (values * inverse[:, None]).reshape(-1)
    # Values with equal upper bits lie within 2^-7 of each other: at most one boundary is between them.
    codes = tables.first.index_select(0, (ratio.view(torch.int32) >> 16) & 0xFFFF)
    codes = codes + (ratio > tables.above.index_select(0, codes))
    return codes.to(torch.uint8).view(values.shape), scales


def dequantise(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The inverse: level[code] times the block's scale, fp32."""
    levels = _tables(signed, codes.device).levels
    return levels.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape) * scales[:, None]
