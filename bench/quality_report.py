"""Tables, verdicts, curves and contact sheets of bench/quality.py, from its rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from PIL import Image, ImageDraw

from bench.curves import chart
from bench.quality import BASE
from bench.quality_runs import Run, Runs
from palp_fast.zoo.ceilings import short_of, table
from palp_fast.zoo.world import TARGETS

SHARES = ("style", "background", "second", "identity", "joint")
ALIGNMENTS = ("text_alignment", "image_alignment")
RESAMPLES, CELL = 10_000, 64
NOT_MEASURED = "not measured"
Cell = tuple[str, int]  # method and step


class Results:
    """Rows of one judge: means over targets and seeds for each subject, and bootstrap intervals over subjects."""

    def __init__(self, rows: Sequence[dict], judge: str):
        self.judge, self._rows = judge, rows
        self.cells: list[Cell] = list(dict.fromkeys((row["method"], row["step"]) for row in rows))
        per_cell = [{row["subject"] for row in rows if (row["method"], row["step"]) == cell} for cell in self.cells]
        self.subjects = sorted(set.intersection(*per_cell)) if per_cell else []

    def by_subject(self, cell: Cell, measure: str) -> np.ndarray:
        """Mean of a measure for each subject; of "second" over the targets that have one. NaN where there is none."""
        found: dict[str, list[float]] = {subject: [] for subject in self.subjects}
        for row in self._rows:
            asked = measure != "second" or TARGETS[row["target"]][3] is not None
            if (row["method"], row["step"]) == cell and row["subject"] in found and asked:
                found[row["subject"]].append(row["judges"][self.judge][measure])
        return np.array([np.mean(values) if values else np.nan for values in found.values()])

    def mean(self, cell: Cell, measure: str) -> float:
        return float(self.by_subject(cell, measure).mean())

    def interval(self, statistic: Callable[[np.ndarray], np.ndarray], cells: Sequence[Cell]) -> tuple[float, float]:
        """95 % bootstrap interval over subjects of statistic(means of "joint" [resamples, cells])."""
        values = np.stack([self.by_subject(cell, "joint") for cell in cells], axis=1)
        chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
        low, high = np.percentile(statistic(values[chosen].mean(1)), [2.5, 97.5])
        return float(low), float(high)

    def photo_identity(self, method: str) -> float | None:
        """Identity in pictures of y_P at the end of training, None where it was not measured."""
        found = [row["photo"][self.judge] for row in self._rows if row["method"] == method and "photo" in row]
        return float(np.mean(found)) if found else None


def write(runs: Runs, palp_step: int) -> str:
    """Write report.md, curves and sheets into the folder of the runs; returns the report."""
    rows = runs.rows()
    parts = []
    for name, judge in runs.judges.items():
        parts.append(table(name, judge.ceilings) if judge.ceilings else f"ceilings of judge {name}: {NOT_MEASURED}")
        parts += [f"below its limit: {what}" for what in (short_of(judge.ceilings) if judge.ceilings else [])]
    results = [Results(rows, name) for name in runs.judges]
    if not rows or not results[0].subjects:
        return "\n\n".join([*parts, f"results: {NOT_MEASURED}"])
    planned = len(runs.plan.subjects)
    parts.append(f"{len(results[0].subjects)} of {planned} subjects, {len(runs.plan.targets)} targets, "
                 f"{runs.plan.images} pictures each, model {runs.plan.model}")
    for each in results:
        parts += [main_table(each, palp_step), alignment_table(each, palp_step)]
    parts.append(verdicts(results, palp_step))
    runs.folder.mkdir(parents=True, exist_ok=True)
    for each in results:
        curves(each).save(runs.folder / f"curves-{each.judge}.png")
    for target in runs.plan.targets:
        sheet(runs, target).save(runs.folder / f"sheet-{target}.png")
    text = "\n\n".join(parts)
    (runs.folder / "report.md").write_text(text + "\n")
    return text


def compared(results: Results, palp_step: int) -> list[Cell]:
    """Base, DreamBooth at every step, every other method at the step fixed beforehand."""
    return [cell for cell in results.cells if cell[0] in (BASE, "dreambooth") or cell[1] == palp_step]


def main_table(results: Results, palp_step: int) -> str:
    """Shares right, joint with its interval, diversity."""
    lines = [f"| judge {results.judge} | step | {' | '.join(SHARES)} | joint, 95 % | diversity |",
             "|---" * (len(SHARES) + 4) + "|"]
    for cell in compared(results, palp_step):
        shares = " | ".join(_percent(results.mean(cell, share)) for share in SHARES)
        low, high = results.interval(lambda means: means[:, 0], [cell])
        lines.append(f"| {cell[0]} | {cell[1]} | {shares} | {low:.1%} to {high:.1%} | "
                     f"{results.mean(cell, 'diversity'):.3f} |")
    return "\n".join(lines)


def alignment_table(results: Results, palp_step: int) -> str:
    """The measures of the paper's Table 2, every method at one step."""
    lines = [f"| judge {results.judge}, step {palp_step} | text alignment | image alignment |", "|---|---|---|"]
    for cell in results.cells:
        if cell[0] == BASE or cell[1] == palp_step:
            found = " | ".join(f"{results.mean(cell, name):.3f}" for name in ALIGNMENTS)
            lines.append(f"| {cell[0]} | {found} |")
    return "\n".join(lines)


