"""Which timesteps a step trains on, and the weights that keep its expected gradient the same."""

from __future__ import annotations

import torch
from torch import Tensor

from palp_fast import checks
from palp_fast.ops.registry import overload
from palp_fast.reference.timestep import STRATA, proposal_ref

MODES = ("uniform", "stratified", "adaptive")
MEMORY = 0.999  # what a statistic keeps per later sample, so that the proposal follows the training
MAX_BINS = 1024


class TimestepSampler:
    """Draws timesteps t with probability q(t) and weights them by pi(t) / q(t), pi uniform over the schedule.

    alphas_cumprod: [T] in (0, 1], on the device where draws are wanted. mode: "uniform": independent draws;
    "stratified": one draw from each of equal parts of the schedule in every global batch, and from each of at least 32
    parts of it over consecutive steps; "adaptive": q = floor pi + (1 - floor) q_hat over `bins` equal ranges of t,
    q_hat proportional to the root mean square of the gradient norms given to `update`, stratified over the global
    batch. rescale: whether the residual keeps PALP's a_t / s_t rescaling (then residual_scale is 1).

    Objective (pi, rescale) and proposal (q) are separate: a mode changes the variance of the gradient, never its
    expectation, and weights are at most 1 / floor. A draw depends on (seed, step, sample number), and on the statistics
    in mode "adaptive", so it is the same on one rank or many. Neither `sample` nor `update` waits for the device: with
    step and sample_offset on it, a captured CUDA graph of both draws anew at every replay.

    Raises ValueError or TypeError naming a bad argument, RuntimeError if `backend` cannot serve.
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
        backend: str = "auto",
    ) -> None:
        _check(alphas_cumprod, mode, rescale, bins, floor, seed)
        self.mode, self.floor, self.seed, self.backend = mode, float(floor), seed, backend
        self.steps = alphas_cumprod.shape[0]
        self.bins = min(bins, self.steps)
        table = alphas_cumprod.detach().to(torch.float64)
        scale = torch.ones_like(table) if rescale else ((1 - table) / table).sqrt()
        self._residual_scale = scale.to(torch.float32).contiguous()
        self._counts = torch.zeros(self.bins, dtype=torch.float64, device=table.device)
        self._squares = torch.zeros_like(self._counts)

    def sample(
        self, batch: int, step: int | Tensor, sample_offset: int | Tensor = 0, *, global_batch: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(t [B] int64, sample_weight = pi / q [B] fp32, residual_scale [B] fp32) for samples sample_offset + 0..B-1.

        step, sample_offset: int or 0-d int64 tensor. global_batch: samples in the whole optimizer step (batch x
        accumulation x ranks), needed when `batch` is a part of it; None means `batch`.
        """
        checks.integer("batch", batch, minimum=0)
        whole = batch if global_batch is None else global_batch
        # More would not fit into 63 bits.
        checks.integer("global_batch", whole, minimum=batch, maximum=2**31 // self.steps - STRATA)
        numbers = [
            checks.counter(name, value, self._counts)
            for name, value in (("step", step), ("sample_offset", sample_offset))
        ]
        op = overload("timestep_sample", self._counts.device, self.backend)
        mode = MODES.index(self.mode)
        state = (self._residual_scale, self._counts, self._squares)
        return op(*state, *numbers, self.seed, batch, max(whole, 1), mode, self.floor)

    def proposal(self) -> Tensor:
        """q per bin, [bins] fp64, from the statistics so far: floor pi + (1 - floor) q_hat."""
        return proposal_ref(self._counts, self._squares, self.steps, self.floor)

    def update(self, t: Tensor, norms: Tensor) -> None:
        """Take in the unweighted gradient norms [N] of the whole global batch at its timesteps t [N] int64.

        Non-finite norms are left out, and those of a t outside of the schedule. The order of summation is fixed, and no
        value leaves the device.
        """
        checks.vector("norms", norms, self._counts)
        checks.indices("t", t, norms)
        op = overload("timestep_update", self._counts.device, self.backend)
        op(self._counts, self._squares, t, norms.detach(), self.steps, MEMORY)

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


def _check(alphas_cumprod: Tensor, mode: str, rescale: bool, bins: int, floor: float, seed: int) -> None:
    checks.schedule("alphas_cumprod", alphas_cumprod, alphas_cumprod)
    checks.alphas("alphas_cumprod", alphas_cumprod)
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: allowed are {', '.join(map(repr, MODES))}")
    if not isinstance(rescale, bool):
        raise TypeError(f"rescale={rescale!r}: allowed are True and False")
    checks.integer("bins", bins, minimum=1, maximum=MAX_BINS)
    if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not 0 < floor <= 1:
        raise ValueError(f"floor={floor!r}: allowed is a number in (0, 1]")
    checks.seed("seed", seed)
