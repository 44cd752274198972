"""Metrics of steps in a ring on the device, read together, so that no step waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

NAMES = ("loss", "rec_loss", "residual_norm", "timestep", "grad_norm", "token_norm")
# What may be not finite before a gradient is, in the order in which it is computed.
BEFORE_GRADIENTS = {"rec_loss": "the student's prediction", "residual_norm": "the residual", "loss": "the loss"}
EVERY = {"cpu": 1, "cuda": 10}  # steps between two readings; a CPU has nothing to wait for


class Metrics(Mapping):
    """Of one optimizer step, by name. "step" and "lr" are known at once; another value makes the recorder read all.

    diverged: after reading, what was not finite first, None if all was.
    """

    def __init__(self, recorder: Recorder, step: int, lr: float, trained: list[str]):
        self._recorder, self._values = recorder, {"step": step, **dict.fromkeys(NAMES), "lr": lr, "seconds": None}
        self._trained, self.diverged, self.is_read = trained, None, False

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

    def fill(self, numbers: list[float], first_bad: int, seconds: float) -> None:
        self._values |= dict(zip(NAMES, numbers)) | {"seconds": seconds}
        tensors = [*BEFORE_GRADIENTS.values(), *(f"the gradient of {name}" for name in self._trained)]
        self.diverged = tensors[first_bad] if first_bad >= 0 else None
        self.is_read = True


class Recorder:
    """Keeps the metrics of up to `every` steps on `device`; `read` brings them to the host in one copy.

    done: steps that were read and not taken yet, in their order.
    """

    def __init__(self, device: torch.device | str, every: int):
        self.every = every
        self._ring = torch.zeros(every, len(NAMES) + 1, dtype=torch.float64, device=device)
        self._waiting: list[Metrics] = []
        self.done: list[Metrics] = []
        self._since = 0.0

    def start(self) -> None:
        """A step begins."""
        if not self._waiting:
            self._since = time.perf_counter()

    def record(self, step: int, lr: float, values: dict[str, Tensor], norms: dict[str, Tensor]) -> Metrics:
        """values: 0-d, by NAMES; norms: 0-d, of each gradient by its parameter. Waits only if the ring is full."""
        row = self._ring[len(self._waiting)]
        numbers = torch.stack([values[name].double() for name in NAMES])
        torch.cat([numbers, _first_bad(values, norms)[None]], out=row)
        made = Metrics(self, step, lr, list(norms))
        self._waiting.append(made)
        if len(self._waiting) == self.every:
            self.read()
        return made

    def read(self) -> None:
        """Waits for the device; its steps took the same time each."""
        if not self._waiting:
            return
        rows = self._ring.tolist()
        seconds = (time.perf_counter() - self._since) / len(self._waiting)
        for made, (*numbers, first_bad) in zip(self._waiting, rows):
            made.fill(numbers, int(first_bad), seconds)
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