def verdicts(results: Sequence[Results], palp_step: int) -> str:
    """What the fair test asks, by the first judge, and whether the second ranks alike; "not measured" where it is."""
    first, lines = results[0], ["| asked | found | |", "|---|---|---|"]
    steps = [cell for cell in first.cells if cell[0] == "dreambooth"]
    base, palp = (BASE, 0), ("palp", palp_step)
    if base not in first.cells or palp not in first.cells or not steps:
        return f"verdicts: {NOT_MEASURED}; base, dreambooth and palp at step {palp_step} are needed"

    def line(asked: str, found: str, holds: bool) -> None:
        lines.append(f"| {asked} | {found} | {'yes' if holds else 'no'} |")

    learned = first.photo_identity("dreambooth")
    loss = first.mean(base, "style") - first.mean(max(steps, key=lambda cell: cell[1]), "style")
    line("dreambooth: identity of \"a photo of [V]\" >= 80 %", _percent(learned), learned >= 0.8)
    line("dreambooth: final style at least 20 points under the base's", _points(loss), loss >= 0.2)
    best = max(steps, key=lambda cell: first.mean(cell, "joint"))
    gain = first.mean(palp, "joint") - first.mean(best, "joint")
    low, high = first.interval(lambda means: means[:, 0] - means[:, 1:].max(1), [palp, *steps])
    line(f"joint of palp - best dreambooth (step {best[1]}) >= 15 points", _points(gain), gain >= 0.15)
    line("its 95 % interval, the best step chosen anew in every resample, above 0",
         f"{_points(low)} to {_points(high)}", low > 0)
    over_base = first.mean(palp, "joint") - first.mean(base, "joint")
    line("joint of palp - base >= 25 points", _points(over_base), over_base >= 0.25)
    line("identity of palp >= 50 %", _percent(first.mean(palp, "identity")), first.mean(palp, "identity") >= 0.5)
    varied = first.mean(palp, "diversity") / max(first.mean(best, "diversity"), 1e-9)
    line("diversity of palp >= 80 % of dreambooth's", f"{varied:.0%}", varied >= 0.8)
    asked = "both judges put every two rows of the table in the same order of joint"
    if len(results) < 2:
        return "\n".join([*lines, f"| {asked} | {NOT_MEASURED}: there is one judge | |"])
    rank = order_agreement(results, compared(first, palp_step))
    line(asked, f"{rank:.0%} of the pairs", rank == 1)
    return "\n".join(lines)


def order_agreement(results: Sequence[Results], cells: Sequence[Cell]) -> float:
    """Share of pairs of cells that all judges order alike by joint."""
    means = [[each.mean(cell, "joint") for cell in cells] for each in results]
    pairs = list(combinations(range(len(cells)), 2))
    alike = [len({np.sign(each[one] - each[other]) for each in means}) == 1 for one, other in pairs]
    return float(np.mean(alike)) if pairs else 1.0


def curves(results: Results) -> Image.Image:
    """Text and image alignment against steps, as the paper's Fig. 6; every curve starts at the base."""
    methods = [method for method in dict.fromkeys(cell[0] for cell in results.cells) if method != BASE]
    panels = {measure: {method: [(cell[1], results.mean(cell, measure)) for cell in sorted(
        results.cells, key=lambda cell: cell[1]) if cell[0] in (method, BASE)] for method in methods or [BASE]}
        for measure in ALIGNMENTS}
    return chart(panels, "steps")


def sheet(runs: Runs, target: int, columns: int = 2) -> Image.Image:
    """One row a subject: a photo, the base, the last pictures of every method, the truth."""
    plan = runs.plan
    titles = [("photo", 1), (BASE, columns), *((method, columns) for method in plan.methods), ("truth", 1)]
    width = sum(count for _, count in titles) * CELL
    image = Image.new("RGB", (width, 16 + len(plan.subjects) * CELL), "white")
    draw, x = ImageDraw.Draw(image), 0
    for title, count in titles:
        draw.text((x + 2, 2), title[:count * 10], fill="black")
        for row, subject in enumerate(plan.subjects):
            run = Run(subject, target, title, plan.seeds[0])
            strip = _strip(runs, run, columns)
            if strip is not None:
                image.paste(strip, (x, 16 + row * CELL))
        x += count * CELL
    return image


def _strip(runs: Runs, run: Run, columns: int) -> Image.Image | None:
    if run.method == "photo":
        return runs.photos(run.subject)[0]
    if run.method == "truth":
        return runs.truth(run.subject, run.target)
    path = runs.pictures_path(run, max(runs.plan.steps_of(run.method)))
    return Image.open(path).crop((0, 0, columns * CELL, CELL)) if path.exists() else None


def _percent(share: float | None) -> str:
    return NOT_MEASURED if share is None or np.isnan(share) else f"{share:.1%}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f} points"
