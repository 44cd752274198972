"""Operator frozen_conv2d: schema, shapes, gradient."""

from __future__ import annotations

from collections.abc import Callable

from palp_fast import autocast
from palp_fast.ops.registry import differentiable, register
from palp_fast.ops.scratch import Scratch
from palp_fast.reference.frozen_conv2d import convolved, frozen_conv2d_bwd_ref, frozen_conv2d_ref
from palp_fast.reference.layout import channels_last, empty_image


def _fake(x, weight, bias, stride, padding, dilation, groups):
    size = [convolved(*sides) for sides in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation)]
    return empty_image(x, (x.shape[0], weight.shape[0], *size), channels_last(x) or channels_last(weight))


def _bwd_fake(grad, weight, size, stride, padding, dilation, groups):
    shape = (grad.shape[0], weight.shape[1] * groups, *size)
    return empty_image(grad, shape, channels_last(grad) or channels_last(weight))


def _setup(ctx, inputs, output):
    x, weight, _, *rest = inputs
    ctx.options, quantised = rest[:4], rest[4:]
    ctx.size = list(x.shape[2:])
    ctx.save_for_backward(weight, *quantised[:1])
    ctx.weight_shape = quantised[1:]


def _backward(bwd: Callable) -> Callable:
    def backward(ctx, grad):
        with autocast.off(grad.device.type):
            weight, *weight_scale = ctx.saved_tensors
            return (bwd(grad, weight, ctx.size, *ctx.options, *weight_scale, *ctx.weight_shape),)

    return backward


_OPTIONS = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"

register(
    "frozen_conv2d",
    f"(Tensor x, Tensor weight, Tensor? bias, {_OPTIONS}) -> Tensor",
    frozen_conv2d_ref,
    _fake,
    scratch=Scratch(weight=1, like=0),
)
register(
    "frozen_conv2d_bwd",
    f"(Tensor grad, Tensor weight, SymInt[2] size, {_OPTIONS}) -> Tensor",
    frozen_conv2d_bwd_ref,
    _bwd_fake,
    scratch=Scratch(weight=1, like=0),
)
differentiable("frozen_conv2d", _setup, _backward, tracked=(0,))
