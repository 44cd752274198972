"""frozen_conv2d: torch's convolution, whose gradient to x needs the weight and the shape of x alone.

On the CPU, where torch lays out the whole weight anew in every call, few pixels meet a large weight in one matrix
product: patches of x, [pixels, h w C], times a channels-last weight as it lies in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from palp_fast.backend import repeatable_cudnn
from palp_fast.reference.layout import channels_last, in_layout

FEW = 256  # pixels of a batch's result: more of them outweigh the layout of the weight
LARGE = 2**20  # numbers in a weight: a smaller one stays in the cache


def frozen_conv2d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """x [B, C, H, W], weight [d_out, C / groups, h, w] -> y in the dtype of x, channels-last if either of them is."""
    shift = None if bias is None else bias.to(x.dtype)
    last = channels_last(x) or channels_last(weight)
    size = [convolved(*sides) for sides in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation)]
    if _as_patches(x, size, weight, dilation, groups):
        rows = _patches(x, weight.shape[2:], stride, padding)
        y = F.linear(rows, _matrix(weight, x.dtype), shift).view(len(x), *size, len(weight)).movedim(-1, 1)
        return in_layout(y, last)
    options = stride, padding, dilation, False, [0, 0], groups
    with repeatable_cudnn(x.device):
        y = torch.ops.aten.convolution(x, weight.to(x.dtype), shift, *options)
    return in_layout(y, last)


def frozen_conv2d_bwd_ref(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient to x of the given height and width: the transposed convolution of grad.

    aten.convolution_backward would ask for x, to see its layout; given a stand-in, it loses channels-last.
    """
    last = channels_last(grad) or channels_last(weight)
    if _as_patches(grad, grad.shape[2:], weight, dilation, groups):
        rows = in_layout(grad, True).movedim(1, -1).flatten(0, -2) @ _matrix(weight, grad.dtype)
        taps = rows.view(len(grad), *grad.shape[2:], *weight.shape[2:], weight.shape[1])
        return in_layout(_summed(taps, size, stride, padding), last)
    sides = zip(grad.shape[2:], weight.shape[2:], stride, padding, dilation)
    short = [whole - spanned(*side) for whole, side in zip(size, sides)]
    options = stride, padding, dilation, True, short, groups
    with repeatable_cudnn(grad.device):
        dx = torch.ops.aten.convolution(grad, weight.to(grad.dtype), None, *options)
    return in_layout(dx, last)


def _as_patches(value: Tensor, size: Sequence[int], weight: Tensor, dilation: Sequence[int], groups: int) -> bool:
    """size: height and width of the result."""
    few = len(value) * math.prod(size) <= FEW and weight.numel() >= LARGE
    return few and value.device.type == "cpu" and groups == 1 and tuple(dilation) == (1, 1)


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[d_out, C, h, w] -> [d_out, h w C], a view of a channels-last weight."""
    return weight.to(dtype).movedim(1, -1).flatten(1)


def _patches(x: Tensor, taps: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """[B, C, H, W] -> [pixels of the result, h w C]."""
    (above, left), (height, width) = padding, taps
    padded = F.pad(x.movedim(1, -1), (0, 0, left, left, above, above))
    windows = padded.unfold(1, height, stride[0]).unfold(2, width, stride[1])
    return windows.movedim(3, -1).flatten(3).flatten(0, 2)


def _summed(taps: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """What every pixel of the result, [B, H', W', h, w, C], adds to those of x -> [B, C, H, W], summed in fp32."""
    batch, rows, columns, height, width, channels = taps.shape
    (above, left), wide = padding, torch.promote_types(taps.dtype, torch.float32)
    sums = taps.new_zeros((batch, size[0] + 2 * above, size[1] + 2 * left, channels), dtype=wide)
    for i in range(height):
        reached = sums[:, i : i + rows * stride[0] : stride[0]]
        for j in range(width):
            reached[:, :, j : j + columns * stride[1] : stride[1]] += taps[:, :, :, i, j]
    return sums[:, above : above + size[0], left : left + size[1]].to(taps.dtype).movedim(-1, 1)


def convolved(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Height or width of the result; below 1 where the kernel does not fit."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def spanned(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Height or width that gives `size`, the least of those that do."""
    return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
