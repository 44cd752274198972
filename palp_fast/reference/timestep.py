"""Timestep draws and their statistics: the plain PyTorch of TimestepSampler, which says what the modes mean.

Sums are running sums, so that their order is fixed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from palp_fast.reference import philox

UNIFORM, STRATIFIED, ADAPTIVE = range(3)
STRATA = 32  # a smaller global batch is stratified over consecutive steps, too, until this many draws
PRIOR = 4.0  # samples' worth of the mean over all timesteps in every bin's estimate
TINY = 1e-300


def timestep_sample_ref(
    residual_scale: Tensor,
    counts: Tensor,
    squares: Tensor,
    step: Tensor,
    sample_offset: Tensor,
    seed: int,
    batch: int,
    global_batch: int,
    mode: int,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(t [batch] int64, pi / q [batch] fp32, residual_scale at t [batch] fp32)."""
    timesteps = residual_scale.shape[0]
    number = torch.arange(batch, device=counts.device) + sample_offset
    word = philox.words(torch.zeros_like(number), number, step, philox.STREAM_TIMESTEP, seed)[0]
    cell, cells = (0, 1) if mode == UNIFORM else _cells(number % global_batch, step, seed, global_batch, mode)
    numerator = cell * 2**32 + word
    if mode == ADAPTIVE:
        t, weight = _invert(numerator, cells, proposal_ref(counts, squares, timesteps, floor), timesteps)
    else:
        t = ((numerator * timesteps) >> 32) // cells
        weight = torch.ones_like(t, dtype=torch.float32)
    return t, weight, residual_scale[t]


def _cells(number: Tensor, step: Tensor, seed: int, global_batch: int, mode: int) -> tuple[Tensor, int]:
    """Which of how many equal parts of [0, 1) each sample falls in; each alone is uniform over them.

    A step's samples take its strata, one each, in random order. Over a cycle of steps each stratum's parts come once.
    """
    everyone = torch.arange(global_batch, device=number.device)
    stratum = _ranks(philox.words(torch.zeros_like(everyone), everyone, step, philox.STREAM_STRATA, seed)[0])[number]
    # Adaptive q changes between steps: strata across steps would correlate a draw with its own q and add bias.
    cycle = 1 if mode == ADAPTIVE else math.ceil(STRATA / global_batch)
    turn = torch.zeros_like(stratum) + step % cycle
    part = torch.arange(cycle, device=number.device).expand(len(stratum), cycle)
    keys = philox.words(1 + part, stratum[:, None], step // cycle, philox.STREAM_STRATA, seed)[0]
    return stratum * cycle + _ranks(keys).gather(1, turn[:, None])[:, 0], global_batch * cycle


def _ranks(keys: Tensor) -> Tensor:
    """The rank of each key in its row; equal ones in their order."""
    order = keys.argsort(dim=-1, stable=True)
    return torch.empty_like(order).scatter_(-1, order, torch.arange(keys.shape[-1], device=keys.device).expand_as(keys))


def _invert(numerator: Tensor, cells: int, q: Tensor, timesteps: int) -> tuple[Tensor, Tensor]:
    """Timesteps at these points of q's distribution function, and their weights."""
    start, size, pi = _bins(len(q), timesteps, q.device)
    upper = q.cumsum(0)
    point = (numerator.to(torch.float64) + 0.5) / (cells * 2.0**32) * upper[-1]
    chosen = torch.searchsorted(upper, point, right=True).clamp(max=len(q) - 1)
    inside = (point - (upper - q)[chosen]) / q[chosen]
    offset = (inside * size[chosen]).to(torch.int64).clamp(min=0)
    return start[chosen] + torch.minimum(offset, size[chosen] - 1), (pi / q)[chosen].to(torch.float32)


def _bins(count: int, timesteps: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """First timestep, number of timesteps and share of the schedule of each bin, [bins]."""
    edges = (torch.arange(count + 1, device=device) * timesteps + count - 1) // count
    size = edges.diff()
    return edges[:-1], size, size.to(torch.float64) / timesteps


def proposal_ref(counts: Tensor, squares: Tensor, timesteps: int, floor: float) -> Tensor:
    """q per bin, [bins] fp64, from the statistics so far: floor pi + (1 - floor) q_hat."""
    _, _, pi = _bins(len(counts), timesteps, counts.device)
    seen = counts > 0
    mean = torch.where(seen, squares / counts.clamp(min=TINY), 0.0)
    overall = _sum(pi * mean) / _sum(pi * seen).clamp(min=TINY)
    mass = pi * ((squares + PRIOR * overall) / (counts + PRIOR)).sqrt()
    total = _sum(mass)
    q_hat = torch.where(total > 0, mass / total.clamp(min=TINY), pi)
    return floor * pi + (1 - floor) * q_hat


def timestep_update_ref(
    counts: Tensor, squares: Tensor, t: Tensor, norms: Tensor, timesteps: int, memory: float
) -> None:
    """Adds samples to the decayed counts and sums of squared norms per bin, in place, in their order.

    Samples with a norm that is not finite, or with a t outside of the schedule, are left out.
    """
    if len(t) == 0:
        return
    wide = norms.to(torch.float64)
    usable = wide.isfinite() & (t >= 0) & (t < timesteps)
    bin = torch.where(usable, t, 0) * len(counts) // timesteps
    member = (bin[:, None] == torch.arange(len(counts), device=t.device)) & usable[:, None]
    keep = memory ** len(t)
    counts.mul_(keep).add_(_sum(member.to(torch.float64)))
    squares.mul_(keep).add_(_sum(torch.where(member, wide.square()[:, None], 0.0)))


def _sum(values: Tensor) -> Tensor:
    return values.cumsum(0)[-1]
