"""Operator layer_norm: schema, shapes, gradient."""

from __future__ import annotations

from collections.abc import Callable

from palp_fast.ops.registry import differentiable, empty, register
from palp_fast.reference.dtypes import compute_dtype
from palp_fast.reference.layer_norm import layer_norm_bwd_ref, layer_norm_ref


def _fake(x, weight, bias, eps, from_output):
    rows, dtype = x.shape[:-1], compute_dtype([x])
    return empty(x, x.shape, x.dtype), empty(x, rows, dtype), empty(x, rows, dtype)


def _setup(ctx, inputs, output):
    x, weight, bias, _, from_output = inputs
    y, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*((y, None) if from_output else (x, mean)), rstd, weight, bias)


def _backward(bwd: Callable) -> Callable:
    def backward(ctx, grad, d_mean, d_rstd):
        return (bwd(grad, *ctx.saved_tensors),)

    return backward


register(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, bool from_output) -> (Tensor, Tensor, Tensor)",
    layer_norm_ref,
    _fake,
    triton="layer_norm.layer_norm_fwd",
)
register(
    "layer_norm_bwd",
    "(Tensor grad, Tensor kept, Tensor? mean, Tensor rstd, Tensor? weight, Tensor? bias) -> Tensor",
    layer_norm_bwd_ref,
    lambda grad, kept, *_: empty(kept, kept.shape, kept.dtype),
    triton="layer_norm.layer_norm_bwd",
)
differentiable("layer_norm", _setup, _backward, tracked=(0,))
