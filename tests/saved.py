"""What a forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def saved(function: Callable, *parameters: Tensor) -> list[Tensor]:
    """Tensors that function() saves, one of each storage, without the parameters."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        result = function()
    known = {_storage(parameter) for parameter in parameters}
    found = {_storage(tensor): tensor for tensor in kept if _storage(tensor) not in known}
    del result
    return list(found.values())


def saved_bytes(function: Callable, *parameters: Tensor) -> int:
    """Bytes of what function() saves, without the parameters; exact under FakeTensorMode, too."""
    return sum(tensor.untyped_storage().nbytes() for tensor in saved(function, *parameters))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
