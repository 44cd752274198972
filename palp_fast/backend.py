"""Which backend serves an operator on a device, and why."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
OPERATORS = ("score_combination", "renoise", "add_noise", "lora_linear")
CPU_OPERATORS = ("score_combination", "renoise")

LIBRARY_FOLDER = Path(__file__).parent / "lib"
_NAMES = {"win32": "palp_fast_cpu.dll", "darwin": "libpalp_fast_cpu.dylib"}
LIBRARY = LIBRARY_FOLDER / _NAMES.get(sys.platform, "libpalp_fast_cpu.so")
BUILD_NOTE = LIBRARY_FOLDER / "build.txt"

_problem: str | None = "the C++ library has not been loaded yet"
_served: frozenset[str] = frozenset()
_deterministic = True


class Row(NamedTuple):
    """One line of `report`: an operator, the backend that serves it here, and the reason."""

    operator: str
    device: str
    backend: str
    reason: str


def load_library() -> None:
    """Load the C++ library if it is there; never raises, `select` and `report` say what is wrong."""
    global _problem, _served
    if not LIBRARY.exists():
        note = BUILD_NOTE.read_text(encoding="utf-8").strip() if BUILD_NOTE.exists() else ""
        _problem = note or "the C++ library was not built (pip install builds it where a C++ compiler is found)"
        return
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        _problem = f"the C++ library {LIBRARY.name} does not load: {error}"
        return
    _problem = None
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    _served = frozenset(op for op in OPERATORS if has_kernel(f"palp_fast::{op}", "CPU"))


def select(op: str, device: torch.device, requested: str = "auto") -> str:
    """The backend that will run `op` on `device`: "reference" or "cpu".

    "auto" falls back to the reference. Any other request that cannot be met raises: ValueError for an unknown name,
    RuntimeError with the reason for a backend that does not serve this operator here.
    """
    if requested == "reference":
        return "reference"
    if requested not in BACKENDS:
        raise ValueError(f"backend={requested!r}: allowed are {', '.join(map(repr, BACKENDS))}")
    reason = obstacle(op, device, "cpu" if requested == "auto" else requested)
    if reason is None:
        return "cpu"
    if requested == "auto":
        return "reference"
    raise RuntimeError(f"backend={requested!r} cannot serve {op} on {device}: {reason}")


def obstacle(op: str, device: torch.device, name: str) -> str | None:
    """Why `name` cannot serve `op` on `device`, or None if it can."""
    if name != "cpu":
        return f"this version has no {name} operators"
    if device.type != "cpu":
        return f"the C++ library serves cpu tensors, not {device.type}"
    if op not in CPU_OPERATORS:
        return f"no C++ version of {op} in this version"
    if _problem is None and op not in _served:
        return f"the C++ library {LIBRARY.name} is of a version without {op}: install palp_fast again"
    return _problem


def report(devices: tuple[str, ...] = ("cpu", "cuda")) -> list[Row]:
    """One row per operator and device, for `palp-fast doctor`."""
    rows = []
    for name in devices:
        device = torch.device(name)
        for op in OPERATORS:
            reason = obstacle(op, device, "cpu")
            rows.append(Row(op, name, select(op, device), reason or f"loaded {LIBRARY.name}"))
    return rows


def deterministic(enabled: bool = True) -> None:
    """Allow only repeatable backends (the default), or all. Every backend of this version is repeatable."""
    global _deterministic
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled={enabled!r}: allowed are True and False")
    _deterministic = enabled


def is_deterministic() -> bool:
    """Whether only repeatable backends are allowed."""
    return _deterministic
