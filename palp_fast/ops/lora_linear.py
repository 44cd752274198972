"""Operator lora_linear: schema, shapes, gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch

from palp_fast.ops.registry import differentiable, empty, register
from palp_fast.ops.scratch import Scratch
from palp_fast.reference.lora_linear import lora_linear_bwd_ref, lora_linear_ref


def _fake(x, weight, bias, lora_a, lora_b, residual, scale, gate):
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return empty(x, (*x.shape[:-1], weight.shape[0]), dtype)


def _setup(ctx, inputs, output):
    x, weight, _, lora_a, lora_b, residual, scale, gate, *quantised = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, gate, *quantised[:1])
    ctx.weight_shape = quantised[1:]
    ctx.scale, ctx.residual_dtype = scale, None if residual is None else residual.dtype


def _backward(bwd: Callable) -> Callable:
    def backward(ctx, grad):
        need_x, need_a, need_b, need_residual = ctx.needs_input_grad[-4:]
        d_residual = grad.to(ctx.residual_dtype) if need_residual else None
        # Read once: under gradient checkpointing a second read of saved_tensors is an error.
        x, weight, lora_a, lora_b, gate, *weight_scale = ctx.saved_tensors
        quantised = *weight_scale, *ctx.weight_shape
        d_x, d_a, d_b = bwd(grad, x, weight, lora_a, lora_b, ctx.scale, gate, need_x, *quantised)
        return d_x if need_x else None, d_a if need_a else None, d_b if need_b else None, d_residual

    return backward


def _bwd_fake(grad, x, weight, lora_a, lora_b, scale, gate, need_x):
    return empty(x, x.shape if need_x else (0,), x.dtype), torch.empty_like(lora_a), torch.empty_like(lora_b)


register(
    "lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? residual, float scale, "
    "Tensor? gate) -> Tensor",
    lora_linear_ref,
    _fake,
    triton="lora.lora_linear_fwd",
    scratch=Scratch(weight=1, like=0),
)
register(
    "lora_linear_bwd",
    "(Tensor grad, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, float scale, Tensor? gate, bool need_x) "
    "-> (Tensor, Tensor, Tensor)",
    lora_linear_bwd_ref,
    _bwd_fake,
    triton="lora.lora_linear_bwd",
    scratch=Scratch(weight=2, like=1),
)
differentiable("lora_linear", _setup, _backward, tracked=(0, 3, 4, 5))
