"""frozen_linear: y = x W^T + bias; the gradient to x needs the weight alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def frozen_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., d_in], weight [d_out, d_in] -> [..., d_out] in the dtype of x."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).contiguous()


def frozen_linear_bwd_ref(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient to x: grad W."""
    return (grad @ weight.to(grad.dtype)).contiguous()
