"""The machine of a measurement: what it is, and the limits that every row is compared with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.timing import interleaved
from palp_fast import backend
from palp_fast.doctor import cpu_name

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("triton", "diffusers", "peft", "bitsandbytes", "xformers", "torchao")


@dataclass(frozen=True)
class Machine:
    """started: now, UTC; device: its name; kind: "cpu" or "cuda"; driver: of a GPU, else ""; versions: by package."""

    started: str
    device: str
    kind: str
    driver: str
    threads: int
    python: str
    torch: str
    versions: dict[str, str]
    commit: str
    deterministic: bool

    def header(self) -> str:
        """One line per fact, for people."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        driver = f", driver {self.driver}" if self.driver else ""
        return (
            f"{self.device} ({self.kind}{driver}), {self.threads} threads\n"
            f"Python {self.python}, torch {self.torch}, {versions}\n"
            f"palp_fast at {self.commit}; {'only repeatable backends' if self.deterministic else 'any backend'}"
        )


@dataclass(frozen=True)
class Roofline:
    """bandwidth: bytes per second of a copy, read and written; rates: {dtype: FLOP per second of a square product}."""

    bandwidth: float
    rates: dict[str, float]

    def seconds(self, nbytes: int, flops: int, dtype: torch.dtype) -> float:
        """The least time for this traffic and these products."""
        return max(nbytes / self.bandwidth, flops / self.rates[short(dtype)])


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def describe(device: torch.device) -> Machine:
    """The machine as it is now."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return Machine(
        datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), name, device.type,
        _driver() if device.type == "cuda" else "", torch.get_num_threads(),
        platform.python_version(), torch.__version__, {name: v for name in PEERS if (v := version(name))}, commit(),
        backend.is_deterministic())


def version(package: str) -> str:
    """Of an installed package, "" of another."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit(root: Path = ROOT) -> str:
    """Of the checkout, with "+" behind it if files that are measured have changed since; "unknown" without git."""
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", "palp_fast", "kernels", "csrc")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def measure_roofline(device: torch.device, dtypes: tuple[torch.dtype, ...], seconds: float = 0.5) -> Roofline:
    """Copies of 256 MiB (a GPU: 1 GiB), more than any cache; square products of 1024 (a GPU: 8192)."""
    large, side = (2**30, 8192) if device.type == "cuda" else (2**28, 1024)
    source = torch.ones(large, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = interleaved({"copy": lambda: target.copy_(source)}, device, seconds)["copy"]
    products = {}
    for dtype in dtypes:
        matrix = torch.randn(side, side, device=device).to(dtype)
        products[short(dtype)] = lambda matrix=matrix: matrix @ matrix
    rows = interleaved(products, device, seconds)
    return Roofline(2 * large / copy.median, {name: 2 * side**3 / row.median for name, row in rows.items()})


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True).stdout.strip()
