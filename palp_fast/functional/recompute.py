"""Attention that keeps its inputs, its result and the log-sum-exp, and makes q, k and v again in the backward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_PARTS = 11  # tensors of a group: input, weight, shadow, six factors, gate, scale of a quantised weight


class Plan(NamedTuple):
    """What is no tensor: overloads of the two operators, and their numbers."""

    projections: str
    attention: str
    heads: int
    softmax_scale: float
    lora_scale: float


class RecomputedAttention(torch.autograd.Function):
    """apply(plan, k, v, kv_index, *groups) -> [B, N, heads D].

    groups: the _PARTS tensors or None of one call of lora_projections, which makes q, k and v or q alone, and of a
    second one, which makes k and v; k and v are given where no group makes them, else None.
    """

    @staticmethod
    def forward(ctx, plan: Plan, k: Tensor | None, v: Tensor | None, kv_index: Tensor | None, *groups: Tensor | None):
        """Computes as the operators one after another do."""
        attention = getattr(torch.ops.palp_fast.attention, plan.attention)
        made = _project(plan, k, v, groups)
        out, lse = attention(*made, plan.heads, plan.softmax_scale, kv_index)
        ctx.plan = plan
        ctx.save_for_backward(out, lse, k, v, kv_index, *groups)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Gradients to k and v, or to the inputs and factors of the groups."""
        plan, need = ctx.plan, ctx.needs_input_grad
        out, lse, k, v, kv_index, *groups = ctx.saved_tensors
        made = _project(plan, k, v, groups)
        need_kv = k is None or need[1] or need[2]
        attention_bwd = getattr(torch.ops.palp_fast.attention_bwd, plan.attention)
        dq, dk, dv = attention_bwd(grad, *made, out, lse, plan.heads, plan.softmax_scale, kv_index, need_kv)
        grads = []
        for i, d_made in enumerate(_shares(dq, dk, dv, k is None, len(groups) // _PARTS)):
            group, needed = _group(groups, i), _group(need[4:], i)
            grads += _group_gradients(plan, d_made, group, needed)
        return None, dk if need[1] else None, dv if need[2] else None, None, *grads


def _group(values, i: int):
    return values[_PARTS * i : _PARTS * (i + 1)]


def _project(plan: Plan, k: Tensor | None, v: Tensor | None, groups) -> list[Tensor]:
    """[q, k, v]."""
    projections, made = getattr(torch.ops.palp_fast.lora_projections, plan.projections), []
    for i in range(len(groups) // _PARTS):
        *tensors, gate, weight_scale = _group(groups, i)
        results = projections(*tensors, plan.lora_scale, gate, *_quantised(tensors, weight_scale))
        made += [y for y, factor in zip(results, tensors[3::2]) if factor is not None]
    return made if k is None else [*made, k, v]


def _quantised(tensors: list[Tensor | None], weight_scale: Tensor | None) -> tuple:
    """The operators' last arguments."""
    return () if weight_scale is None else (weight_scale, [tensors[1].shape[0], tensors[3].shape[1]])


def _shares(dq: Tensor, dk: Tensor, dv: Tensor, kv_made: bool, count: int) -> list[list[Tensor | None]]:
    """The three gradients that lora_projections_bwd takes, per group."""
    if not kv_made:
        return [[dq, None, None]]
    return [[dq, dk, dv]] if count == 1 else [[dq, None, None], [dk, dv, None]]


def _group_gradients(plan: Plan, d_made: list[Tensor | None], group, needed) -> list[Tensor | None]:
    """One gradient or None for each tensor of a group."""
    *tensors, gate, weight_scale = group
    backward = getattr(torch.ops.palp_fast.lora_projections_bwd, plan.projections)
    quantised = _quantised(tensors, weight_scale)
    d_x, *d_factors = backward(*d_made, *tensors, plan.lora_scale, gate, needed[0], *quantised)
    made = [d_x, None, None, *d_factors, None, None]
    return [value if need else None for value, need in zip(made, needed)]
