"""What torch.autocast asks of products: linear layers and convolutions run in its dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor


def dtype_on(kind: str) -> torch.dtype | None:
    """The dtype of autocast on a device type, None where it is off or unknown."""
    available = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if available else None


def off(kind: str) -> contextlib.AbstractContextManager:
    """Within, operators run in the dtypes that they are given."""
    return contextlib.nullcontext() if dtype_on(kind) is None else torch.autocast(kind, enabled=False)


def product(op: Callable, x: Tensor, *args):
    """op(x, *args), x in the dtype of autocast where that is on; fp64 stays, as in torch's own products."""
    kind = x.device.type
    dtype = dtype_on(kind)
    if dtype is None:
        return op(x, *args)
    with torch.autocast(kind, enabled=False):
        return op(x if x.dtype == torch.float64 else x.to(dtype), *args)
