"""What a call does, counted exactly on any machine: FLOPs, bytes, leaf operators, launches, bytes kept for backward.

Tensors may lie on the meta device, so that layers of real size cost nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# They make or describe memory and launch nothing.
_NO_LAUNCH = {
    "promote_types", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_unsafe_view",
    "alias", "lift_fresh", "lift",
}


@dataclass(frozen=True)
class Leaf:
    """One call that launches work: its name, matrix FLOPs, and bytes if every tensor is read or written once."""

    name: str
    flops: int
    nbytes: int


class Counter(TorchDispatchMode):
    """Leaf calls within, in order, and the storages that they make.

    inside: the version of our operators that is looked into, "reference" or "triton"; None counts each of them as one
    leaf by its own formula. Those without that version are one leaf, too.
    """

    def __init__(self, inside: str | None = None):
        super().__init__()
        self.inside, self.leaves, self.created = inside, [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "palp_fast" and self.inside in func.overloadpacket.overloads():
            with self:
                # The chosen version's own code, past this mode, so that what it calls is seen.
                out = getattr(func.overloadpacket, self.inside).redispatch(_CPU, *args)
        else:
            if func._overloadpacket not in flop_registry:
                # Below autograd, where our operators run, composite ones such as matmul arrive whole.
                with self:
                    out = func.decompose(*args, **kwargs)
                if out is not NotImplemented:
                    return out
            out = func(*args, **kwargs)
            self._note(func, args, kwargs, out)
        self.created |= {storage(tensor) for tensor in _tensors(out)} if not func.is_view else set()
        return out

    def _note(self, func, args, kwargs, out) -> None:
        name = func._schema.name.partition("::")[2]
        if func.is_view or name in _NO_LAUNCH:
            return
        formula = flop_registry.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        moved = {id(tensor): tensor for tensor in [*_tensors((args, kwargs)), *_tensors(out)]}
        self.leaves.append(Leaf(name, flops, sum(t.numel() * t.element_size() for t in moved.values())))

    def launched(self, kernel, grid, args, options) -> None:
        """To be called in place of a Triton launch."""
        self.leaves.append(Leaf(kernel.__name__, 0, 0))

    @property
    def flops(self) -> int:
        return sum(leaf.flops for leaf in self.leaves)


@contextlib.contextmanager
def launches(family: str) -> Iterator[Counter]:
    """A Counter that looks into Triton versions with the settings of a family of cards; no kernel runs."""
    from palp_fast.kernels.launch import watched

    with Counter("triton") as counter, watched(counter.launched, family):
        yield counter


def saved_bytes(forward: Callable[[], object], inputs: tuple[Tensor, ...]) -> int:
    """Bytes that forward() keeps for the backward pass: what it makes, and of what was there the `inputs` alone."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[storage(tensor)] = tensor
        return tensor

    with Counter() as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    counted = counter.created | {storage(tensor) for tensor in inputs}
    total = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key in counted)
    del result
    return total


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
