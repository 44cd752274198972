"""Operator geglu: schema, shapes, gradient."""

from __future__ import annotations

from collections.abc import Callable

from palp_fast.ops.registry import differentiable, empty, register
from palp_fast.reference.geglu import geglu_bwd_ref, geglu_ref


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward(bwd: Callable) -> Callable:
    def backward(ctx, grad):
        return (bwd(grad, *ctx.saved_tensors),)

    return backward


register(
    "geglu",
    "(Tensor x) -> Tensor",
    geglu_ref,
    lambda x: empty(x, (*x.shape[:-1], x.shape[-1] // 2), x.dtype),
    triton="geglu.geglu_fwd",
)
register(
    "geglu_bwd",
    "(Tensor grad, Tensor x) -> Tensor",
    geglu_bwd_ref,
    lambda grad, x: empty(x, x.shape, x.dtype),
    triton="geglu.geglu_bwd",
)
differentiable("geglu", _setup, _backward, tracked=(0,))
