"""Rows of measurements as CSV under bench/results/: the schema, and how they are appended and read.

One file per benchmark and device, <benchmark>-<device>.csv, only ever appended to. What counts of a case is its last
run, whole, since providers are compared within a run alone.
"""

from __future__ import annotations

import csv
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

FOLDER = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Facts:
    """What made a row. started: when its run began, UTC; device: name; kind: cpu or cuda; driver: of a GPU;
    provider_version: of the provider's package; commit: of palp_fast, "+" if changed since; mode: "deterministic" or
    "any", then "quick" or "full"."""

    started: str
    device: str
    kind: str
    driver: str
    threads: int
    torch: str
    provider_version: str
    palp_fast: str
    commit: str
    mode: str


@dataclass(frozen=True)
class OperatorRow(Facts):
    """One provider on one layer. status: "ok", "wrong" (not timed; note: error and limit) or "unavailable" (note: why).
    Times in microseconds per call, forward and backward where there is a gradient. nbytes, flops: of an ideal
    implementation; limit_us: what they take at the measured copy bandwidth and matmul rate; fraction: limit_us over
    median_us, above 1 only for data that stay in a cache."""

    operator: str
    shape: str
    dtype: str
    provider: str
    status: str
    note: str
    median_us: str
    p20_us: str
    p80_us: str
    rounds: str
    nbytes: int
    flops: int
    limit_us: str
    fraction: str

    def case(self) -> tuple:
        return self.device, self.operator, self.shape, self.dtype


@dataclass(frozen=True)
class RooflineRow(Facts):
    """A limit of the machine. quantity: "copy" (bytes per second, read and written) or "matmul fp32", ... (FLOP/s)."""

    quantity: str
    value: float

    def case(self) -> tuple:
        return (self.device,)


@dataclass(frozen=True)
class StepRow(Facts):
    """One provider end to end, a case of its own: large models are run one provider at a time. model: "sd15", "sdxl"
    (random weights) or "emoji-64"; latents: "4x64x64"; dtype: of the frozen weights; status, note as of an operator;
    step_s: seconds of one optimizer step of one sample, with its 20th and 80th percentile; peak_bytes: of tensors on a
    GPU, of the process on a CPU; lora_s: from the start of the process to the saved file of lora_steps steps, "" where
    not measured."""

    model: str
    latents: str
    dtype: str
    provider: str
    status: str
    note: str
    step_s: str
    p20_s: str
    p80_s: str
    rounds: str
    peak_bytes: str
    lora_s: str
    lora_steps: str

    def case(self) -> tuple:
        return self.device, self.model, self.latents, self.dtype, self.provider


@dataclass(frozen=True)
class PredictionRow:
    """A predicted step (bench/model.py), never a measurement. bandwidth, rate, source: of the card; launches, flops,
    nbytes: counted in one step; bound: what the predicted seconds are made of; measured_s, error: seconds of the same
    step measured on the same card, and by how much the prediction is off, "" where there is none."""

    model: str
    latents: str
    dtype: str
    provider: str
    card: str
    bandwidth: str
    rate: str
    source: str
    launches: int
    flops: int
    nbytes: int
    predicted_s: str
    bound: str
    measured_s: str
    error: str

    started = ""

    def case(self) -> tuple:
        return self.card, self.model, self.latents, self.dtype, self.provider


Kind = TypeVar("Kind", OperatorRow, RooflineRow, StepRow, PredictionRow)


def append(benchmark: str, made: list, folder: Path = FOLDER) -> list[Path]:
    """Adds rows to the files of a benchmark, one for each device; returns their paths."""
    return [
        write(f"{benchmark}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.csv",
              [row for row in made if row.device == device], folder)
        for device in dict.fromkeys(row.device for row in made)
    ]


def write(name: str, made: list, folder: Path = FOLDER) -> Path:
    """Adds rows of one kind to a file, which is begun with its columns; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(made[0])], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(map(asdict, made))
    return path


def read(kind: type[Kind], prefix: str = "", folder: Path = FOLDER) -> list[Kind]:
    """The rows of every file whose columns are those of `kind`, of each case the last run, in the files' order."""
    names = [field.name for field in fields(kind)]
    found = {}
    for path in sorted(folder.glob(f"{prefix}*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames == names:
                for values in reader:
                    row = kind(**values)
                    run = found.setdefault(row.case(), [])
                    if run and run[0].started != row.started:
                        run.clear()
                    run.append(row)
    return [row for run in found.values() for row in run]
