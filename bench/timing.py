"""Timing by interleaved rounds: providers take turns, so that a slow spell of the machine meets all of them."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Row(NamedTuple):
    """Seconds per call of one provider: median, 20th and 80th percentile, and the number of rounds."""

    median: float
    p20: float
    p80: float
    rounds: int


def interleaved(functions: dict[str, Callable[[], object]], seconds: float = 5.0, least: int = 7) -> dict[str, Row]:
    """Time each function once per round, for about `seconds` in all and at least `least` rounds, after one warm-up."""
    samples = {name: [] for name in functions}
    for function in functions.values():
        function()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(next(iter(samples.values()))) < least:
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            samples[name].append(time.perf_counter() - begin)
    return {name: _row(values) for name, values in samples.items()}


def waiting(function: Callable[[], object], device: str) -> Callable[[], None]:
    """The function, done only when the device is."""

    def run() -> None:
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def _row(values: list[float]) -> Row:
    deciles = statistics.quantiles(values, n=10)
    return Row(statistics.median(values), deciles[1], deciles[7], len(values))
