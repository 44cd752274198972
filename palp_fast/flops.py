"""FLOP formulas for torch.utils.flop_counter, which cannot see into an operator. Matrix products only, as for aten."""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula


@register_flop_formula(torch.ops.palp_fast.lora_linear)
def lora_linear_flop(x_shape, weight_shape, bias_shape, lora_a_shape, *_, out_shape=None, **__) -> int:
    """x W^T, x A^T and the product with B^T."""
    rows, (d_out, d_in), rank = math.prod(x_shape[:-1]), weight_shape, lora_a_shape[0]
    return 2 * rows * (d_in * d_out + rank * (d_in + d_out))


@register_flop_formula(torch.ops.palp_fast.lora_linear_bwd)
def lora_linear_bwd_flop(
    _grad, x_shape, _low, weight_shape, lora_a_shape, _lora_b, _scale, _gate, need_x, *_, out_shape=None, **__
) -> int:
    """dY B, dA and dB; with the gradient to x also dY W and the product with A."""
    rows, (d_out, d_in), rank = math.prod(x_shape[:-1]), weight_shape, lora_a_shape[0]
    factors = 2 * rows * rank * (2 * d_out + d_in)
    return factors + (2 * rows * d_in * (d_out + rank) if need_x else 0)


def _elementwise(*_, out_shape=None, **__) -> int:
    """No matrix product: 0, as torch counts its own pointwise operators."""
    return 0


_PAIRS = [name + suffix for name in ("score_combination", "renoise", "add_noise") for suffix in ("", "_bwd")]
_OPTIMIZER = ["grad_norm", "adamw", "lion", "optimizer_step", "write_words"]
_SAMPLER = ["timestep_sample", "timestep_update", "philox_words"]
register_flop_formula([getattr(torch.ops.palp_fast, name) for name in (*_PAIRS, *_OPTIMIZER, *_SAMPLER)])(_elementwise)
