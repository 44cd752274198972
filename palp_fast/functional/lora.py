"""lora_linear and lora_projections: frozen projections with low-rank terms."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from palp_fast import autocast, checks
from palp_fast.functional import inexact
from palp_fast.functional.weights import Projections
from palp_fast.ops.registry import overload
from palp_fast.quantised import Weight, operands


def lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_scale: float | Tensor = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """x W^T + bias + lora_scale (x A^T) B^T, the low-rank term never merged into W (Hu et al., arXiv 2106.09685).

    x: [..., d_in]; weight: [d_out, d_in], frozen, of any floating dtype or quantised; bias: [d_out] or None; lora_a:
    [r, d_in] and lora_b: [d_out, r], usually fp32; lora_scale: a float, or [B] with B = x.shape[0], one per sample.
    The frozen product runs in the dtype of x (under autocast: the autocast dtype), the low-rank term is summed in fp32.

    Returns [..., d_out] in that dtype. Gradients to x, lora_a and lora_b (in their own dtypes), to nothing else. Keeps
    x alone. Raises TypeError or ValueError for bad arguments, RuntimeError if `backend` cannot serve.
    """
    return lora_linear_residual(x, weight, bias, lora_a, lora_b, None, lora_scale, backend=backend)


def lora_linear_residual(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    residual: Tensor | None,
    lora_scale: float | Tensor = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """`lora_linear` plus residual [..., d_out], which receives its gradient; in the wider of both dtypes."""
    checks.floating("x", x)
    checks.lora(x, weight, bias, lora_a, lora_b)
    if residual is not None:
        checks.table("residual", residual, (*x.shape[:-1], weight.shape[0]), x)
    scale, gate = _strength(lora_scale, x)
    op = overload("lora_linear", x.device, backend)

    def run(x: Tensor) -> Tensor:
        if inexact.asked(x, weight, lora_a, lora_b, residual):
            (y,) = inexact.lora(x, [weight], bias, [(lora_a, lora_b)], scale, gate, backend)
            return y if residual is None else y + residual
        plain, quantised = operands(weight)
        return op(x, plain, bias, lora_a, lora_b, residual, scale, gate, *quantised)

    return _in_autocast_dtype(run, x)


def lora_projections(
    x: Tensor, weights: Projections, lora_scale: float | Tensor = 1.0, *, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """x W_i^T + lora_scale (x A_i^T) B_i^T for the one to three projections of one input that `weights` packs.

    x: [..., d_in]; lora_scale: a float, or [B] with B = x.shape[0]. Where `weights` has shadows in the dtype of x, the
    products read these in place of the matrices A. Returns the projections [..., d_out], dtypes as of `lora_linear`.
    Gradients to x and to every lora_a and lora_b. Keeps x alone. Errors as of `lora_linear`.
    """
    checks.floating("x", x)
    op = overload("lora_projections", x.device, backend)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        arguments = projection_arguments(x, weights, lora_scale)
        if inexact.asked(x, weights.weight, *weights.lora_a, *weights.lora_b):
            pairs = list(zip(weights.lora_a, weights.lora_b))
            return tuple(inexact.lora(x, weights.parts, None, pairs, *arguments[9:11], backend))
        return op(*arguments)[: weights.count]

    return _in_autocast_dtype(run, x)


def projection_arguments(x: Tensor, weights: Projections, lora_scale: float | Tensor) -> list:
    """The arguments of the operator lora_projections, checked."""
    checks.floating("x", x)
    checks.projected(x, weights.weight)
    scale, gate = _strength(lora_scale, x)
    weight, quantised = operands(weights.weight)
    shadow = weights.shadow
    if shadow is not None and shadow.dtype != x.dtype:
        shadow = None
    return [x, weight, shadow, *weights.factors(), scale, gate, *quantised]


def _strength(lora_scale: float | Tensor, x: Tensor) -> tuple[float, Tensor | None]:
    """(factor of all samples, factor of each or None)."""
    if isinstance(lora_scale, Tensor):
        return 1.0, checks.gate("lora_scale", lora_scale, x)
    checks.number("lora_scale", lora_scale)
    return float(lora_scale), None


def _in_autocast_dtype(run: Callable, x: Tensor):
    """run(x), under autocast with x in the autocast dtype and nothing else converted."""
    kind = x.device.type
    x = x.to(autocast.dtype_on(kind) or x.dtype)
    with autocast.off(kind):
        return run(x)
