"""Operators on a frozen weight that may be quantised: it is dequantised for the call alone, in the dtype of use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Last arguments of such an operator; with a weight_scale, its weight is codes, its shape is weight_shape.
ARGUMENTS = "Tensor? weight_scale=None, SymInt[] weight_shape=[], bool channels_last=False"


class Scratch(NamedTuple):
    """Positions of an operator's weight, and of the argument whose dtype it computes in."""

    weight: int
    like: int


def with_scratch(version: Callable, where: Scratch, count: int, kind: str) -> Callable:
    """`version`, of `count` arguments with a plain weight, as one that takes ARGUMENTS, too.

    kind: name of the overload that it becomes.
    """

    def call(*args):
        plain, quantised = list(args[:count]), args[count:]
        if quantised and quantised[0] is not None:
            plain[where.weight] = scratch(plain[where.weight], *quantised, dtype=plain[where.like].dtype, kind=kind)
        return version(*plain)

    return call


def scratch(
    codes: Tensor, scale: Tensor, shape: Sequence[int], channels_last: bool = False, *, dtype: torch.dtype, kind: str
) -> Tensor:
    """The dequantised weight; kind "triton" by Triton, else as fast as can be, for every way gives the same bits."""
    op = getattr(torch.ops.palp_fast.dequantise, "triton" if kind == "triton" else "default")
    width = 1
    for size in shape[1:]:
        width = width * size
    return in_shape(op(codes, scale, width, dtype), shape, channels_last)


def in_shape(rows: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """[d_out, width] -> shape, a view."""
    if not channels_last:
        return rows.view(tuple(shape))
    d_out, d_in, height, width = shape
    return rows.view(d_out, height, width, d_in).movedim(-1, 1)
