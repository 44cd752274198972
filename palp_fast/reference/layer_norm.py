"""layer_norm for frozen scale and shift (Ba et al., arXiv 1607.06450), with a backward pass from its input or output.

    xhat = (x - mean) rstd,   y = weight xhat + bias

mean and rstd = 1 / sqrt(variance + eps) over the last dimension, the variance biased. xhat = (y - bias) / weight, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palp_fast.reference.dtypes import compute_dtype


def layer_norm_ref(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, from_output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [..., d] in the dtype of x, mean, rstd [...]), in fp32 (fp64 for fp64). from_output: of backward alone."""
    compute = compute_dtype([x])
    wide, weight, bias = (None if value is None else value.to(compute) for value in (x, weight, bias))
    y, mean, rstd = torch.native_layer_norm(wide.contiguous(), x.shape[-1:], weight, bias, eps)
    return y.to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def layer_norm_bwd_ref(
    grad: Tensor, kept: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Gradient to x alone; kept: x, or y where mean is None.

    With dxhat = weight dy:  dx = rstd (dxhat - average(dxhat) - xhat average(dxhat xhat)).
    """
    compute = compute_dtype([kept])
    dy, wide, weight, bias = (None if value is None else value.to(compute) for value in (grad, kept, weight, bias))
    if mean is not None:
        return _d_input(dy, wide, mean, rstd, weight).to(kept.dtype)
    xhat = wide if bias is None else wide - bias
    xhat = xhat if weight is None else xhat / weight
    dx = _d_input(dy, xhat, torch.zeros_like(rstd), torch.ones_like(rstd), weight)
    return (dx * rstd.unsqueeze(-1)).to(kept.dtype)


def _d_input(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    x, dy, wanted = x.contiguous(), dy.contiguous(), [True, False, False]
    mean, rstd = mean.contiguous().unsqueeze(-1), rstd.contiguous().unsqueeze(-1)
    return torch.ops.aten.native_layer_norm_backward(dy, x, x.shape[-1:], mean, rstd, weight, None, wanted)[0]
