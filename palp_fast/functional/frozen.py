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


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """z sigmoid(z), or z where not silu, for z = weight (x - mean) rstd + bias (Wu and He, arXiv 1803.08494).

    x: [B, C, ...], floating, of any strides, channels-last fastest; num_groups: a divisor of C; weight, bias: [C] or
    None, frozen. mean and rstd over the channels of a group and all pixels, in fp32 (fp64 for fp64), autocast or not.

    Returns the shape and dtype of x, channels-last if x is. Gradient to x alone; keeps x and the statistics for it.
    Raises TypeError or ValueError for bad arguments, RuntimeError if `backend` cannot serve.
    """
    checks.floating("x", x)
    checks.integer("num_groups", num_groups, 1)
    if x.dim() < 2 or x.shape[1] % num_groups:
        allowed = f"[B, C, ...], C a multiple of num_groups={num_groups}"
        raise ValueError(f"x has shape {list(x.shape)}: allowed is {allowed}")
    checks.optional_table("weight", weight, (x.shape[1],), x)
    checks.optional_table("bias", bias, (x.shape[1],), x)
    checks.number("eps", eps)
    if not isinstance(silu, bool):
        raise TypeError(f"silu={silu!r}: allowed are True and False")
    op = overload("group_norm_silu", x.device, backend)
    return op(x, num_groups, weight, bias, float(eps), silu)[0]


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    keep: str = "input",
    backend: str = "auto",
) -> Tensor:
    """weight (x - mean) rstd + bias over the last dimension (Ba et al., arXiv 1607.06450).

    x: [..., d], floating, d >= 1; weight, bias: [d] or None, frozen. mean and rstd in fp32 (fp64 for fp64), autocast
    or not. keep: what the backward pass works from, besides rstd: "input" keeps x and the mean; "output" keeps the
    result, for layers whose result the next one keeps anyway. Then no weight may be 0 (looked at on the CPU alone;
    elsewhere such rows get NaN as gradient), and a bias much larger than its weight costs digits of the gradient.

    Returns [..., d] in the dtype of x, contiguous. Gradient to x alone. Raises TypeError or ValueError for bad
    arguments, RuntimeError if `backend` cannot serve.
    """
    checks.floating("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}: allowed is [..., d] with d >= 1")
    checks.optional_table("weight", weight, x.shape[-1:], x)
    checks.optional_table("bias", bias, x.shape[-1:], x)
    checks.number("eps", eps)
    if keep not in ("input", "output"):
        raise ValueError(f"keep={keep!r}: allowed are 'input' and 'output'")
    if keep == "output" and weight is not None:
        checks.no_zero("weight", weight)
    return overload("layer_norm", x.device, backend)(x, weight, bias, float(eps), keep == "output")[0]
