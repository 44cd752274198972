"""Products of fewer bits, for passes without a gradient: y = x W^T + bias + low B^T, inexact in x W^T alone.

    int8:  x = code scale, one scale for a row of x (its largest magnitude / 127), and W in int8, one scale for a row of
           it: the codes' products are summed exactly, in 32 bits, and multiplied by both scales afterwards
    fp16:  products of fp16 numbers, every 64 of them summed in fp16, these sums in fp32

low [rows, r] and B [d_out, r]: a low-rank term, exact, in fp32. The result is rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from palp_fast.reference.quantised import quantise_ref

TERMS = 64  # summed in fp16
_STEP = 16  # terms of a matrix instruction, which rounds its sum


def quantise_rows_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, d_in] -> codes int8 [rows, d_in], scale fp32 [rows]; a row not finite has a scale that is not."""
    return quantise_ref(x, "int8")


def int8_linear_ref(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    lora_b: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """codes [rows, d_in] and weight [d_out, d_in], int8, scale [rows], weight_scale [d_out] -> y [rows, d_out]."""
    y = _sums(codes, weight).to(torch.float32) * scale[:, None] * weight_scale
    return _with_terms(y, bias, low, lora_b).to(dtype)


def fp16_linear_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None, lora_b: Tensor | None
) -> Tensor:
    """x [rows, d_in] fp16, weight [d_out, d_in] -> y [rows, d_out] fp16."""
    weight = weight.to(torch.float16)
    y = x.new_zeros((len(x), len(weight)), dtype=torch.float32)
    for left, right in zip(x.split(TERMS, 1), weight.split(TERMS, 1)):
        few = torch.zeros_like(y, dtype=torch.float16)
        for a, b in zip(left.float().split(_STEP, 1), right.float().split(_STEP, 1)):
            few = (few.float() + a @ b.T).half()
        y += few
    return _with_terms(y, bias, low, lora_b).half()


def _sums(left: Tensor, right: Tensor) -> Tensor:
    """left right^T of int8 matrices, exact."""
    rows, terms, columns = *left.shape, right.shape[0]
    served = left.device.type == "cpu" or (rows > 16 and terms % 8 == 0 and columns % 8 == 0)  # by torch on CUDA
    if served and rows and terms and columns:
        return torch._int_mm(left.contiguous(), right.T)
    return left.double() @ right.double().T


def _with_terms(y: Tensor, bias: Tensor | None, low: Tensor | None, lora_b: Tensor | None) -> Tensor:
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y if low is None else y + F.linear(low, lora_b.to(low.dtype))
