"""Operator add_noise: schema, shapes, gradient."""

from __future__ import annotations

from collections.abc import Callable

from palp_fast.ops.registry import differentiable, empty, register
from palp_fast.reference.add_noise import add_noise_bwd_ref, add_noise_ref


def _add_noise_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[1], inputs[2])


def _add_noise_backward(bwd: Callable) -> Callable:
    def backward(ctx, d_x_t, d_noise):
        t, alphas_cumprod = ctx.saved_tensors
        return (bwd(d_x_t, t, alphas_cumprod),)

    return backward


register(
    "add_noise",
    "(Tensor x0, Tensor t, Tensor alphas_cumprod, Tensor seed, Tensor step, Tensor sample_offset, int stream) "
    "-> (Tensor, Tensor)",
    add_noise_ref,
    lambda x0, *_: (empty(x0, x0.shape, x0.dtype), empty(x0, x0.shape, x0.dtype)),
)
register(
    "add_noise_bwd",
    "(Tensor grad, Tensor t, Tensor alphas_cumprod) -> Tensor",
    add_noise_bwd_ref,
    lambda grad, t, alphas_cumprod: empty(grad, grad.shape, grad.dtype),
)
differentiable("add_noise", _add_noise_setup, _add_noise_backward, tracked=(0,))
