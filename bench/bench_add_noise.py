"""add_noise against what diffusers' training does (torch.randn_like and a scheduler's add_noise) and the reference.

    python -m bench.bench_add_noise [--device cpu|cuda] [--seconds 2] [--record]
"""

from functools import partial

import torch

from bench.elementwise import options
from bench.results import Results
from bench.timing import interleaved, waiting
from palp_fast import backend, functional

SHAPES = [(batch, 4, side, side) for side in (64, 128) for batch in (4, 32)]
DTYPES = [torch.float32, torch.bfloat16]
ALPHAS = torch.linspace(0.999, 0.005, 1000)


def bytes_moved(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """x0 is read, x_t and noise are written."""
    return 3 * torch.Size(shape).numel() * dtype.itemsize


def plain(x0, t, alphas):
    """With a stateful generator: another number of ranks or another split gives other noise."""
    noise = torch.randn_like(x0)
    alpha_bar = alphas[t].to(x0.dtype).view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, noise


def providers(device: str) -> dict:
    keys = {"seed": 1, "step": 2}
    compiled = backend.select("add_noise", torch.device(device), device)
    return {
        "torch": plain,
        "reference": lambda *values: functional.add_noise(*values, **keys, backend="reference"),
        compiled: lambda *values: functional.add_noise(*values, **keys, backend=compiled),
    }


def check(run: dict, device: str, values: tuple) -> None:
    """Nothing is timed that is not right: the two differ by the rounding of fp32, and then of the dtype of x0."""
    for mine, its in zip(run[device](*values), run["reference"](*values), strict=True):
        allowed = max(2e-6, torch.finfo(mine.dtype).eps * its.abs().max().item())
        error = (mine.float() - its.float()).abs().max().item()
        if not error <= allowed:
            raise SystemExit(f"add_noise on {device} is off by {error}, allowed {allowed}: not timed")


def main() -> None:
    args = options(__doc__)
    run, results = providers(args.device), Results("add_noise", args.device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; us: median (20th, 80th percentile)")
    for shape in SHAPES:
        for dtype in DTYPES:
            x0, t = torch.randn(shape).to(args.device, dtype), torch.randint(1000, shape[:1]).to(args.device)
            values = (x0, t, ALPHAS.to(args.device))
            check(run, args.device, values)
            calls = {name: waiting(partial(function, *values), args.device) for name, function in run.items()}
            rows = interleaved(calls, args.seconds)
            results.add(f"{list(shape)} {dtype}", rows)
            report(shape, dtype, rows)
    if args.record:
        results.write()


def report(shape: tuple[int, ...], dtype: torch.dtype, rows: dict) -> None:
    print(f"{list(shape)} {dtype}, {bytes_moved(shape, dtype) / 1e6:.2f} MB")
    for name, row in rows.items():
        speed = bytes_moved(shape, dtype) / row.median / 1e9
        times = rows["torch"].median / row.median
        spread = f"({row.p20 * 1e6:.1f}, {row.p80 * 1e6:.1f})"
        print(f"  {name:10} {row.median * 1e6:9.1f} {spread:20} {speed:7.2f} GB/s  {times:6.2f}x torch's speed")


if __name__ == "__main__":
    main()
