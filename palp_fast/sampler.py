"""Which timesteps a step trains on, and the weights that keep its expected gradient the same."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from palp_fast.reference import philox

MODES = ("uniform", "stratified", "adaptive")
STRATA = 32  # a smaller global batch is stratified over consecutive steps, until this many draws
MEMORY = 0.999  # what a statistic keeps per later sample, so that the proposal follows the training
PRIOR = 4.0  # samples' worth of the mean over all timesteps in every bin's estimate


class TimestepSampler:
    """Draws timesteps t with probability q(t) and weights them by pi(t) / q(t), pi uniform over the schedule.

    alphas_cumprod: [T] in (0, 1], on the device where draws are wanted. mode: "uniform": independent draws;
    "stratified": one draw from each of equal parts of the schedule, over the global batch, or over consecutive steps
    while that is smaller than 32; "adaptive": q = floor pi + (1 - floor) q_hat over `bins` equal ranges of t, q_hat
    proportional to the root mean square of the gradient norms given to `update`, stratified over the global batch.
    rescale: whether the residual keeps PALP's a_t / s_t rescaling (then residual_scale is 1).

    Objective (pi, rescale) and proposal (q) are separate: a mode changes the variance of the gradient, never its
    expectation, and weights are at most 1 / floor. A draw depends on (seed, step, sample number), and on the statistics
    in mode "adaptive", so it is the same on one rank or many. Raises ValueError or TypeError naming a bad argument.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        mode: str,
        *,
        rescale: bool = True,
        bins: int = 32,
        floor: float = 0.1,
        seed: int = 0,
    ) -> None:
        _check(alphas_cumprod, mode, bins, floor, seed)
        self.mode, self.floor, self.seed = mode, floor, seed
        self.steps = alphas_cumprod.shape[0]
        self.bins = min(bins, self.steps)
        device = alphas_cumprod.device
        table = alphas_cumprod.to(torch.float64)
        scale = torch.ones_like(table) if rescale else ((1 - table) / table).sqrt()
        self._residual_scale = scale.to(torch.float32)
        edges = (torch.arange(self.bins + 1, device=device) * self.steps + self.bins - 1) // self.bins
        self._start, self._size = edges[:-1], edges.diff()
        self._pi = self._size.to(torch.float64) / self.steps
        self._counts = torch.zeros(self.bins, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._counts)

    def sample(
        self, batch: int, step: int | Tensor, sample_offset: int | Tensor = 0, *, global_batch: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(t [B] int64, sample_weight = pi / q [B] fp32, residual_scale [B] fp32) for samples sample_offset + 0..B-1.

        step, sample_offset: int or 0-d int64 tensor. global_batch: samples in the whole optimizer step (batch x
        accumulation x ranks), needed when `batch` is a part of it; None means `batch`.
        """
        whole = batch if global_batch is None else global_batch
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 0:
            raise ValueError(f"batch={batch!r}: allowed is an int >= 0")
        if isinstance(whole, bool) or not isinstance(whole, int) or whole < batch:
            raise ValueError(f"global_batch={global_batch!r}: allowed is an int >= batch ({batch}), or None")
        number = torch.arange(batch, device=self._pi.device) + sample_offset
        numerator, strata = self._positions(number, step, max(whole, 1))
        if self.mode == "adaptive":
            t, weight = self._invert(numerator, strata)
        else:
            t = ((numerator * self.steps) >> 32) // strata
            weight = torch.ones_like(t, dtype=torch.float32)
        return t, weight, self._residual_scale[t]

    def _positions(self, number: Tensor, step: int | Tensor, whole: int) -> tuple[Tensor, int]:
        """Points in [0, 1) as numerator / (strata 2^32), one per sample; each alone is uniform."""
        word = philox.words(torch.zeros_like(number), number, step, philox.STREAM_TIMESTEP, self.seed)[0]
        if self.mode == "uniform":
            return word, 1
        # Adaptive q changes between steps: strata across steps would correlate a draw with its own q and add bias.
        cycle = 1 if self.mode == "adaptive" else math.ceil(STRATA / whole)
        strata = whole * cycle
        every = torch.arange(strata, device=number.device)
        keys = philox.words(every, torch.full_like(every, 0) + step // cycle, 0, philox.STREAM_STRATA, self.seed)[0]
        order = keys.argsort(stable=True)
        return (order[(step % cycle) * whole + number % whole] << 32) + word, strata

    def _invert(self, numerator: Tensor, strata: int) -> tuple[Tensor, Tensor]:
        """Timesteps at these points of q's distribution function, and their weights."""
        q = self.proposal()
        upper = q.cumsum(0)
        point = (numerator.to(torch.float64) + 0.5) / (strata * 2.0**32) * upper[-1]
        chosen = torch.searchsorted(upper, point, right=True).clamp(max=self.bins - 1)
        inside = (point - (upper - q)[chosen]) / q[chosen]
        size = self._size[chosen]
        offset = (inside * size).to(torch.int64).clamp(min=0)
        t = self._start[chosen] + torch.minimum(offset, size - 1)
        return t, (self._pi / q)[chosen].to(torch.float32)

    def proposal(self) -> Tensor:
        """q per bin, [bins] fp64, from the statistics so far: floor pi + (1 - floor) q_hat."""
        seen = self._counts > 0
        mean = torch.where(seen, self._squares / self._counts.clamp(min=1e-300), 0.0)
        overall = (self._pi * mean).sum() / (self._pi * seen).sum().clamp(min=1e-300)
        moment = (self._squares + PRIOR * overall) / (self._counts + PRIOR)
        mass = self._pi * moment.sqrt()
        q_hat = torch.where(mass.sum() > 0, mass / mass.sum().clamp(min=1e-300), self._pi)
        return self.floor * self._pi + (1 - self.floor) * q_hat

    def update(self, t: Tensor, norms: Tensor) -> None:
        """Take in the unweighted gradient norms [N] of the whole global batch at its timesteps t [N].

        Non-finite norms are left out. The order of summation is fixed, and no value leaves the device.
        """
        if t.shape != norms.shape or t.dim() != 1:
            raise ValueError(f"t, norms have shapes {list(t.shape)}, {list(norms.shape)}: allowed is [N] for both")
        norms = norms.detach().to(torch.float64)
        usable = norms.isfinite()
        squares = torch.where(usable, norms, 0.0).square()
        chosen = (t * self.bins) // self.steps
        member = (chosen[:, None] == torch.arange(self.bins, device=t.device)) & usable[:, None]
        keep = MEMORY ** t.shape[0]
        self._counts.mul_(keep).add_(member.to(torch.float64).sum(0))
        self._squares.mul_(keep).add_((member * squares[:, None]).sum(0))

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the statistics per bin: decayed sample counts and sums of squared norms."""
        return {"counts": self._counts.clone(), "squares": self._squares.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over statistics in place. Raises ValueError if they are of another number of bins."""
        for name, own in (("counts", self._counts), ("squares", self._squares)):
            value = state.get(name)
            if value is None or value.shape != own.shape:
                given = None if value is None else list(value.shape)
                raise ValueError(f"sampler state {name!r} has shape {given}: allowed is {list(own.shape)}")
        self._counts.copy_(state["counts"])
        self._squares.copy_(state["squares"])


def _check(alphas_cumprod: Tensor, mode: str, bins: int, floor: float, seed: int) -> None:
    if not isinstance(alphas_cumprod, Tensor) or not alphas_cumprod.is_floating_point():
        raise TypeError("alphas_cumprod: allowed is a floating tensor [T]")
    if alphas_cumprod.dim() != 1 or alphas_cumprod.shape[0] == 0:
        raise ValueError(f"alphas_cumprod has shape {list(alphas_cumprod.shape)}: allowed is [T] with T >= 1")
    if alphas_cumprod.device.type == "cpu" and not ((alphas_cumprod > 0) & (alphas_cumprod <= 1)).all():
        low, high = alphas_cumprod.min().item(), alphas_cumprod.max().item()
        raise ValueError(f"alphas_cumprod has values from {low} to {high}: allowed are values in (0, 1]")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: allowed are {', '.join(map(repr, MODES))}")
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins={bins!r}: allowed is an int >= 1")
    if not isinstance(floor, (int, float)) or not 0 < floor <= 1:
        raise ValueError(f"floor={floor!r}: allowed is a number in (0, 1]")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed={seed!r}: allowed is an int")
