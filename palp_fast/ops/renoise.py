"""Operator renoise: schema, shapes, gradient."""

from __future__ import annotations

from collections.abc import Callable

from palp_fast.ops.registry import differentiable, empty, register
from palp_fast.reference.dtypes import compute_dtype
from palp_fast.reference.renoise import renoise_bwd_ref, renoise_ref


def _renoise_fake(x_t, eps_pred, noise, alpha_bar, alpha_bar_new, copies, dtype):
    return empty(x_t, (copies * x_t.shape[0], *x_t.shape[1:]), dtype or x_t.dtype)


def _renoise_setup(ctx, inputs, output):
    x_t, eps_pred, noise, alpha_bar, alpha_bar_new, copies, _ = inputs
    ctx.save_for_backward(alpha_bar, alpha_bar_new)
    ctx.copies = copies
    ctx.dtypes = (compute_dtype([x_t, eps_pred, noise]), x_t.dtype, eps_pred.dtype, noise.dtype)


def _renoise_backward(bwd: Callable) -> Callable:
    def backward(ctx, grad):
        alpha_bar, alpha_bar_new = ctx.saved_tensors
        return bwd(grad, alpha_bar, alpha_bar_new, ctx.copies, *ctx.dtypes)

    return backward


def _renoise_bwd_fake(grad, alpha_bar, alpha_bar_new, copies, compute, x_dtype, eps_dtype, noise_dtype):
    shape = (alpha_bar.shape[0], *grad.shape[1:])
    return tuple(empty(grad, shape, dtype) for dtype in (x_dtype, eps_dtype, noise_dtype))


register(
    "renoise",
    "(Tensor x_t, Tensor eps_pred, Tensor noise, Tensor alpha_bar, Tensor? alpha_bar_new, SymInt copies, "
    "ScalarType? dtype) -> Tensor",
    renoise_ref,
    _renoise_fake,
)
register(
    "renoise_bwd",
    "(Tensor grad, Tensor alpha_bar, Tensor? alpha_bar_new, SymInt copies, ScalarType compute, ScalarType x_dtype, "
    "ScalarType eps_dtype, ScalarType noise_dtype) -> (Tensor, Tensor, Tensor)",
    renoise_bwd_ref,
    _renoise_bwd_fake,
)
differentiable("renoise", _renoise_setup, _renoise_backward, tracked=(0, 1, 2))
