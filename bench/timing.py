"""Timing by interleaved rounds: providers take turns, so that a slow spell of the machine meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

_FLUSHED_BYTES = 2**28  # more than the L2 cache of any card; writing it hides the launch of what is timed


class Row(NamedTuple):
    """Seconds per call of one provider: median, 20th and 80th percentile, and the number of rounds."""

    median: float
    p20: float
    p80: float
    rounds: int


def interleaved(
    calls: dict[str, Callable[[], object]], device: torch.device, seconds: float, least: int = 5
) -> dict[str, Row]:
    """Time every provider once per round, for about `seconds` in all and at least `least` rounds, after a warm-up."""
    timers = {name: _timer(call, device) for name, call in calls.items()}
    for timer in timers.values():
        timer()
    samples = {name: [] for name in timers}
    start = time.perf_counter()
    while timers and (time.perf_counter() - start < seconds or len(next(iter(samples.values()))) < least):
        for name, timer in timers.items():
            samples[name].append(timer())
    return {name: _row(values) for name, values in samples.items()}


def _timer(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """A function that gives the seconds of one call; on a GPU by events, from a cold cache and a busy queue."""

    def wall() -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    if device.type != "cuda":
        return wall
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def on_device() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return on_device


def _row(values: list[float]) -> Row:
    deciles = statistics.quantiles(values, n=10)
    return Row(statistics.median(values), deciles[1], deciles[7], len(values))
