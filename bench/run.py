"""Times every provider of every operator that it has found right: python -m bench.run, or palp-fast bench.

    [--op NAME] [--shape TEXT] [--provider TEXT] [--quick] [--seconds S] [--device cpu|cuda] [--threads N]
    [--json FILE] [--record] [--missing] [--base REV]

Options that name something take a part of the name and may be repeated. The machine's limits are measured first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench import operators, rows
from bench.core import Call, Gate, Operator, Unavailable, bind
from bench.machine import Machine, Roofline, describe, measure_roofline, short, version
from bench.rows import OperatorRow, RooflineRow
from bench.timing import Row, interleaved
from palp_fast import __version__

QUICK_SECONDS, FULL_SECONDS = 0.4, 2.0  # for one layer in one dtype, all providers together


class Bench:
    """One run on one device: the machine, its limits, and how long each layer is timed."""

    def __init__(self, device: torch.device, quick: bool, seconds: float | None, roofline: Roofline | None = None):
        self.device, self.quick = device, quick
        self.seconds = seconds or (QUICK_SECONDS if quick else FULL_SECONDS)
        self.machine: Machine = describe(device)
        dtypes = (torch.float32, torch.float16, torch.bfloat16) if device.type == "cuda" else (
            torch.float32, torch.bfloat16)
        self.roofline = roofline or measure_roofline(device, dtypes)

    def facts(self, provider: str) -> dict:
        """The columns of rows.Facts."""
        machine = self.machine
        package = provider.partition(" ")[0]
        package = "torch" if package in ("eager", "torch.compile", "sdpa") else package
        mode = f"{'deterministic' if machine.deterministic else 'any'} {'quick' if self.quick else 'full'}"
        return {
            "started": machine.started, "device": machine.device, "kind": machine.kind, "driver": machine.driver,
            "threads": machine.threads, "torch": machine.torch, "provider_version": version(package),
            "palp_fast": __version__, "commit": machine.commit, "mode": mode,
        }

    def limits(self) -> list[RooflineRow]:
        values = {"copy": self.roofline.bandwidth} | {f"matmul {k}": v for k, v in self.roofline.rates.items()}
        facts = self.facts("torch")
        return [RooflineRow(**facts, quantity=name, value=f"{value:.4g}") for name, value in values.items()]

    def measure(
        self, operator: Operator, shape: str, dtype: torch.dtype, wanted: Sequence[str] = ()
    ) -> list[OperatorRow]:
        """The rows of one layer: right providers timed, wrong and unavailable ones with the reason."""
        problem = operator.problem(shape, dtype, self.device)
        calls, problems = right(operator, problem, dtype, wanted)
        timed = interleaved(calls, self.device, self.seconds)
        limit = self.roofline.seconds(problem.nbytes, problem.flops, dtype)
        made = []
        for name in operator.providers():
            if name in calls or name in problems:
                status, note = problems.get(name, ("ok", ""))
                made.append(OperatorRow(
                    **self.facts(name), operator=operator.name, shape=shape, dtype=short(dtype), provider=name,
                    status=status, note=note, **_times(timed.get(name), limit), nbytes=problem.nbytes,
                    flops=problem.flops))
        return made


def right(
    operator: Operator, problem, dtype: torch.dtype, wanted: Sequence[str] = (), gate: Gate | None = None
) -> tuple[dict[str, Call], dict[str, tuple[str, str]]]:
    """({provider: call} of those whose results are right, {provider: (status, note)} of the others)."""
    gate, calls, problems = gate or Gate(operator, problem, dtype), {}, {}
    for name, prepare in operator.providers().items():
        if wanted and not any(part in name for part in wanted):
            continue
        try:
            call = bind(prepare, problem)
            error = gate.error(call)
        except Unavailable as reason:
            problems[name] = "unavailable", str(reason)
        except Exception as raised:  # whatever another package raises is its row's reason, not this run's end
            problems[name] = "unavailable", f"{type(raised).__name__}: {(str(raised).splitlines() or [''])[0]}"
        else:
            if not error <= gate.limit:
                problems[name] = "wrong", f"relative error {error:.1e}, allowed {gate.limit:.1e}"
            elif gate.is_stale(call, problem):
                problems[name] = "wrong", "the same results for other inputs"
            else:
                calls[name] = call
    return calls, problems


def _times(row: Row | None, limit: float) -> dict[str, str]:
    if row is None:
        return dict.fromkeys(("median_us", "p20_us", "p80_us", "rounds", "limit_us", "fraction"), "")
    times = {f"{name}_us": f"{getattr(row, name) * 1e6:.2f}" for name in ("median", "p20", "p80")}
    part = f"{limit / row.median:.3f}"
    return times | {"rounds": str(row.rounds), "limit_us": f"{limit * 1e6:.2f}", "fraction": part}


def chosen(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[Operator, str, torch.dtype]]:
    """Every (operator, shape, dtype) of the command line; with --quick the first shape that fits, and one dtype."""
    for operator in _matching(operators.load(), args.op, "op"):
        shapes = [shape for shape in operator.shapes if not args.shape or any(part in shape for part in args.shape)]
        for shape in shapes[:1] if args.quick else shapes:
            for dtype in operators.dtypes(operator, device)[: 1 if args.quick else None]:
                yield operator, shape, dtype


def missing(cases: list[tuple[Operator, str, torch.dtype]], device: torch.device) -> list:
    """Those of (operator, shape, dtype) without a row of this device."""
    name, known = describe(device).device, {row.case() for row in rows.read(OperatorRow)}
    return [case for case in cases if (name, case[0].name, case[1], short(case[2])) not in known]


def _matching(known: dict[str, Operator], wanted: Sequence[str], option: str) -> list[Operator]:
    for part in wanted:
        if not any(part in name for name in known):
            raise SystemExit(f"--{option} {part!r}: allowed are parts of {', '.join(known)}")
    return [operator for name, operator in known.items() if not wanted or any(part in name for part in wanted)]


def table(operator: Operator, made: Sequence[OperatorRow], device: torch.device) -> str:
    """One line per provider: times, how many times slower than ours it is, the fraction of the machine's limit."""
    first, ours = made[0], next((row for row in made if row.provider == operator.home(device)), None)
    work = f"{first.nbytes / 1e6:.2f} MB, {first.flops / 1e9:.3f} GFLOP"
    lines = [f"{first.operator}: {first.shape}, {first.dtype}; {work}"]
    for row in made:
        if row.status != "ok":
            lines.append(f"  {row.provider:22} {row.status}: {row.note}")
            continue
        spread = f"({float(row.p20_us):.1f}, {float(row.p80_us):.1f})"
        ratio = f"{float(row.median_us) / float(ours.median_us):7.2f}x" if ours and ours.status == "ok" else ""
        lines.append(f"  {row.provider:22} {float(row.median_us):11.1f} us {spread:24} {ratio:>8} of ours, "
                     f"{float(row.fraction):6.1%} of the limit")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("palp-fast bench", description=__doc__.splitlines()[0])
    made.add_argument("--op", action="append", default=[], help="operators whose name holds this")
    made.add_argument("--shape", action="append", default=[], help="layers whose name holds this")
    made.add_argument("--provider", action="append", default=[], help="providers whose name holds this")
    made.add_argument("--quick", action="store_true", help="one layer and dtype of each operator, short")
    made.add_argument("--seconds", type=float, help=f"for each layer and dtype [{FULL_SECONDS}, quick {QUICK_SECONDS}]")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    made.add_argument("--threads", type=int, help="of torch [its own choice]")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    made.add_argument("--record", action="store_true", help="append the rows to bench/results/")
    made.add_argument("--missing", action="store_true", help="only what has no row of this device in bench/results/")
    made.add_argument("--base", metavar="REV", help="compare with our operators at another commit")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Raises SystemExit for names that nothing has."""
    args = parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.base:
        from bench.base import compare

        compare(args, chosen(args, device))
        return
    cases = list(chosen(args, device))
    if not cases:
        raise SystemExit(f"--shape {args.shape}: no layer of these operators has such a name")
    if args.missing and not (cases := missing(cases, device)):
        print("nothing is missing: every layer has rows of this device")
        return
    bench = Bench(device, args.quick, args.seconds)
    limits = bench.limits()
    print(bench.machine.header())
    print("limits: " + ", ".join(f"{row.quantity} {float(row.value) / 1e9:.1f} G/s" for row in limits), flush=True)
    if args.record:
        rows.append("roofline", limits)
    found = []
    for operator, shape, dtype in cases:
        made = bench.measure(operator, shape, dtype, args.provider)
        if made:
            print(table(operator, made, device), flush=True)
        if args.record and made:
            rows.append(operator.name, made)
        found += made
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in (*limits, *found)], indent=1) + "\n", encoding="utf-8")
    if any(row.status == "wrong" for row in found):
        raise SystemExit("wrong results were not timed: see above")


if __name__ == "__main__":
    main()
