"""Operator group_norm_silu: schema, shapes, gradient."""

from __future__ import annotations

from collections.abc import Callable

from palp_fast.ops.registry import differentiable, empty, register
from palp_fast.reference.dtypes import compute_dtype
from palp_fast.reference.group_norm import group_norm_silu_bwd_ref, group_norm_silu_ref
from palp_fast.reference.layout import empty_in_layout_of


def _fake(x, groups, weight, bias, eps, silu):
    shape, dtype = (x.shape[0], groups), compute_dtype([x])
    return empty_in_layout_of(x), empty(x, shape, dtype), empty(x, shape, dtype)


def _setup(ctx, inputs, output):
    x, _, weight, bias, _, silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias)
    ctx.silu = silu


def _backward(bwd: Callable) -> Callable:
    def backward(ctx, grad, d_mean, d_rstd):
        return (bwd(grad, *ctx.saved_tensors, ctx.silu),)

    return backward


register(
    "group_norm_silu",
    "(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, bool silu) -> (Tensor, Tensor, Tensor)",
    group_norm_silu_ref,
    _fake,
    triton="group_norm.group_norm_silu_fwd",
)
register(
    "group_norm_silu_bwd",
    "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, bool silu) -> Tensor",
    group_norm_silu_bwd_ref,
    lambda grad, x, *_: empty_in_layout_of(x),
    triton="group_norm_bwd.group_norm_silu_bwd",
)
differentiable("group_norm_silu", _setup, _backward, tracked=(0,))
