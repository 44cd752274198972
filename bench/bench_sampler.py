"""The timestep sampler, one optimizer step (draws and statistics): the compiled operators against the reference.

    python -m bench.bench_sampler [--device cpu|cuda] [--seconds 2] [--record]

Next to nothing is read or written (24 bytes a sample, 16 a bin): what counts is the time of a call.
"""

from functools import partial

import torch

from bench.elementwise import options
from bench.results import Results
from bench.timing import interleaved, waiting
from palp_fast import backend
from palp_fast.sampler import MODES, TimestepSampler

SHAPES = [1, 4, 32, 512]  # samples in a step
ALPHAS = torch.linspace(0.999, 0.005, 1000)


def bytes_moved(batch: int, bins: int = 32) -> int:
    """Written: t, weight, scale; read: t, norm. Two statistics of 8 bytes a bin are read twice and written once."""
    return batch * (16 + 12) + bins * 48


def step(sampler: TimestepSampler, batch: int, number: torch.Tensor) -> tuple[torch.Tensor, ...]:
    drawn = sampler.sample(batch, number)
    sampler.update(drawn[0], drawn[1])
    return drawn


def check(samplers: dict[str, TimestepSampler], batch: int, number: torch.Tensor) -> None:
    """Nothing is timed that is not right: the same draws, from statistics that have seen some steps."""
    for _ in range(3):
        results = [step(sampler, batch, number) for sampler in samplers.values()]
        if not all(torch.equal(*pair) for pair in zip(*results, strict=True)):
            raise SystemExit(f"the draws of {' and '.join(samplers)} differ: not timed")


def main() -> None:
    args = options(__doc__)
    results = Results("sampler", args.device)
    compiled = backend.select("timestep_sample", torch.device(args.device), args.device)
    number = torch.tensor(3, device=args.device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; us: median (20th, 80th percentile)")
    for mode in MODES:
        for batch in SHAPES:
            alphas = ALPHAS.to(args.device)
            samplers = {name: TimestepSampler(alphas, mode, backend=name) for name in ("reference", compiled)}
            check(samplers, batch, number)
            calls = {name: waiting(partial(step, one, batch, number), args.device) for name, one in samplers.items()}
            rows = interleaved(calls, args.seconds)
            results.add(f"{mode}, batch {batch}", rows)
            report(mode, batch, rows)
    if args.record:
        results.write()


def report(mode: str, batch: int, rows: dict) -> None:
    print(f"{mode}, {batch} samples, {bytes_moved(batch)} bytes")
    for name, row in rows.items():
        times = rows["reference"].median / row.median
        spread = f"({row.p20 * 1e6:.1f}, {row.p80 * 1e6:.1f})"
        print(f"  {name:10} {row.median * 1e6:9.1f} {spread:20} {times:6.2f}x the reference's speed")


if __name__ == "__main__":
    main()
