"""Operators of the optimizers: gradient norm, update rules, and one whole step by tables of addresses.

`grad_norm`, `adamw` and `lion` name every tensor that they read or change, so torch.compile can trace them. Handing
over hundreds of tensors costs more than the update itself; the optimizers therefore call `optimizer_step`, which finds
them by the addresses in palp_fast.optim_table.StepTable. It exists only in the compiled libraries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palp_fast.ops.registry import LIBRARY, register
from palp_fast.reference.optimizers import adamw_ref, grad_norm_ref, lion_ref

RULES = ("adamw", "lion")


def _changes_nothing(*_) -> None:
    """The shape function of an operator that returns nothing."""


def _write_words_ref(out: Tensor, words: list[int]) -> None:
    # One by one: a copy from host memory may wait for the device.
    for place, word in zip(out.unbind(), words, strict=True):
        place.fill_(word)


def _count_versions(name: str, mutated: tuple[int, ...]) -> None:
    """Lets autograd notice that arguments number `mutated` have changed, as torch's own in-place operators do."""
    for overload in ("default", "reference"):
        op = getattr(getattr(torch.ops.palp_fast, name), overload)

        def kernel(keyset, *args, op=op):
            for index in mutated:
                tensors = args[index] if isinstance(args[index], (list, tuple)) else [args[index]]
                torch.autograd.graph.increment_version(tensors)
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

        qualified = name if overload == "default" else f"{name}.{overload}"
        LIBRARY.impl(qualified, kernel, "ADInplaceOrView", with_keyset=True)


register(
    "grad_norm",
    "(Tensor[] grads, Tensor? grad_scale, Tensor? found_inf, float max_norm) -> (Tensor, Tensor)",
    grad_norm_ref,
    lambda grads, *_: (grads[0].new_empty((), dtype=torch.float32), grads[0].new_empty(2, dtype=torch.float32)),
)
register(
    "adamw",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] shadows, Tensor(c!) steps, Tensor(d!)[] exp_avg, "
    "Tensor(e!)[] exp_avg_sq, Tensor verdict, Tensor group, int block_size) -> ()",
    adamw_ref,
    _changes_nothing,
)
register(
    "lion",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] shadows, Tensor(c!) steps, Tensor(d!)[] exp_avg, "
    "Tensor verdict, Tensor group, int block_size) -> ()",
    lion_ref,
    _changes_nothing,
)
register("write_words", "(Tensor(a!) out, int[] words) -> ()", _write_words_ref, _changes_nothing)
_count_versions("adamw", (0, 2, 3, 4, 5))
_count_versions("lion", (0, 2, 3, 4))
LIBRARY.define(
    "optimizer_step(int rule, Tensor tensors, Tensor gradients, Tensor groups, Tensor owner, Tensor(a!) work, "
    "Tensor(b!) skipped, Tensor? grad_scale, Tensor? found_inf, float max_norm) -> Tensor"
)
