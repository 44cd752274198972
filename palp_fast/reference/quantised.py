"""Frozen weights in 8 or 4 bits a number: a weight [d_out, ...] is a matrix [d_out, width], quantised row by row.

    int8: w = code scale, code from -127 to 127, one scale for a row: its largest magnitude / 127
    nf4:  w = level[code] scale, 16 levels, one scale for a block of 64 numbers: their largest magnitude

NF4 is of Dettmers et al. (arXiv 2305.14314): the levels are quantiles of a normal distribution, two codes share a byte,
the first one in its upper half, as in bitsandbytes. A row is padded with zeros to whole blocks, so no block belongs to
two rows: rows put together or taken apart keep their bytes. Scales are fp32, and so is the product, rounded once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

FORMATS = {"int8": torch.int8, "nf4": torch.uint8}  # and the dtype of their codes
BLOCK = 64
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
_LEAST = 1e-38  # in place of the scale of a block of zeros, where a code is found by division


def quantise_ref(rows: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """rows [d_out, width] -> codes and their scale.

    int8 [d_out, width] and [d_out], or uint8 [d_out, 32 blocks] and [d_out, blocks]. A row or block of zeros has
    scale 0. What is not finite gives a scale that is not.
    """
    return _int8(rows.to(torch.float32)) if form == "int8" else _nf4(rows.to(torch.float32))


def dequantise_ref(codes: Tensor, scale: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The matrix [d_out, width], contiguous."""
    if codes.dtype == torch.int8:
        return (codes * scale[:, None]).to(dtype)
    pairs = F.embedding(codes.int(), _pairs(codes.device))  # [d_out, bytes, 2]
    blocks = pairs.view(*scale.shape, BLOCK) * scale[:, :, None]
    return blocks.view(len(codes), -1)[:, :width].to(dtype).contiguous()


def blocks_of(width: int) -> int:
    """NF4 blocks of a row."""
    return -(-width // BLOCK)


def _int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = rows.abs().amax(1) / 127
    codes = (rows / torch.where(scale > 0, scale, 1)[:, None]).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scale


def _nf4(rows: Tensor) -> tuple[Tensor, Tensor]:
    blocks = blocks_of(rows.shape[1])
    rows = F.pad(rows, (0, blocks * BLOCK - rows.shape[1])).view(len(rows), blocks, BLOCK)
    scale = rows.abs().amax(2)
    ratio = (rows * (1 / scale.clamp(min=_LEAST))[:, :, None]).clamp_(-1, 1)
    levels = nf4_levels(rows.device)
    codes = torch.bucketize(ratio, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
    first, second = codes.view(len(rows), -1, 2).unbind(-1)
    return first << 4 | second, scale


def nf4_levels(device: torch.device) -> Tensor:
    """[16] fp32."""
    return torch.tensor(NF4_LEVELS, device=device)


@lru_cache(maxsize=None)
def _pairs(device: torch.device) -> Tensor:
    """[256, 2]: the two levels of every byte."""
    levels = nf4_levels(device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
