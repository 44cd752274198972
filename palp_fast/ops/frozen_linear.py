"""Operator frozen_linear: schema, shapes, gradient."""

from __future__ import annotations

from collections.abc import Callable

from palp_fast import autocast
from palp_fast.ops.registry import differentiable, empty, register
from palp_fast.ops.scratch import Scratch
from palp_fast.reference.frozen_linear import frozen_linear_bwd_ref, frozen_linear_ref


def _setup(ctx, inputs, output):
    _, weight, _, *quantised = inputs
    ctx.save_for_backward(weight, *quantised[:1])
    ctx.weight_shape = quantised[1:]


def _backward(bwd: Callable) -> Callable:
    def backward(ctx, grad):
        with autocast.off(grad.device.type):
            return (bwd(grad, *ctx.saved_tensors, *ctx.weight_shape),)

    return backward


register(
    "frozen_linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    frozen_linear_ref,
    lambda x, weight, bias: empty(x, (*x.shape[:-1], weight.shape[0]), x.dtype),
    scratch=Scratch(weight=1, like=0),
)
register(
    "frozen_linear_bwd",
    "(Tensor grad, Tensor weight) -> Tensor",
    frozen_linear_bwd_ref,
    lambda grad, weight: empty(grad, (*grad.shape[:-1], weight.shape[1]), grad.dtype),
    scratch=Scratch(weight=1, like=0),
)
differentiable("frozen_linear", _setup, _backward, tracked=(0,))
