"""geglu: y = h gelu(g) for x = [h, g], with the exact gelu, as diffusers' feed-forward layers have it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from palp_fast.reference.dtypes import compute_dtype


def geglu_ref(x: Tensor) -> Tensor:
    """x [..., 2 d] -> y [..., d] in the dtype of x, computed in fp32 (fp64 for fp64)."""
    h, g = x.to(compute_dtype([x])).chunk(2, dim=-1)
    return (h * F.gelu(g)).to(x.dtype)


def geglu_bwd_ref(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient to x, from x alone."""
    compute = compute_dtype([x])
    h, g = x.to(compute).chunk(2, dim=-1)
    wide = grad.to(compute)
    return torch.cat([wide * F.gelu(g), torch.ops.aten.gelu_backward(wide * h, g)], dim=-1).to(x.dtype)
