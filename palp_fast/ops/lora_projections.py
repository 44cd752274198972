"""Operator lora_projections: schema, shapes, gradient."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from palp_fast.ops.registry import differentiable, empty, register
from palp_fast.ops.scratch import Scratch
from palp_fast.reference.lora_projections import lora_projections_bwd_ref, lora_projections_ref

_FACTORS = "Tensor a_1, Tensor b_1, Tensor? a_2, Tensor? b_2, Tensor? a_3, Tensor? b_3"
_GRADS = "Tensor? grad_1, Tensor? grad_2, Tensor? grad_3"
_TENSORS = 9  # x, weight, shadow, factors


def _fake(x, weight, shadow, a_1, b_1, a_2, b_2, a_3, b_3, scale, gate):
    made = [empty(x, (0,) if b is None else (*x.shape[:-1], b.shape[0]), x.dtype) for b in (b_1, b_2, b_3)]
    return tuple(made)


def _setup(ctx, inputs, output):
    tensors, (ctx.scale, gate, *quantised) = inputs[:_TENSORS], inputs[_TENSORS:]
    ctx.mark_non_differentiable(*(y for y, b in zip(output, inputs[4:9:2]) if b is None))
    ctx.save_for_backward(*tensors, gate, *quantised[:1])
    ctx.weight_shape = quantised[1:]


def _backward(bwd: Callable) -> Callable:
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[-7:]
        # Read once: under gradient checkpointing a second read of saved_tensors is an error.
        saved = ctx.saved_tensors
        tensors, (gate, *weight_scale) = saved[:_TENSORS], saved[_TENSORS:]
        made = bwd(*grads, *tensors, ctx.scale, gate, needed[0], *weight_scale, *ctx.weight_shape)
        return tuple(value if need else None for value, need in zip(made, needed))

    return backward


def _bwd_fake(grad_1, grad_2, grad_3, x, weight, shadow, a_1, b_1, a_2, b_2, a_3, b_3, scale, gate, need_x):
    d_x = empty(x, x.shape if need_x else (0,), x.dtype)
    return d_x, *(_like(factor, x) for factor in (a_1, b_1, a_2, b_2, a_3, b_3))


def _like(factor: Tensor | None, x: Tensor) -> Tensor:
    return empty(x, (0,), x.dtype) if factor is None else empty(factor, factor.shape, factor.dtype)


register(
    "lora_projections",
    f"(Tensor x, Tensor weight, Tensor? shadow, {_FACTORS}, float scale, Tensor? gate) -> (Tensor, Tensor, Tensor)",
    lora_projections_ref,
    _fake,
    triton="lora.lora_projections_fwd",
    scratch=Scratch(weight=1, like=0),
)
register(
    "lora_projections_bwd",
    f"({_GRADS}, Tensor x, Tensor weight, Tensor? shadow, {_FACTORS}, float scale, Tensor? gate, bool need_x) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lora_projections_bwd_ref,
    _bwd_fake,
    triton="lora.lora_projections_bwd",
    scratch=Scratch(weight=4, like=3),
)
differentiable("lora_projections", _setup, _backward, tracked=(0, 3, 4, 5, 6, 7, 8))
