"""Metrics of steps in a ring on the device, read together, so that no step waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = ("loss", "rec_loss", "residual_norm", "timestep", "grad_norm", "token_norm")
# What may be not finite before a gradient is, in the order in which it is computed.
BEFORE_GRADIENTS = {"rec_loss": "the student's prediction", "residual_norm": "the residual", "loss": "the loss"}
EVERY = {"cpu": 1, "cuda": 10}  # steps between two readings; a CPU has nothing to wait for


class Metrics(Mapping):
    """Of one optimizer step, by name. "step" and "lr" are known at once; another value makes the recorder read all.

    After reading: diverged: what was not finite first, None if all was; details: {name: fp64 tensor on the CPU}.
    """

    def __init__(self, recorder: Recorder, step: int, lr: float, trained: list[str], shapes: dict[str, torch.Size]):
        self._recorder, self._values = recorder, {"step": step, **dict.fromkeys(NAMES), "lr": lr, "seconds": None}
        self._trained, self._shapes, self.diverged, self.is_read = trained, shapes, None, False
        self.details: dict[str, Tensor] = {}

    def __getitem__(self, name: str):
        if self._values[name] is None and not self.is_read:
            self._recorder.read()
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(dict(self))

    def fill(self, row: Tensor, seconds: float) -> None:
        *numbers, first_bad = row[: len(NAMES) + 1].tolist()
        self._values |= dict(zip(NAMES, numbers)) | {"seconds": seconds}
        parts = row[len(NAMES) + 1:].split([shape.numel() for shape in self._shapes.values()])
        self.details = {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts)}
        tensors = [*BEFORE_GRADIENTS.values(), *(f"the gradient of {name}" for name in self._trained)]
        self.diverged = tensors[int(first_bad)] if first_bad >= 0 else None
        self.is_read = True


@dataclass(frozen=True)
class Row:
    """The metrics of one step on the device: numbers [width] fp64; trained, shapes: what they are, beside NAMES."""

    numbers: Tensor
    trained: list[str]
    shapes: dict[str, torch.Size]

    @staticmethod
    def of(values: dict[str, Tensor], norms: dict[str, Tensor], details: dict[str, Tensor] | None = None) -> Row:
        """values: 0-d, by NAMES; norms: 0-d, of each gradient by its parameter; details: other tensors, of the same
        shapes at every step.
        """
        details = details or {}
        numbers = torch.stack([values[name].double() for name in NAMES])
        parts = [numbers, _first_bad(values, norms)[None], *(value.double().flatten() for value in details.values())]
        return Row(torch.cat(parts), list(norms), {name: value.shape for name, value in details.items()})


class Recorder:
    """Keeps the metrics of up to `every` steps on `device`; `read` brings them to the host in one copy.

    done: steps that were read and not taken yet, in their order.
    """

    def __init__(self, device: torch.device | str, every: int):
        self.every, self._device = every, device
        self._ring: Tensor | None = None  # made by the first step, which knows how much it records
        self._waiting: list[Metrics] = []
        self.done: list[Metrics] = []
        self._since = 0.0

    def start(self) -> None:
        """A step begins."""
        if not self._waiting:
            self._since = time.perf_counter()

    def record(self, step: int, lr: float, row: Row) -> Metrics:
        """Copies the row, which may be overwritten afterwards. Waits only if the ring is full."""
        if self._ring is None:
            self._ring = torch.zeros(self.every, len(row.numbers), dtype=torch.float64, device=self._device)
        self._ring[len(self._waiting)].copy_(row.numbers)
        made = Metrics(self, step, lr, row.trained, row.shapes)
        self._waiting.append(made)
        if len(self._waiting) == self.every:
            self.read()
        return made

    def read(self) -> None:
        """Waits for the device; its steps took the same time each."""
        if not self._waiting:
            return
        rows = self._ring.to("cpu", copy=True)
        seconds = (time.perf_counter() - self._since) / len(self._waiting)
        for made, row in zip(self._waiting, rows):
            made.fill(row, seconds)
        self.done += self._waiting
        self._waiting = []

    def take(self) -> list[Metrics]:
        """What was read since the last call."""
        done, self.done = self.done, []
        return done


def _first_bad(values: dict[str, Tensor], norms: dict[str, Tensor]) -> Tensor:
    """Number of the first value, or gradient, that is not finite, 0-d fp64; -1 if all are."""
    bad = ~torch.stack([*(values[name].float() for name in BEFORE_GRADIENTS), *norms.values()]).isfinite()
    return torch.where(bad.any(), bad.to(torch.uint8).argmax(), -1).double()
