"""Writes the tables and plots of docs/benchmarks.md and the figures of README.md from the rows alone.

    python -m bench.report [--check | --show cpu|cuda]

A table stands between <!-- rows: NAME --> and <!-- end -->; the text around it is left alone. --check writes nothing
and fails if anything differs from what the rows give; --show prints the figures of one kind of device.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from itertools import groupby

import torch

from bench import operators, plot, rows
from bench.machine import ROOT, short
from bench.rows import OperatorRow, PredictionRow, RooflineRow, StepRow

DOCUMENTS = (ROOT / "docs" / "benchmarks.md", ROOT / "README.md")
PLOTS = {kind: ROOT / "docs" / f"benchmarks-{kind}.png" for kind in ("operators", "steps")}
OURS = ("palp_fast triton", "palp_fast cuda", "palp_fast cpu", "palp_fast reference")  # the first that serves
NOT_MEASURED = "not measured"
_BLOCK = re.compile(r"(<!-- rows: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def operator_cases(kind: str) -> list[list[OperatorRow]]:
    """Rows of one layer and dtype on one device, ours that serves first."""
    found = [row for row in rows.read(OperatorRow) if row.kind == kind]
    found.sort(key=lambda row: (row.device, row.operator.lower(), row.shape, row.dtype))
    cases = groupby(found, key=lambda row: (row.device, row.operator, row.shape, row.dtype))
    return [case for _, group in cases if (case := _ours_first(list(group)))]


def _ours_first(case: list[OperatorRow]) -> list[OperatorRow]:
    """[] where none of ours is right: there is nothing to compare."""
    ours = next((row for name in OURS for row in case if row.provider == name and row.status == "ok"), None)
    return [ours, *(row for row in case if row is not ours)] if ours else []


def operators_table(kind: str) -> str:
    """Time of ours and its part of the limit; how many times as long the others take."""
    cases = operator_cases(kind)
    if not cases:
        return NOT_MEASURED
    return "\n\n".join(_device_table(device, list(own)) for device, own in groupby(cases, key=lambda case: case[0].device))


def _device_table(device: str, cases: list[list[OperatorRow]]) -> str:
    lines = [
        f"**{device}**", "", "| operator | layer | dtype | ours, us (p20, p80) | of the limit | others, in times of ours |",
        "|---|---|---|---|---|---|"]
    for ours, *others in cases:
        backend = ours.provider.removeprefix("palp_fast ")
        lines.append(
            f"| {ours.operator} | {ours.shape} | {ours.dtype} | {_us(ours.median_us)} ({_us(ours.p20_us)}, "
            f"{_us(ours.p80_us)}), {backend} | {float(ours.fraction):.0%} | {_ratios(ours, others)} |")
    return "\n".join(lines)


def _ratios(ours: OperatorRow, others: list[OperatorRow]) -> str:
    parts = [
        f"{row.provider} {float(row.median_us) / float(ours.median_us):.2f}" if row.status == "ok" else
        f"{row.provider} wrong ({row.note})" for row in others if row.status != "unavailable"]
    return ", ".join(parts) or "none"


def summary(kind: str) -> str:
    """One line per operator: ours at its first measured layer, and the best of the others."""
    lines = []
    for ours, *others in _first_of_each(operator_cases(kind)):
        times = {row.provider: float(row.median_us) / float(ours.median_us) for row in others
                 if row.status == "ok" and not row.provider.startswith("palp_fast")}
        best = min(times, key=times.get, default=None)
        against = f"{best} takes {times[best]:.2f} times as long" if best else "nothing to compare with"
        lines.append(f"{ours.operator:16} {ours.shape:26} {ours.dtype}: {_us(ours.median_us):>8} us, {against}")
    return "\n".join(lines) or NOT_MEASURED


def absent_table(kind: str) -> str:
    """Providers without a single time on this kind of device, and why."""
    found = [row for row in rows.read(OperatorRow) if row.kind == kind]
    if not found:
        return NOT_MEASURED
    timed = {row.provider for row in found if row.status == "ok"}
    reasons = {}
    for row in found:
        if row.provider not in timed:
            reasons.setdefault(row.provider, row.note)
    return "\n".join(f"- {name}: {note}" for name, note in sorted(reasons.items())) or "none"


def missing_table(kind: str) -> str:
    """Layers without a row on this kind of device, by operator; with the dtype where another has one."""
    known = {(row.operator, row.shape, row.dtype) for row in rows.read(OperatorRow) if row.kind == kind}
    if not known:
        return NOT_MEASURED
    lines = []
    for operator in operators.load().values():
        names = [short(dtype) for dtype in operators.dtypes(operator, torch.device(kind))]
        lacking = {shape: [name for name in names if (operator.name, shape, name) not in known]
                   for shape in operator.shapes}
        layers = [shape if found == names else f"{shape} in {' and '.join(found)}"
                  for shape, found in lacking.items() if found]
        if layers:
            lines.append(f"- {operator.name}: {'; '.join(layers)}")
    return "\n".join(lines) or "none"


def machines_table() -> str:
    """Every machine with rows: versions, and the limits measured there."""
    limits = {}
    for row in rows.read(RooflineRow):
        limits.setdefault(row.device, {})[row.quantity] = row
    if not limits:
        return NOT_MEASURED
    lines = ["| device | driver | threads | torch | copy, GB/s | matmul, TFLOP/s | commit | mode |", "|" + "---|" * 8]
    for device, values in limits.items():
        one = values["copy"]
        rates = ", ".join(f"{name.removeprefix('matmul ')} {float(row.value) / 1e12:.3f}"
                          for name, row in values.items() if name != "copy")
        copy = float(one.value) / 1e9
        versions = f"{one.driver or 'none'} | {one.threads} | {one.torch}"
        lines.append(f"| {device} | {versions} | {copy:.1f} | {rates} | {one.commit} | {one.mode} |")
    return "\n".join(lines)


def step_cases(kind: str) -> list[list[StepRow]]:
    """Rows of one model on one device, ours first."""
    found = [row for row in rows.read(StepRow) if row.kind == kind]
    found.sort(key=lambda row: (
        row.device, row.model, row.latents, row.dtype, not row.provider.startswith("palp_fast")))
    return [list(group) for _, group in groupby(found, key=lambda row: (row.device, row.model, row.latents, row.dtype))]


def steps_table(kind: str) -> str:
    """Seconds of a step, in times of ours, peak memory, time to the saved LoRA."""
    cases = step_cases(kind)
    if not cases:
        return NOT_MEASURED
    lines = ["| model, latents, dtype | provider | step, s (p20, p80) | in times of ours, fast | peak, GiB | "
             "LoRA of N steps, s |", "|---|---|---|---|---|---|"]
    for case in cases:
        ours = next((row for row in case if row.provider == "palp_fast fast" and row.status == "ok"), None)
        for row in case:
            name = f"{row.model}, {row.latents}, {row.dtype}"
            if row.status != "ok":
                lines.append(f"| {name} | {row.provider} | {row.status}: {row.note} | | | |")
                continue
            ratio = f"{float(row.step_s) / float(ours.step_s):.2f}" if ours else ""
            lora = f"{row.lora_s} (N = {row.lora_steps})" if row.lora_s else ""
            lines.append(f"| {name} | {row.provider} | {float(row.step_s):.3f} ({float(row.p20_s):.3f}, "
                         f"{float(row.p80_s):.3f}) | {ratio} | {int(row.peak_bytes) / 2**30:.2f} | {lora} |")
    return "\n".join(lines)


def predictions_table(measured: bool) -> str:
    """Predictions: for cards not at hand, or beside what was measured."""
    found = [row for row in rows.read(PredictionRow, "predictions") if bool(row.measured_s) == measured]
    if not found:
        return NOT_MEASURED if measured else "none"
    last = " measured, s | error |" if measured else " binds |"
    lines = ["| model, latents, dtype | provider | card | TFLOP | GB | launches | predicted, s |" + last]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    for row in found:
        end = f"{row.measured_s} | {float(row.error):+.0%} |" if measured else f"{row.bound} |"
        counted = f"{int(row.flops) / 1e12:.2f} | {int(row.nbytes) / 1e9:.1f} | {row.launches}"
        lines.append(f"| {row.model}, {row.latents}, {row.dtype} | {row.provider} | {row.card} | {counted} | "
                     f"{row.predicted_s} | {end}")
    return "\n".join(lines)


def readme_table() -> str:
    """The step of every measured model against the baselines, on CPU and on CUDA."""
    lines = ["| a PALP step, in times of ours (`memory=\"fast\"`) | plain | tuned | dreambooth (no PALP) |"]
    lines.append("|---|---|---|---|")
    for kind in ("cpu", "cuda"):
        cases = [case for case in step_cases(kind) if any(_ok(row, "palp_fast fast") for row in case)]
        for case in cases:
            ours = next(float(row.step_s) for row in case if _ok(row, "palp_fast fast"))
            best = {name: min((float(row.step_s) / ours for row in case if _ok(row, name)), default=None)
                    for name in ("plain", "tuned", "dreambooth")}
            figures = " | ".join(NOT_MEASURED if value is None else f"{value:.2f}" for value in best.values())
            one = case[0]
            lines.append(f"| {one.model}, latents {one.latents}, {one.dtype}, {one.device} | {figures} |")
        if not cases:
            lines.append(f"| {kind.upper()} | {' | '.join([NOT_MEASURED] * 3)} |")
    return "\n".join(lines)


def _ok(row: StepRow, name: str) -> bool:
    return row.status == "ok" and row.provider.startswith(name)


def _us(text: str) -> str:
    value = float(text)
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


TABLES: dict[str, Callable[[], str]] = {
    "machines": machines_table,
    "operators on cpu": lambda: operators_table("cpu"), "operators on cuda": lambda: operators_table("cuda"),
    "missing on cpu": lambda: missing_table("cpu"), "missing on cuda": lambda: missing_table("cuda"),
    "absent on cpu": lambda: absent_table("cpu"), "absent on cuda": lambda: absent_table("cuda"),
    "steps on cpu": lambda: steps_table("cpu"), "steps on cuda": lambda: steps_table("cuda"),
    "predictions": lambda: predictions_table(False), "predictions beside measurements": lambda: predictions_table(True),
    "summary": readme_table,
}


def filled(text: str) -> str:
    """A document with every table as the rows give it. Raises ValueError for a name that TABLES lacks."""

    def table(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"table {match[2]!r}: allowed are {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"

    return _BLOCK.sub(table, text)


def drawn(kind: str) -> bytes:
    """The PNG of a kind of plot: times of every provider, in times of ours."""
    if kind == "operators":
        groups = [(f"{c[0].operator}: {c[0].shape}, {c[0].dtype}, {c[0].device}", _bars(c, "median_us"))
                  for device in ("cpu", "cuda") for c in _first_of_each(operator_cases(device))]
        title = "Time of each provider, in times of ours; the first measured layer of every operator"
    else:
        groups = [(f"{c[0].model}, latents {c[0].latents}, {c[0].dtype}, {c[0].device}", _bars(c, "step_s"))
                  for device in ("cpu", "cuda") for c in step_cases(device)]
        title = "Seconds of one step, one sample"
    groups = [(name, entries) for name, entries in groups if entries]
    return plot.encode(plot.bars(title, groups or [(NOT_MEASURED, [("", 1.0, "")])]))


def _first_of_each(cases: list[list[OperatorRow]]) -> Iterable[list[OperatorRow]]:
    return {(case[0].device, case[0].operator): case for case in reversed(cases)}.values()


def _bars(case: list, column: str) -> list[tuple[str, float, str]]:
    timed = [(row.provider, float(getattr(row, column))) for row in case if row.status == "ok"]
    unit = " s" if column == "step_s" else ""
    first = 1.0 if column == "step_s" else (timed[0][1] if timed else 1.0)
    return [(name, value / first, f"{value / first:.2f}{unit}") for name, value in timed]


def outdated() -> list[str]:
    """Names of the files that differ from what the rows give."""
    written = {path.name: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    texts = [name for name, text in written.items() if text != filled(text)]
    return texts + [path.name for kind, path in PLOTS.items() if not path.exists() or path.read_bytes() != drawn(kind)]


def main() -> None:
    """The command line. Raises SystemExit naming what differs, with --check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if anything differs")
    parser.add_argument("--show", choices=("cpu", "cuda"), help="print the figures of one kind of device")
    args = parser.parse_args()
    if args.show:
        print("\n\n".join([summary(args.show), steps_table(args.show)]))
        return
    if args.check:
        if names := outdated():
            raise SystemExit(f"not as the rows give it: {', '.join(names)}; run python -m bench.report")
        return
    for path in DOCUMENTS:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    for kind, path in PLOTS.items():
        path.write_bytes(drawn(kind))


if __name__ == "__main__":
    main()
