"""inexact_products: products of fewer bits, where asked for, in passes without a gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from palp_fast.ops.registry import overload
from palp_fast.quantised import QuantisedWeight, Weight, operands
from palp_fast.reference.lora_linear import scaled

KINDS = ("int8", "fp16")
_kind: str | None = None


@contextlib.contextmanager
def inexact_products(kind: str) -> Iterator[None]:
    """Within, frozen products of linear layers are made with fewer bits: an error of about a percent, off by default.

    frozen_linear, lora_linear, lora_projections and lora_attention obey; low-rank terms and biases stay exact. Other
    products run as ever. Asking for a gradient within raises RuntimeError: use it under torch.no_grad().

    kind "int8": of int8 weights; x is quantised row by row, the int8 products are summed exactly. kind "fp16": for x in
    fp16; every 64 products are summed in fp16, which overflows above 65504. docs/quantised.md has errors seen.

    Raises ValueError for another kind.
    """
    global _kind
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: allowed are {', '.join(map(repr, KINDS))}")
    before, _kind = _kind, kind
    try:
        yield
    finally:
        _kind = before


def asked(x: Tensor, weight: Weight, *others: Tensor | None) -> bool:
    """Whether x W^T is to be inexact. Raises RuntimeError if so and there is a gradient to x or any of the others."""
    serves = _kind == "int8" and isinstance(weight, QuantisedWeight) and weight.form == "int8"
    if not serves and not (_kind == "fp16" and x.dtype == torch.float16):
        return False
    if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in (x, *others)):
        raise RuntimeError(f"inexact_products({_kind!r}) has no gradient: allowed is torch.no_grad()")
    return True


def linear(x: Tensor, weight: Weight, bias: Tensor | None, backend: str) -> Tensor:
    """x W^T + bias in the dtype of x, inexact."""
    return _products(x, [weight], bias, [None], backend)[0]


def lora(
    x: Tensor,
    weights: list[Weight],
    bias: Tensor | None,
    pairs: list[tuple[Tensor, Tensor]],
    scale: float,
    gate: Tensor | None,
    backend: str,
) -> list[Tensor]:
    """x W^T + bias + scale gate (x A^T) B^T for every weight and pair, in the dtype of x, inexact in x W^T alone."""
    wide = x.to(torch.float32)
    terms = [(_rows(scaled(F.linear(wide, a.to(torch.float32)), scale, gate)), b) for a, b in pairs]
    return _products(x, weights, bias, terms, backend)


def _products(x: Tensor, weights: list[Weight], bias: Tensor | None, terms: list, backend: str) -> list[Tensor]:
    made, rows = [], _rows(x)
    if _kind == "int8":
        left = overload("quantise_rows", x.device, backend)(rows)
        op = overload("int8_linear", x.device, backend)
    else:
        op = overload("fp16_linear", x.device, backend)
    for weight, term in zip(weights, terms):
        low, lora_b = (None, None) if term is None else term
        if _kind == "int8":
            y = op(*left, weight.codes, weight.scale, bias, low, lora_b, x.dtype)
        else:
            codes, quantised = operands(weight)
            y = op(rows, codes, bias, low, lora_b, *quantised)
        made.append(y.view(*x.shape[:-1], weight.shape[0]))
    return made


def _rows(value: Tensor) -> Tensor:
    return value.reshape(value.shape[:-1].numel(), value.shape[-1])
