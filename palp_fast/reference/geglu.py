"""geglu: y = h gelu(g) for x = [h, g], with the exact gelu, as diffusers' feed-forward layers have it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from palp_fast.reference.dtypes import compute_dtype


_BLOCK = 2**18  # numbers computed in fp32 at a time on the CPU: they stay in its cache


def geglu_ref(x: Tensor) -> Tensor:
    """x [..., 2 d] -> y [..., d] in the dtype of x, computed in fp32 (fp64 for fp64)."""
    return _in_blocks(_forward, x)


def geglu_bwd_ref(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient to x, from x alone."""
    return _in_blocks(_backward, x, grad)


def _in_blocks(function: Callable, x: Tensor, *more: Tensor) -> Tensor:
    """function of all rows, or of a few at a time."""
    rows = [value.reshape(math.prod(value.shape[:-1]), value.shape[-1]) for value in (x, *more)]
    few = max(_BLOCK // max(x.shape[-1], 1), 1) if x.device.type == "cpu" else len(rows[0])
    if len(rows[0]) <= few:
        return function(x, *more)
    made = [function(*part) for part in zip(*(value.split(few) for value in rows))]
    return torch.cat(made).view(*x.shape[:-1], -1)


def _forward(x: Tensor) -> Tensor:
    h, g = x.to(compute_dtype([x])).chunk(2, dim=-1)
    return (h * F.gelu(g)).to(x.dtype)


def _backward(x: Tensor, grad: Tensor) -> Tensor:
    compute = compute_dtype([x])
    h, g = x.to(compute).chunk(2, dim=-1)
    wide = grad.to(compute)
    return torch.cat([wide * F.gelu(g), torch.ops.aten.gelu_backward(wide * h, g)], dim=-1).to(x.dtype)
