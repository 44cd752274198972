"""The layers around attention, frozen: gradients to x alone, and the least that they need is kept for it."""

from __future__ import annotations

from torch import Tensor

from palp_fast import checks
from palp_fast.ops.registry import overload


def geglu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """h gelu(g) for x = [h, g] along the last dimension, exact gelu (Shazeer, arXiv 2002.05202; as diffusers' GEGLU).

    x: [..., 2 d], floating. Computed in fp32 (fp64 for fp64), rounded once. Returns [..., d] in the dtype of x,
    contiguous. Keeps x alone for the backward pass. Raises TypeError or ValueError for bad arguments, RuntimeError if
    `backend` cannot serve.
    """
    checks.floating("x", x)
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"x has shape {list(x.shape)}: allowed is [..., 2 d]")
    return overload("geglu", x.device, backend)(x)
