"""lora_projections: up to three frozen projections of one input, each with its low-rank term.

    y_i = x W_i^T + scale (x A_i^T) B_i^T,   [W_1; W_2; ...] one matrix of equal parts
"""

from __future__ import annotations

from torch import Tensor

from palp_fast.reference.dtypes import compute_dtype
from palp_fast.reference.lora_linear import lora_linear_bwd_ref, lora_linear_ref


def factors(*pairs: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """a_1, b_1, a_2, b_2, ... with None for those that are absent -> (those A that are there, those B)."""
    there = [factor for factor in pairs if factor is not None]
    return there[::2], there[1::2]


def used(lora_a: list[Tensor], shadow: Tensor | None) -> list[Tensor]:
    """The matrices A that the products read: the parts of the shadow if there is one."""
    return lora_a if shadow is None else list(shadow.chunk(len(lora_a)))


def lora_projections_ref(
    x: Tensor,
    weight: Tensor,
    shadow: Tensor | None,
    a_1: Tensor,
    b_1: Tensor,
    a_2: Tensor | None,
    b_2: Tensor | None,
    a_3: Tensor | None,
    b_3: Tensor | None,
    scale: float,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., d_in], weight [n d_out, d_in], shadow [n r, d_in] -> three of [..., d_out], empty beyond the nth."""
    lora_a, lora_b = factors(a_1, b_1, a_2, b_2, a_3, b_3)
    parts = zip(weight.chunk(len(lora_a)), used(lora_a, shadow), lora_b)
    made = [lora_linear_ref(x, part, None, a, b, None, scale, gate) for part, a, b in parts]
    return *made, *(x.new_empty(0) for _ in range(3 - len(made)))


def lora_projections_bwd_ref(
    grad_1: Tensor | None,
    grad_2: Tensor | None,
    grad_3: Tensor | None,
    x: Tensor,
    weight: Tensor,
    shadow: Tensor | None,
    a_1: Tensor,
    b_1: Tensor,
    a_2: Tensor | None,
    b_2: Tensor | None,
    a_3: Tensor | None,
    b_3: Tensor | None,
    scale: float,
    gate: Tensor | None,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(d_x, d_a_1, d_b_1, d_a_2, ...), what is absent or not wanted empty; a gradient that is None counts as zero."""
    lora_a, lora_b = factors(a_1, b_1, a_2, b_2, a_3, b_3)
    parts = weight.chunk(len(lora_a))
    d_x, made = x.new_zeros(x.shape, dtype=compute_dtype([x, *lora_a])) if need_x else None, []
    for grad, part, a, b, master in zip((grad_1, grad_2, grad_3), parts, used(lora_a, shadow), lora_b, lora_a):
        if grad is None:
            made += [master.new_zeros(master.shape), b.new_zeros(b.shape)]
            continue
        part_x, d_a, d_b = lora_linear_bwd_ref(grad, x, part, a, b, scale, gate, need_x)
        made += [d_a.to(master.dtype), d_b]
        if need_x:
            d_x += part_x
    made += [x.new_empty(0) for _ in range(6 - len(made))]
    return (d_x.to(x.dtype) if need_x else x.new_empty(0), *made)
