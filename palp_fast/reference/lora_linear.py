"""lora_linear: a frozen projection with a low-rank term that is never merged into the weight.

    y = x W^T + bias + scale (x A^T) B^T + residual

Merging loses the update: a bf16 weight rounds much of a small B A away (tests/test_lora_linear.py). Here the frozen
product runs in the dtype of x, the low-rank term in fp32 (fp64 for fp64), and the sum is rounded once. The backward
pass needs x alone: it computes x A^T again from the x that dA reads anyway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from palp_fast.reference.dtypes import compute_dtype, per_sample


def lora_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    residual: Tensor | None,
    scale: float,
    gate: Tensor | None,
) -> Tensor:
    """y [..., d_out] in the dtype of x, or in the wider of those of x and residual [..., d_out]."""
    compute = compute_dtype([x, lora_a])
    base = F.linear(as_rows(x), weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    low = F.linear(x.to(compute), lora_a.to(compute))
    left, right = as_rows(scaled(low, scale, gate)), lora_b.to(compute).T
    if residual is None:
        out = add_product(base, left, right)
    else:
        total = base.to(compute) + as_rows(residual)
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
        out = total.to(torch.promote_types(x.dtype, residual.dtype))
    return out.view(*x.shape[:-1], weight.shape[0])


def lora_linear_bwd_ref(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    gate: Tensor | None,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_x, or an empty tensor if not wanted; d_lora_a [r, d_in]; d_lora_b [d_out, r]); W gets none."""
    compute = compute_dtype([x, lora_a])
    wide, wide_x = grad.to(compute), x.to(compute)
    d_low = scaled(wide @ lora_b.to(compute), scale, gate)
    d_a = as_rows(d_low).T @ as_rows(wide_x)
    d_b = as_rows(wide).T @ as_rows(scaled(F.linear(wide_x, lora_a.to(compute)), scale, gate))
    d_x = x.new_empty(0)
    if need_x:
        base = as_rows(grad.to(x.dtype)) @ weight.to(x.dtype)
        d_x = add_product(base, as_rows(d_low), lora_a.to(compute)).view(x.shape)
    return d_x, d_a.to(lora_a.dtype), d_b.to(lora_b.dtype)


def scaled(low: Tensor, scale: float, gate: Tensor | None) -> Tensor:
    """x A^T [B, ..., r] times the factor of all samples, and that of each, gate [B]."""
    if gate is not None:
        low = low * per_sample(gate, low)
    return low if scale == 1.0 else low * scale


def add_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """base + left right in the dtype of base, contiguous; base may be overwritten."""
    if base.dtype != left.dtype:
        return base.to(left.dtype, memory_format=torch.contiguous_format).addmm_(left, right).to(base.dtype)
    return base.addmm_(left, right) if base.is_contiguous() else torch.addmm(base, left, right)


def as_rows(value: Tensor) -> Tensor:
    """[..., d] -> [rows, d]."""
    return value.reshape(-1, value.shape[-1])
