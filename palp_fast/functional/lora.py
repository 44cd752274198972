"""lora_linear: a frozen projection with a low-rank term."""

from __future__ import annotations

import torch
from torch import Tensor

from palp_fast import checks
from palp_fast.ops.registry import overload


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_scale: float | Tensor = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """x W^T + bias + lora_scale (x A^T) B^T, the low-rank term never merged into W (Hu et al., arXiv 2106.09685).

    x: [..., d_in]; weight: [d_out, d_in], frozen, of any floating dtype; bias: [d_out] or None; lora_a: [r, d_in] and
    lora_b: [d_out, r], usually fp32; lora_scale: a float, or [B] with B = x.shape[0], one factor per sample.
    The frozen product runs in the dtype of x (under autocast: the autocast dtype), the low-rank term in fp32.

    Returns [..., d_out] in that dtype. Gradients to x, lora_a and lora_b (in their own dtypes), to nothing else.
    Raises TypeError or ValueError for bad arguments, RuntimeError if `backend` cannot serve.
    """
    checks.floating("x", x)
    checks.lora(x, weight, bias, lora_a, lora_b)
    gate, scale = None, 1.0
    if isinstance(lora_scale, Tensor):
        gate = checks.gate("lora_scale", lora_scale, x)
    else:
        checks.number("lora_scale", lora_scale)
        scale = float(lora_scale)
    op = overload("lora_linear", x.device, backend)
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return op(x, weight, bias, lora_a, lora_b, scale, gate)[0]
    x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        return op(x, weight, bias, lora_a, lora_b, scale, gate)[0]
