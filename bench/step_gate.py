"""Which whole steps are right: gradients of one PALP step on fixed inputs, beside those of the plain baseline.

Every provider gets the same LoRA factors, made from the paths of its layers. Of every gradient one entry in 61 is
compared, a number without a common factor with any layer's width, so that peak memory stays that of the step.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

STRIDE = 61
TIMESTEP = 480
# Relative L2 error of dA, dB and token rows, each of all layers together. Guidance of 15 multiplies the rounding of
# 16-bit predictions, of both sides: equal gradients are off by a tenth there. A gradient of zeros is off by 1.
LIMITS = {"fp32": 2e-3, "bf16": 0.3, "fp16": 0.3}

Gradients = dict[str, np.ndarray]


@dataclass(frozen=True)
class Step:
    """A training step: run() trains; fill(latents, t, noise) fills the gradients of one PALP step without training.

    pairs: {path of the layer in the UNet: (lora_a, lora_b)}; rows() -> the gradients of the trained token rows;
    warm_up: runs before the first that is timed.
    """

    run: Callable[[], object]
    fill: Callable[[Tensor, Tensor, Tensor], object]
    pairs: dict[str, tuple[Tensor, Tensor]]
    rows: Callable[[], list[Tensor]]
    warm_up: int = 1

    def gradients(self, channels: int, side: int, device: str) -> Gradients:
        """Some of the entries of every gradient, for factors and inputs that are the same for all providers."""
        set_factors(self.pairs)
        generator = torch.Generator().manual_seed(0)
        latents, noise = (torch.randn(1, channels, side, side, generator=generator).to(device) for _ in range(2))
        self.fill(latents, torch.tensor([TIMESTEP], device=device), noise)
        pairs = [self.pairs[path] for path in sorted(self.pairs)]
        return {
            "lora_a": _sampled([a.grad for a, _ in pairs]), "lora_b": _sampled([b.grad for _, b in pairs]),
            "token rows": _sampled(self.rows()),
        }


@torch.no_grad()
def set_factors(pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Writes factors that depend on their layer's path alone; B is not zero, so the student is not the teacher."""
    for path, (lora_a, lora_b) in pairs.items():
        generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
        for factor, size in ((lora_a, lora_a.shape[1] ** -0.5), (lora_b, 0.02)):
            factor.copy_(size * torch.randn(factor.shape, generator=generator))


def error(found: Gradients, truth: Gradients) -> float:
    """The greatest relative L2 error of a kind of parameter; infinity for gradients that are not finite or missing."""
    errors = []
    for name, true in truth.items():
        mine = found[name]
        if mine.shape != true.shape or not np.isfinite(mine).all():
            return float("inf")
        errors.append(np.linalg.norm(mine - true) / np.linalg.norm(true))
    return float(max(errors))


def _sampled(gradients: list[Tensor | None]) -> np.ndarray:
    parts = [grad.flatten()[::STRIDE].double().cpu().numpy() for grad in gradients if grad is not None]
    return np.concatenate([np.zeros(0), *parts])
