"""How kernels are launched: on the tensor's device, with the settings of its family of cards.

Every launch of the package goes through `launch`, so that tests can count launches, or compile them without a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TypeVar

import torch
import triton.language as tl
from torch import Tensor

# Family by compute capability: cards that share memory per block and matrix instructions.
FAMILIES = {
    (7, 5): "turing", (8, 0): "a100", (8, 6): "consumer", (8, 9): "consumer", (9, 0): "hopper", (12, 0): "consumer",
}
SHARED_KIB = {"turing": 64, "a100": 163, "consumer": 99, "hopper": 227, "generic": 64}  # most that a block may use

Settings = TypeVar("Settings")
_watch: Callable | None = None
_assumed_family: str | None = None


def settings(table: dict[str, Settings], device: torch.device) -> Settings:
    """The entry of a table of launch settings for this device: its family's, or the one named "generic"."""
    return table.get(_assumed_family or family_of(device), table["generic"])


@lru_cache
def family_of(device: torch.device) -> str:
    """The family of cards that a device belongs to, "generic" for one that is not known."""
    if device.type != "cuda":
        return "generic"
    return FAMILIES.get(torch.cuda.get_device_capability(device), "generic")


def launch(kernel, grid: tuple[int, ...], like: Tensor, *args, **options) -> None:
    """kernel[grid](*args, **options) on the device of `like`; an empty grid launches nothing."""
    if 0 in grid:
        return
    if _watch is not None:
        _watch(kernel, grid, args, options)
    elif like.device.type == "cuda":
        with torch.cuda.device(like.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


@contextlib.contextmanager
def watched(watch: Callable, family: str | None = None) -> Iterator[None]:
    """Within, watch(kernel, grid, args, options) is called in place of every launch, with settings of `family`."""
    global _watch, _assumed_family
    before = _watch, _assumed_family
    _watch, _assumed_family = watch, family
    try:
        yield
    finally:
        _watch, _assumed_family = before


def contiguous(*values: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each of them contiguous: for small ones, which kernels read without strides."""
    return tuple(None if value is None else value.contiguous() for value in values)


def compute_type(*tensors: Tensor | None) -> tl.dtype:
    """tl.float64 if any tensor is fp64 (for gradcheck), else tl.float32: what kernels compute in."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return tl.float64 if wide else tl.float32
