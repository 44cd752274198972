"""lora_attention: projections with LoRA, softmax attention, out projection with LoRA, bias and residual."""

from __future__ import annotations

import torch
from torch import Tensor

from palp_fast import autocast, checks
from palp_fast.functional.attention import attention
from palp_fast.functional.lora import lora_linear_residual, lora_projections, projection_arguments
from palp_fast.functional.recompute import Plan, RecomputedAttention
from palp_fast.functional.weights import AttentionWeights
from palp_fast.ops.registry import kind


def lora_attention(
    x: Tensor,
    context: Tensor | None,
    weights: AttentionWeights,
    heads: int,
    *,
    lora_scale: float | Tensor = 1.0,
    softmax_scale: float | None = None,
    kv: tuple[Tensor, Tensor] | None = None,
    kv_index: Tensor | None = None,
    residual: Tensor | None = None,
    recompute: bool = False,
    provider: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """softmax(softmax_scale q k^T) v W_out^T + bias + residual, every projection with its low-rank term.

    x: [B, N, d], makes q; k and v come from x (context None: self-attention), from context [P, M, d_c], the distinct
    prompts, or are given as kv, two of [P, M, d], without a low-rank term. kv_index: [B] int64, which prompt a row
    attends to; None: its own, P = B. lora_scale: a float, or [B]; rows that share a prompt of context must then share
    the factor, for that prompt's k and v have it, too (on the CPU that is checked). softmax_scale: None is
    (d / heads)^-0.5. residual: [B, N, d], added.

    Returns [B, N, d] in the dtype of x (under autocast: the autocast dtype), or in that of residual if it is wider.
    Gradients to x, context, kv, residual and every LoRA factor, those of a prompt summed over its rows; to no weight.
    Keeps x, context, q, k, v, the attention's result and one number per row and head; with `recompute` not q, k and v,
    which the backward pass then makes again. provider, of the softmax attention: as in `attention`; with `recompute`
    this package's operator alone, "auto" or "triton". Raises TypeError or ValueError for bad arguments, RuntimeError
    if `provider` or `backend` cannot serve.
    """
    _check(x, context, weights, heads, kv, kv_index)
    if recompute and provider not in ("auto", "triton"):
        raise ValueError(f"provider={provider!r} with recompute=True: allowed are 'auto' and 'triton'")
    if softmax_scale is None:
        softmax_scale = (weights.out.shape[1] // heads) ** -0.5
    checks.positive("softmax_scale", softmax_scale)
    device = x.device.type
    dtype = autocast.dtype_on(device) or x.dtype
    x, context, *kv = (None if value is None else value.to(dtype) for value in (x, context, *(kv or ())))
    with autocast.off(device):
        inputs = _inputs(x, context, weights, lora_scale, kv_index)
        attended = _recomputed if recompute and torch.is_grad_enabled() else _attended
        made = attended(inputs, kv, kv_index, heads, softmax_scale, provider, backend)
        out = (weights.out, weights.out_bias, *weights.out_lora)
        return lora_linear_residual(made, *out, residual, lora_scale, backend=backend)


def _inputs(x, context, weights, lora_scale, kv_index) -> list[tuple]:
    """(input, Projections, strength) of every call of lora_projections."""
    if isinstance(lora_scale, Tensor):
        checks.gate("lora_scale", lora_scale, x)
    calls = [(x, weights.inputs[0], lora_scale)]
    if context is not None:
        calls.append((context, weights.inputs[1], _per_prompt(lora_scale, kv_index, context)))
    return calls


def _per_prompt(lora_scale: float | Tensor, kv_index: Tensor | None, context: Tensor) -> float | Tensor:
    """The factor of every prompt: that of its rows."""
    if kv_index is None or not isinstance(lora_scale, Tensor):
        return lora_scale
    factors = lora_scale.new_zeros(context.shape[0]).scatter(0, kv_index, lora_scale)
    checks.one_for_each("lora_scale", lora_scale, factors, "prompt of kv_index", kv_index)
    return factors


def _attended(inputs, kv, kv_index, heads, softmax_scale, provider, backend) -> Tensor:
    """The attention of `_inputs` and kv, [k, v] or empty."""
    q, k, v = (*(y for call in inputs for y in lora_projections(*call, backend=backend)), *kv)
    options = {"softmax_scale": softmax_scale, "kv_index": kv_index, "provider": provider, "backend": backend}
    return attention(q, k, v, heads, **options)


def _recomputed(inputs, kv, kv_index, heads, softmax_scale, provider, backend) -> Tensor:
    """The same by one node of the graph."""
    groups = []
    for call in inputs:
        arguments = projection_arguments(*call)
        tensors, (number, gate, *quantised) = arguments[:9], arguments[9:]
        groups += [*tensors, gate, quantised[0] if quantised else None]
    device = inputs[0][0].device
    asked = provider if backend == "auto" else backend
    kinds = kind("lora_projections", device, backend), kind("attention", device, asked)
    plan = Plan(*kinds, heads, float(softmax_scale), number)
    return RecomputedAttention.apply(plan, *(kv or (None, None)), kv_index, *groups)


def _check(x, context, weights, heads, kv, kv_index) -> None:
    """Which of x, context and kv make keys and values, and that their shapes fit."""
    checks.floating("x", x)
    if x.dim() != 3:
        raise ValueError(f"x has shape {list(x.shape)}: allowed is [B, N, d]")
    if not isinstance(weights, AttentionWeights):
        raise TypeError(f"weights={type(weights).__name__}: allowed is AttentionWeights")
    if context is not None and kv is not None:
        raise ValueError("context and kv are both given: allowed is one of them, or neither for self-attention")
    form = "kv" if kv is not None else "context" if context is not None else "self-attention"
    counts = [projections.count for projections in weights.inputs]
    if counts not in {"kv": ([1], [1, 2]), "context": ([1, 2],), "self-attention": ([3],)}[form]:
        allowed = {"kv": 'cross=True or with "q" alone', "context": "cross=True", "self-attention": "cross=False"}[form]
        raise ValueError(f"weights do not fit {form}: allowed are those packed with {allowed}")
    checks.integer("heads", heads, minimum=1)
    if (width := weights.out.shape[1]) % heads:
        raise ValueError(f"heads={heads}: allowed is a divisor of {width}, the width of q")
    prompts = x.shape[0]
    if context is not None:
        checks.floating("context", context)
        if context.dim() != 3:
            raise ValueError(f"context has shape {list(context.shape)}: allowed is [P, M, d_c]")
        prompts = context.shape[0]
    if kv is not None:
        _check_kv(kv, width, x)
        prompts = kv[0].shape[0]
    if kv_index is not None:
        checks.indices("kv_index", kv_index, x)
        checks.below("kv_index", kv_index, prompts)
    elif prompts != x.shape[0]:
        given = f"{form} has {prompts} prompts for {x.shape[0]} rows of x"
        raise ValueError(f"{given}: allowed are as many, or a kv_index")


def _check_kv(kv: tuple[Tensor, Tensor], width: int, x: Tensor) -> None:
    checks.floating("kv[0]", kv[0])
    if kv[0].dim() != 3 or kv[0].shape[2] != width:
        raise ValueError(f"kv[0] has shape {list(kv[0].shape)}: allowed is [P, M, {width}]")
    checks.table("kv[0]", kv[0], kv[0].shape, x)
    checks.table("kv[1]", kv[1], kv[0].shape, x)
