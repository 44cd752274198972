"""What operators cost: FLOP formulas for torch.utils.flop_counter, which cannot see into them, and bytes moved.

FLOPs count matrix products only, as torch does for its own operators.
"""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula


@register_flop_formula(torch.ops.palp_fast.lora_linear)
def lora_linear_flop(x_shape, weight_shape, bias_shape, lora_a_shape, *_, out_shape=None, **__) -> int:
    """x W^T, x A^T and the product with B^T."""
    (*rows, d_in), d_out, rank = x_shape, weight_shape[0], lora_a_shape[0]
    return 2 * math.prod(rows) * (d_in * d_out + rank * (d_in + d_out))


@register_flop_formula(torch.ops.palp_fast.lora_linear_bwd)
def lora_linear_bwd_flop(
    _grad, x_shape, weight_shape, lora_a_shape, _lora_b, _scale, _gate, need_x, *_, out_shape=None, **__
) -> int:
    """x A^T again, dY B, dA and dB; with the gradient to x also dY W and the product with A."""
    rows, d_in, d_out, rank = math.prod(x_shape[:-1]), x_shape[-1], weight_shape[0], lora_a_shape[0]
    factors = 4 * rows * rank * (d_out + d_in)
    return factors + (2 * rows * d_in * (d_out + rank) if need_x else 0)


@register_flop_formula(torch.ops.palp_fast.lora_projections)
def lora_projections_flop(x_shape, weight_shape, _shadow, a_shape, b_shape, *_, out_shape=None, **__) -> int:
    """As lora_linear, for every projection."""
    count = weight_shape[0] // b_shape[0]
    return count * lora_linear_flop(x_shape, b_shape, None, a_shape)


@register_flop_formula(torch.ops.palp_fast.lora_projections_bwd)
def lora_projections_bwd_flop(*args, out_shape=None, **__) -> int:
    """As lora_linear_bwd, for every projection that has a gradient."""
    *grads, x_shape, _weight, _shadow, a_shape, b_shape = args[:8]
    shapes = (x_shape, b_shape, a_shape, b_shape, None, None, args[14])
    return sum(lora_linear_bwd_flop(grad, *shapes) for grad in grads if grad is not None)


@register_flop_formula(torch.ops.palp_fast.attention)
def attention_flop(q_shape, k_shape, *_, out_shape=None, **__) -> int:
    """q k^T, and the product of its softmax with v."""
    return 4 * math.prod(q_shape) * k_shape[1]


@register_flop_formula(torch.ops.palp_fast.attention_bwd)
def attention_bwd_flop(
    _grad, q_shape, k_shape, _v, _out, _lse, _heads, _scale, _kv_index, need_kv=True, *_, out_shape=None, **__
) -> int:
    """q k^T again, dO v^T and dq; with dk and dv two more."""
    return (10 if need_kv else 6) * math.prod(q_shape) * k_shape[1]


@register_flop_formula(torch.ops.palp_fast.frozen_linear)
def frozen_linear_flop(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    """x W^T."""
    return 2 * math.prod(x_shape) * weight_shape[0]


@register_flop_formula(torch.ops.palp_fast.frozen_linear_bwd)
def frozen_linear_bwd_flop(grad_shape, _weight, *_, out_shape=None, **__) -> int:
    """dY W."""
    return 2 * math.prod(grad_shape) * out_shape[-1]


@register_flop_formula(torch.ops.palp_fast.frozen_conv2d)
def frozen_conv2d_flop(_x_shape, weight_shape, *rest, out_shape=None, **__) -> int:
    """A product of C / groups, h and w terms for each element of the result."""
    return 2 * math.prod(out_shape) * math.prod(_plain_shape(weight_shape, rest[5:])[1:])


@register_flop_formula(torch.ops.palp_fast.frozen_conv2d_bwd)
def frozen_conv2d_bwd_flop(grad_shape, weight_shape, *rest, out_shape=None, **__) -> int:
    """As many: each element of the gradient meets the weights that it was made with."""
    return 2 * math.prod(grad_shape) * math.prod(_plain_shape(weight_shape, rest[5:])[1:])


@register_flop_formula(torch.ops.palp_fast.int8_linear)
def int8_linear_flop(
    codes_shape, _scale, weight_shape, _weight_scale, _bias, low_shape, _lora_b, _dtype, *_, out_shape=None, **__
) -> int:
    """codes W^T, counted as if it were of floating numbers, and the product of low with B^T."""
    return 2 * math.prod(codes_shape) * weight_shape[0] + _low_rank(low_shape, weight_shape)


@register_flop_formula(torch.ops.palp_fast.fp16_linear)
def fp16_linear_flop(x_shape, weight_shape, _bias, low_shape, *_, out_shape=None, **__) -> int:
    """x W^T, and the product of low with B^T."""
    return 2 * math.prod(x_shape) * weight_shape[0] + _low_rank(low_shape, weight_shape)


def _low_rank(low_shape, weight_shape) -> int:
    return 0 if low_shape is None else 2 * math.prod(low_shape) * weight_shape[0]


def _plain_shape(weight_shape, quantised):
    """The shape of a weight that may be quantised; quantised: its scale, its shape, ..., or nothing."""
    return quantised[1] if len(quantised) > 1 and quantised[0] is not None else weight_shape


def _elementwise(*_, out_shape=None, **__) -> int:
    """No matrix product: 0, as torch counts its own pointwise operators."""
    return 0


def bytes_moved(op, args: tuple, results: object) -> int:
    """Least bytes that a call moves: its tensors read once, its results and the tensors that it changes written once.

    op: an overload, torch.ops.palp_fast.renoise.default; args: all of its arguments, in order.
    """
    total = sum(map(_nbytes, _tensors(results)))
    for argument, value in zip(op._schema.arguments, args, strict=True):
        changed = argument.alias_info is not None and argument.alias_info.is_write
        total += sum(map(_nbytes, _tensors(value))) * (2 if changed else 1)
    return total


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


_QUANTISING = ["dequantise", "quantise_rows"]
_POINTWISE = ("score_combination", "renoise", "add_noise", "geglu", "group_norm_silu", "layer_norm")
_PAIRS = [name + suffix for name in _POINTWISE for suffix in ("", "_bwd")]
_OPTIMIZER = ["grad_norm", "adamw", "lion", "optimizer_step", "write_words"]
_SAMPLER = ["timestep_sample", "timestep_update", "philox_words"]
_NONE = (*_PAIRS, *_OPTIMIZER, *_SAMPLER, *_QUANTISING)
register_flop_formula([getattr(torch.ops.palp_fast, name) for name in _NONE])(_elementwise)
