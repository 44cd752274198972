"""Which precision an operator computes in."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

BASE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by the name that base_dtype has


def compute_dtype(tensors: Iterable[Tensor | None]) -> torch.dtype:
    """float64 if any given tensor is float64 (for gradcheck), else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1] in the dtype of `like`, ready to multiply a tensor of its rank."""
    return values.to(like.dtype).reshape(-1, *([1] * (like.dim() - 1)))
