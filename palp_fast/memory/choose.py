"""memory="auto": the fastest mode whose estimate fits what is free."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from palp_fast.memory.estimate import ASSUMED, Estimate, assumed, estimates, gib
from palp_fast.memory.models import Configs
from palp_fast.nn.lean import MEMORY

MARGIN = 1.1  # what estimates are right within


@dataclass(frozen=True)
class Choice:
    """A memory mode, why, and its estimate."""

    memory: str
    reason: str
    estimate: Estimate

    @property
    def at_once(self) -> int | None:
        """How many no-grad predictions are one pass; None: all."""
        return self.estimate.at_once

    @property
    def tiles(self) -> bool:
        """Whether previews are decoded in tiles."""
        return self.estimate.tiles

    def describe(self) -> str:
        """Lines for people."""
        return f"{self.estimate.describe()}\n  memory = {self.memory!r}: {self.reason}"


def choose(
    configs: Configs, cfg, resolution: int, photos: int, teacher: Configs | None = None, lean: bool | None = None
) -> Choice:
    """The mode of a resolved config: its own, or for "auto" the fastest that fits what its device has free.

    teacher: of another model that is the teacher; lean: as of the Trainer. Raises ConfigError for a mode that its
    modules do not have.
    """
    asked = cfg.memory != "auto"
    found = estimates(configs, cfg, resolution, photos, [cfg.memory] if asked else MEMORY, teacher, lean)
    if cfg.device == "cpu":
        return Choice(found[0].memory, "as set; on a CPU 'auto' is 'fast'" + _by(found), found[0])
    free = torch.cuda.mem_get_info(cfg.device)[0]
    return fitting(found, free, asked)


def fitting(found: list[Estimate], free: int, asked: bool) -> Choice:
    """The first that fits `free` bytes of a card, or the last: each mode's estimate, then those of `split`."""
    found = [each for one in found for each in (one, *one.split)]
    need = [MARGIN * one.peak + ASSUMED["libraries' workspaces"] for one in found]
    index = next((i for i, size in enumerate(need) if size <= free), len(found) - 1)
    told = ", ".join(f"{one.label} needs {gib(size)}" for one, size in zip(found[: index + 1], need))
    fits = "fits" if need[index] <= free else "does not fit: lower base_dtype, batch_size, rank or resolution"
    reason = f"{'as asked for; ' if asked else ''}{gib(free)} free, {told} with a tenth more: {fits}{_by(found)}"
    reason += f"\n  {assumed()}"
    return Choice(found[index].memory, reason, found[index])


def _by(found: list[Estimate]) -> str:
    return f"; {found[0].why}" if found[0].why else ""
