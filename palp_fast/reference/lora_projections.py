"""lora_projections: up to three frozen projections of one input, each with its low-rank term.

    y_i = x W_i^T + scale (x A_i^T) B_i^T,   [W_1; W_2; ...] one matrix of equal parts
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from palp_fast.reference.dtypes import compute_dtype
from palp_fast.reference.lora_linear import add_product, as_rows, scaled


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
    count, compute = len(lora_a), compute_dtype([x, *lora_a])
    bases = F.linear(as_rows(x), weight.to(x.dtype)).chunk(count, dim=-1)
    low = F.linear(x.to(compute), joined(used(lora_a, shadow)).to(compute))
    lows = as_rows(scaled(low, scale, gate)).chunk(count, dim=-1)
    made = [add_product(*terms, b.to(compute).T) for *terms, b in zip(bases, lows, lora_b)]
    made = [y.view(*x.shape[:-1], b.shape[0]) for y, b in zip(made, lora_b)]
    return *made, *(x.new_empty(0) for _ in range(3 - count))


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
    compute, there = compute_dtype([x, *lora_a]), [i for i, g in enumerate((grad_1, grad_2, grad_3)) if g is not None]
    grads = [as_rows((grad_1, grad_2, grad_3)[i]) for i in there]
    wide_x, wide = as_rows(x.to(compute)), [grad.to(compute) for grad in grads]
    lora = joined([used(lora_a, shadow)[i] for i in there]).to(compute)
    d_low = joined([grad @ lora_b[i].to(compute) for i, grad in zip(there, wide)], 1)
    d_low, low = (
        as_rows(scaled(value.view(*x.shape[:-1], len(lora)), scale, gate)) for value in (d_low, F.linear(wide_x, lora)))
    made = [zeros for a, b in zip(lora_a, lora_b) for zeros in (torch.zeros_like(a), torch.zeros_like(b))]
    d_as, lows = (d_low.T @ wide_x).chunk(len(there)), low.chunk(len(there), dim=1)
    for i, grad, d_a, part in zip(there, wide, d_as, lows):
        made[2 * i : 2 * i + 2] = d_a.to(lora_a[i].dtype).contiguous(), (grad.T @ part).to(lora_b[i].dtype)
    made += [x.new_empty(0) for _ in range(6 - len(made))]
    if not need_x:
        return x.new_empty(0), *made
    parts = weight.chunk(len(lora_a))
    frozen = weight if len(there) == len(parts) else joined([parts[i] for i in there])
    d_x = add_product(joined(grads, 1).to(x.dtype) @ frozen.to(x.dtype), d_low, lora)
    return d_x.view(x.shape), *made


def joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    """Their concatenation; a single one itself."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
