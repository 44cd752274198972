"""Operator lora_linear: schema, shapes, gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch

from palp_fast.ops.registry import differentiable, empty, register
from palp_fast.reference.dtypes import compute_dtype
from palp_fast.reference.lora_linear import lora_linear_bwd_ref, lora_linear_ref


def _lora_fake(x, weight, bias, lora_a, lora_b, scale, gate):
    rows = x.shape[:-1]
    low_dtype = compute_dtype([x, lora_a])
    return empty(x, (*rows, weight.shape[0]), x.dtype), empty(x, (*rows, lora_a.shape[0]), low_dtype)


def _lora_setup(ctx, inputs, output):
    x, weight, _, lora_a, lora_b, scale, gate = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight, lora_a, lora_b, gate)
    ctx.scale = scale


def _lora_backward(bwd: Callable) -> Callable:
    def backward(ctx, d_y, d_low):
        need_x, need_a, need_b = ctx.needs_input_grad[-3:]
        # Read once: under gradient checkpointing a second read of saved_tensors is an error.
        *tensors, gate = ctx.saved_tensors
        d_x, d_a, d_b = bwd(d_y, *tensors, ctx.scale, gate, need_x)
        return d_x if need_x else None, d_a if need_a else None, d_b if need_b else None

    return backward


def _lora_bwd_fake(grad, x, low, weight, lora_a, lora_b, scale, gate, need_x):
    return empty(x, x.shape if need_x else (0,), x.dtype), torch.empty_like(lora_a), torch.empty_like(lora_b)


register(
    "lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale, Tensor? gate) "
    "-> (Tensor, Tensor)",
    lora_linear_ref,
    _lora_fake,
)
register(
    "lora_linear_bwd",
    "(Tensor grad, Tensor x, Tensor low, Tensor weight, Tensor lora_a, Tensor lora_b, float scale, Tensor? gate, "
    "bool need_x) -> (Tensor, Tensor, Tensor)",
    lora_linear_bwd_ref,
    _lora_bwd_fake,
)
differentiable("lora_linear", _lora_setup, _lora_backward, tracked=(0, 3, 4))
