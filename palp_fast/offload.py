"""Frozen weights that wait in the memory of the CPU, each on the device while an operator reads it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEAST = 2**16  # bytes: what is smaller, biases and normalisations, stays on the device


def asked(cfg) -> bool:
    """Whether the teacher's weights leave the device of a resolved config; on a CPU there is nowhere to go."""
    return cfg.teacher_offload and torch.device(cfg.device).type != "cpu"


def waits(value: Tensor) -> bool:
    """Whether a weight leaves the device."""
    return value.nbytes >= LEAST


def send_away(module: nn.Module, device: torch.device) -> None:
    """Moves parameters and buffers of a frozen module, quantised ones too, to the memory of the CPU, pinned for CUDA.

    Whoever looks one up gets a copy on `device`, freed with its last reference; the host does not wait for the copy.
    Iterating over parameters or buffers gives those that wait. Small ones are on `device` from now on, and the first
    parameter, which tells where the module is. The module may have been on either device.
    """
    first = next(module.parameters())
    tables = [(part, kind) for part in module.modules() for kind in ("_parameters", "_buffers")]
    leaving = [value for part, kind in tables for value in part.__dict__[kind].values()
               if value is not None and value is not first and waits(value)]
    homes = _homes(leaving, device)
    for part, kind in tables:
        table = part.__dict__[kind]
        there = {name: homes.get(id(value)) for name, value in table.items()}
        stay = {name: _like(value, value.detach().to(device)) for name, value in table.items()
                if value is not None and there[name] is None}
        part.__dict__[kind] = _Waiting(there | stay, {name for name in there if there[name] is not None}, device)


class _Waiting(dict):
    """A module's parameters or buffers by name; those `away` are copied to the device where they are looked up."""

    def __init__(self, values: dict[str, Tensor | None], away: set[str], device: torch.device):
        super().__init__(values)
        self.away, self.device = away, device

    def __getitem__(self, name: str) -> Tensor | None:
        value = super().__getitem__(name)
        return value.detach().to(self.device, non_blocking=True, copy=True) if name in self.away else value


def _homes(values: list[Tensor], device: torch.device) -> dict[int, Tensor]:
    """{id: the same in the memory of the CPU}; what shared memory, as packed weights and views of them, still does."""
    largest: dict[int, Tensor] = {}
    for value in values:
        key = value.untyped_storage()._cdata
        if value.nbytes > (largest[key].nbytes if key in largest else 0):
            largest[key] = value
    moved = {key: value.detach().to("cpu") for key, value in largest.items()}
    if device.type == "cuda":
        moved = {key: value.pin_memory() for key, value in moved.items()}
    homes = {}
    for value in values:
        home = moved[value.untyped_storage()._cdata].as_strided(value.shape, value.stride(), value.storage_offset())
        homes[id(value)] = _like(value, home)
    return homes


def _like(value: Tensor, moved: Tensor) -> Tensor:
    return nn.Parameter(moved, requires_grad=False) if isinstance(value, nn.Parameter) else moved
