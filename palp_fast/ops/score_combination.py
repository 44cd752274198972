"""Operator score_combination: schema, shapes, gradient."""

from __future__ import annotations

from collections.abc import Callable

from palp_fast import checks
from palp_fast.ops.registry import differentiable, empty, is_last_use, register
from palp_fast.reference.dtypes import compute_dtype
from palp_fast.reference.score_combination import score_combination_bwd_ref, score_combination_ref


def _score_fake(pred, target, predictions, *_):
    dtype = compute_dtype([pred, target, *predictions])
    return empty(pred, (), dtype), empty(pred, (pred.shape[0], 3), dtype), empty(pred, pred.shape, dtype)


def _score_setup(ctx, inputs, output):
    _, stats, gradient = output
    ctx.mark_non_differentiable(stats, gradient)
    ctx.save_for_backward(gradient)
    ctx.dtype = inputs[0].dtype


def _score_backward(bwd: Callable) -> Callable:
    def backward(ctx, d_loss, d_stats, d_gradient):
        (gradient,) = ctx.saved_tensors
        if ctx.is_ours and gradient.is_cpu and gradient.dtype == ctx.dtype and is_last_use():
            # As bwd, without memory for a result; of a loss that is nobody's addend, without a pass.
            return (gradient if checks.is_one(d_loss) else gradient.mul_(d_loss.to(gradient.dtype)),)
        return (bwd(d_loss, gradient, ctx.dtype),)

    return backward


register(
    "score_combination",
    "(Tensor pred, Tensor target, Tensor[] predictions, float[] factors, Tensor? coefficients, float residual_weight, "
    "Tensor? residual_scale, Tensor? sample_weight, Tensor? mask) -> (Tensor, Tensor, Tensor)",
    score_combination_ref,
    _score_fake,
)
register(
    "score_combination_bwd",
    "(Tensor grad_output, Tensor gradient, ScalarType dtype) -> Tensor",
    score_combination_bwd_ref,
    lambda grad_output, gradient, dtype: empty(gradient, gradient.shape, dtype),
)
differentiable("score_combination", _score_setup, _score_backward, tracked=(0,))
