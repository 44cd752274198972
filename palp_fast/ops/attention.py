"""Operator attention: schema, shapes, gradient."""

from __future__ import annotations

from collections.abc import Callable

from palp_fast.ops.registry import differentiable, empty, register
from palp_fast.reference.attention import attention_bwd_ref, attention_ref
from palp_fast.reference.dtypes import compute_dtype


def _fake(q, k, v, heads, scale, kv_index):
    rows, length, _ = q.shape
    return empty(q, q.shape, q.dtype), empty(q, (rows, heads, length), compute_dtype([q]))


def _setup(ctx, inputs, output):
    q, k, v, heads, scale, kv_index = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, kv_index)
    ctx.heads, ctx.scale = heads, scale


def _backward(bwd: Callable) -> Callable:
    def backward(ctx, d_out, d_lse):
        need_q, need_k, need_v = ctx.needs_input_grad[-3:]
        *tensors, kv_index = ctx.saved_tensors
        dq, dk, dv = bwd(d_out, *tensors, ctx.heads, ctx.scale, kv_index, need_k or need_v)
        return dq if need_q else None, dk if need_k else None, dv if need_v else None

    return backward


def _bwd_fake(grad, q, k, v, out, lse, heads, scale, kv_index, need_kv=True):
    dk, dv = (empty(x, x.shape if need_kv else (0,), x.dtype) for x in (k, v))
    return empty(q, q.shape, q.dtype), dk, dv


register(
    "attention",
    "(Tensor q, Tensor k, Tensor v, int heads, float scale, Tensor? kv_index) -> (Tensor, Tensor)",
    attention_ref,
    _fake,
    triton="attention.attention_fwd",
)
register(
    "attention_bwd",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int heads, float scale, Tensor? kv_index, "
    "bool need_kv=True) -> (Tensor, Tensor, Tensor)",
    attention_bwd_ref,
    _bwd_fake,
    triton="attention_bwd.attention_bwd",
)
differentiable("attention", _setup, _backward, tracked=(0, 1, 2))
