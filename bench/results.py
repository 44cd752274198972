"""Measured rows as CSV under bench/results/, one file per benchmark and device, with what made them."""

import csv
from pathlib import Path

import torch

from bench.timing import Row
from palp_fast import __version__
from palp_fast.doctor import cpu_name

FOLDER = Path(__file__).parent / "results"
COLUMNS = ("case", "provider", "median_us", "p20_us", "p80_us", "rounds", "device", "threads", "torch", "palp_fast")


class Results:
    """Collects the rows of one benchmark; `write` replaces the file of this benchmark and device."""

    def __init__(self, benchmark: str, device: str) -> None:
        self.rows: list[tuple] = []
        self.device = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
        self.path = FOLDER / f"{benchmark}-{'-'.join(self.device.lower().split())}.csv"
        self.made_by = (self.device, torch.get_num_threads(), torch.__version__, __version__)

    def add(self, case: str, rows: dict[str, Row]) -> None:
        """One row per provider, in microseconds per call."""
        for provider, row in rows.items():
            times = (f"{seconds * 1e6:.2f}" for seconds in row[:3])
            self.rows.append((case, provider, *times, row.rounds, *self.made_by))

    def write(self) -> None:
        FOLDER.mkdir(exist_ok=True)
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *self.rows])
        print(f"written: {self.path}")
