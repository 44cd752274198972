"""quantise: a frozen weight in 8 or 4 bits a number."""

from __future__ import annotations

import torch
from torch import Tensor

from palp_fast import checks
from palp_fast.quantised import QuantisedWeight
from palp_fast.reference.layout import channels_last
from palp_fast.reference.quantised import FORMATS, quantise_ref


@torch.no_grad()
def quantise(weight: Tensor, form: str, *, name: str = "weight") -> QuantisedWeight:
    """`weight` in the format `form`, "int8" or "nf4", as reference/quantised.py has them.

    weight: [d_out, d_in] or [d_out, d_in, h, w], floating, rows not empty, all numbers finite (they are read back for
    it, as no operator does); name: of the weight in errors. A channels-last weight keeps its order.

    Raises TypeError or ValueError for bad arguments.
    """
    checks.floating(name, weight)
    if form not in FORMATS:
        raise ValueError(f"form={form!r}: allowed are {', '.join(map(repr, FORMATS))}")
    if weight.dim() not in (2, 4) or weight[:1].numel() == 0:
        allowed = "[d_out, d_in] or [d_out, d_in, h, w] without a 0"
        raise ValueError(f"{name} has shape {list(weight.shape)}: allowed is {allowed}")
    last = channels_last(weight)
    rows = (weight.movedim(1, -1) if last else weight).reshape(weight.shape[0], -1)
    codes, scale = quantise_ref(rows, form)
    if checks.has_values(scale) and not scale.isfinite().all():
        raise ValueError(f"{name} has values that are not finite in fp32: allowed are finite numbers")
    return QuantisedWeight(codes, scale, tuple(weight.shape), weight.dtype, last)
