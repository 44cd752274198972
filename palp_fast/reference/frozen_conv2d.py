"""frozen_conv2d: torch's convolution, whose gradient to x needs the weight and the shape of x alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from palp_fast.backend import repeatable_cudnn
from palp_fast.reference.layout import channels_last, in_layout


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
    options = stride, padding, dilation, False, [0, 0], groups
    with repeatable_cudnn(x.device):
        y = torch.ops.aten.convolution(x, weight.to(x.dtype), shift, *options)
    return in_layout(y, channels_last(x) or channels_last(weight))


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
    sides = zip(grad.shape[2:], weight.shape[2:], stride, padding, dilation)
    short = [whole - spanned(*side) for whole, side in zip(size, sides)]
    options = stride, padding, dilation, True, short, groups
    with repeatable_cudnn(grad.device):
        dx = torch.ops.aten.convolution(grad, weight.to(grad.dtype), None, *options)
    return in_layout(dx, channels_last(grad) or channels_last(weight))


def convolved(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Height or width of the result; below 1 where the kernel does not fit."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def spanned(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Height or width that gives `size`, the least of those that do."""
    return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
