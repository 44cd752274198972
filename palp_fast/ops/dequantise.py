"""Operator dequantise: a weight's matrix from codes and scales. No gradient: the weight is frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from palp_fast import backend
from palp_fast.ops import bitsandbytes_nf4
from palp_fast.ops.registry import empty, register
from palp_fast.reference.quantised import dequantise_ref


def _fastest(codes: Tensor, scale: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    if bitsandbytes_nf4.serves(codes, dtype):
        return bitsandbytes_nf4.dequantise(codes, scale, width, dtype)
    if backend.select("dequantise", codes.device) == "triton":
        return torch.ops.palp_fast.dequantise.triton(codes, scale, width, dtype)
    return dequantise_ref(codes, scale, width, dtype)


register(
    "dequantise",
    "(Tensor codes, Tensor scale, SymInt width, ScalarType dtype) -> Tensor",
    dequantise_ref,
    lambda codes, scale, width, dtype: empty(codes, (codes.shape[0], width), dtype),
    triton="dequantise.dequantise_rows",
    default=_fastest,
)
