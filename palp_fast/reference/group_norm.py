"""group_norm_silu: group normalisation and, if wanted, SiLU, for frozen scale and shift (Wu and He, arXiv 1803.08494).

    xhat = (x - mean) rstd,   z = weight xhat + bias,   y = z sigmoid(z)

mean and rstd = 1 / sqrt(variance + eps) over the channels of a group and all pixels, the variance biased.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from palp_fast.reference.dtypes import compute_dtype
from palp_fast.reference.layout import channels_last, in_layout


def group_norm_silu_ref(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y in the dtype and layout of x, mean, rstd [B, groups]), computed in fp32 (fp64 for fp64)."""
    wide, weight, bias = _wide(x, weight, bias)
    # On a CPU torch takes the variance of a channels-last image as E[x^2] - mean^2: where a group's mean is 10 standard
    # deviations, fp32 is off by 1e-5, against 7e-7 of a contiguous image.
    z, mean, rstd = torch.native_group_norm(wide, weight, bias, *_sizes(x), groups, eps)
    y = F.silu(z, inplace=True) if silu else z
    return in_layout(y.to(x.dtype), channels_last(x)), mean, rstd


def group_norm_silu_bwd_ref(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, silu: bool
) -> Tensor:
    """Gradient to x alone, from x and the statistics.

    With dxhat = weight dz:  dx = rstd (dxhat - average(dxhat) - xhat average(dxhat xhat)) over each group.
    """
    wide, weight, bias = _wide(x, weight, bias)
    dz = in_layout(grad.to(wide.dtype), _channels_last_image(wide))
    groups = mean.shape[1]
    if silu:
        dz = torch.ops.aten.silu_backward(dz, _affine(wide, mean, rstd, weight, bias))
    wanted = [True, False, False]
    dx, _, _ = torch.ops.aten.native_group_norm_backward(dz, wide, mean, rstd, weight, *_sizes(x), groups, wanted)
    return in_layout(dx.to(x.dtype), channels_last(x))


def _wide(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> list[Tensor | None]:
    """All three as torch's kernels take them: in one dtype, contiguous, x perhaps a channels-last image."""
    compute = compute_dtype([x])
    parameters = [None if value is None else value.contiguous().to(compute) for value in (weight, bias)]
    return [in_layout(x, _channels_last_image(x)).to(compute), *parameters]


def _channels_last_image(x: Tensor) -> bool:
    return x.dim() == 4 and channels_last(x)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def _affine(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """z again, as torch's kernel computes it: one multiply-add for each number."""
    mean, rstd = (value.repeat_interleave(x.shape[1] // value.shape[1], dim=1) for value in (mean, rstd))
    scale = rstd if weight is None else rstd * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shift, scale = (value.reshape(*value.shape, *([1] * (x.dim() - 2))) for value in (shift, scale))
    return torch.addcmul(shift, x, scale)
