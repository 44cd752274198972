"""Frozen linear layers and convolutions: gradients to x alone, and nothing of x is kept for it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from palp_fast import autocast, checks
from palp_fast.functional import inexact
from palp_fast.ops.registry import overload
from palp_fast.quantised import Weight, operands


def frozen_linear(x: Tensor, weight: Weight, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x W^T + bias, as torch.nn.functional.linear.

    x: [..., d_in]; weight: [d_out, d_in], frozen, of any floating dtype or quantised; bias: [d_out] or None. Runs in
    the dtype of x, under autocast in the autocast dtype.

    Returns [..., d_out] in that dtype, contiguous. Gradient to x alone; keeps only the weight for it. Raises TypeError
    or ValueError for bad arguments, RuntimeError if `backend` cannot serve.
    """
    checks.floating("x", x)
    checks.frozen_matrix("weight", weight, x)
    checks.width("x", x, weight)
    checks.optional_table("bias", bias, weight.shape[:1], x)

    def run(x: Tensor) -> Tensor:
        if inexact.asked(x, weight):
            return inexact.linear(x, weight, bias, backend)
        plain, quantised = operands(weight)
        return overload("frozen_linear", x.device, backend)(x, plain, bias, *quantised)

    return autocast.product(run, x)


def frozen_conv2d(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """torch.nn.functional.conv2d with numbers for the padding.

    x: [B, C, H, W]; weight: [d_out, C / groups, h, w], frozen, of any floating dtype or quantised; bias: [d_out] or
    None; stride, padding and dilation: an int, or two for height and width. Runs in the dtype of x, under autocast in
    the autocast dtype.

    Returns [B, d_out, H', W'] in that dtype, channels-last if x or weight is. Gradient to x alone; keeps only the
    weight for it. Raises TypeError or ValueError for bad arguments, RuntimeError if `backend` cannot serve.
    """
    checks.image("x", x)
    stride, padding, dilation = (
        checks.pair(name, value, minimum)
        for name, value, minimum in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    )
    checks.integer("groups", groups, 1)
    checks.kernel("weight", weight, x, padding, dilation, groups)
    checks.optional_table("bias", bias, weight.shape[:1], x)
    op = overload("frozen_conv2d", x.device, backend)
    weight, quantised = operands(weight)
    return autocast.product(op, x, weight, bias, stride, padding, dilation, groups, *quantised)
