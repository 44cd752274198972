"""Rows of an image operator's benchmark: correctness first, then interleaved timing of every provider."""

import argparse
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.results import Results
from bench.timing import interleaved, waiting

PROVIDERS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "reference")}  # by device


class Case:
    """One row: `call(backend)` -> tensors, and the bytes that an ideal implementation moves."""

    def __init__(self, name: str, call: Callable[[str], Sequence[Tensor]], nbytes: int):
        self.name, self.call, self.nbytes = name, call, nbytes


def options(what: str) -> argparse.Namespace:
    """Command line of the benchmarks; sets the number of threads."""
    parser = argparse.ArgumentParser(description=what.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=PROVIDERS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    parser.add_argument("--record", action="store_true", help="write the rows to bench/results/")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def report(benchmark: str, cases: Iterable[Case], chosen: argparse.Namespace, tolerance: float) -> None:
    """Print a line per case: times, and the ratio of medians, reference over compiled. Raises if a result is wrong."""
    device, results = chosen.device, Results(benchmark, chosen.device)
    print(f"{'case':44} {device + ' us':>10} {'reference us':>13} {'GB/s':>7} {'ratio':>6}")
    ratios = []
    for case in cases:
        check(case, device, tolerance)
        rows = interleaved({name: waiting(partial(case.call, name), device) for name in PROVIDERS[device]}, chosen.seconds)
        results.add(case.name, rows)
        mine, its = rows[device].median, rows["reference"].median
        ratios.append(its / mine)
        rate = case.nbytes / mine / 1e9
        print(f"{case.name:44} {mine * 1e6:10.1f} {its * 1e6:13.1f} {rate:7.1f} {ratios[-1]:6.2f}", flush=True)
    print(f"least ratio {min(ratios):.2f}")
    if chosen.record:
        results.write()


def check(case: Case, device: str, tolerance: float) -> None:
    """Fail before timing what is wrong: relative L2 against the reference."""
    for mine, its in zip(case.call(device), case.call("reference"), strict=True):
        error = (mine.double() - its.double()).norm() / its.double().norm()
        if not error <= tolerance:
            raise SystemExit(f"{case.name}: relative error {error:.2e}, allowed {tolerance:.1e}: not timed")


def grid(shapes: Iterable[tuple], dtypes: Iterable[torch.dtype], *rest: Iterable) -> Iterable[tuple]:
    return itertools.product(shapes, dtypes, *rest)


def images(count: int, shape: tuple, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Views of one batch, as a UNet that predicts for several prompts at once returns them."""
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn((count * shape[0], *shape[1:]), generator=draw).to(device, dtype)
    return list(whole.unflatten(0, (count, shape[0])).unbind(0))
