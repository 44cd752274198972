"""Which backend serves an operator on a device, and why."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
OPERATORS = (
    "score_combination", "renoise", "add_noise", "timestep_sample", "timestep_update", "lora_linear",
    "lora_projections", "grad_norm", "adamw", "lion", "geglu", "group_norm_silu", "layer_norm", "attention",
    "frozen_conv2d", "frozen_linear", "dequantise", "quantise_rows",
    "int8_linear", "fp16_linear",
)
# Those that kernels/palp has.
TRITON = (
    "geglu", "group_norm_silu", "layer_norm", "attention", "lora_linear", "lora_projections", "dequantise",
    "quantise_rows", "int8_linear", "fp16_linear",
)
_TORCH = ("frozen_conv2d", "frozen_linear")  # products, left to torch's libraries
_EVERYWHERE = tuple(name for name in OPERATORS if name not in (*_TORCH, *TRITON))
# By device type, the operators that csrc/ has for it.
COMPILED = {"cpu": (*_EVERYWHERE, "geglu", "group_norm_silu"), "cuda": _EVERYWHERE}
TITLES = {"cpu": "C++", "cuda": "CUDA"}

LIBRARY_FOLDER = Path(__file__).parent / "lib"
_PREFIX, _SUFFIX = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}.get(sys.platform, ("lib", ".so"))
LIBRARIES = {device: LIBRARY_FOLDER / f"{_PREFIX}palp_fast_{device}{_SUFFIX}" for device in COMPILED}

_problems: dict[str, str | None] = {device: "the library has not been loaded yet" for device in COMPILED}
_served: dict[str, frozenset[str]] = {device: frozenset() for device in COMPILED}
_deterministic = True


class Row(NamedTuple):
    """One line of `report`: an operator, the backend that serves it here, and the reason."""

    operator: str
    device: str
    backend: str
    reason: str


def load_libraries() -> None:
    """Load the compiled libraries that are there; never raises, `select` and `report` say what is wrong."""
    for device, path in LIBRARIES.items():
        _problems[device] = _load(device, path)
        if _problems[device] is None:
            key = device.upper()
            has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
            _served[device] = frozenset(op for op in OPERATORS if has_kernel(f"palp_fast::{op}", key))


def _load(device: str, path: Path) -> str | None:
    """What keeps this library from serving, or None."""
    if not path.exists():
        note = path.with_name(f"build_{device}.txt")
        text = note.read_text(encoding="utf-8").strip() if note.exists() else ""
        needs = "a C++ compiler" if device == "cpu" else "a C++ compiler and nvcc"
        return text or f"the {TITLES[device]} library was not built (pip install builds it where it finds {needs})"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the {TITLES[device]} library {path.name} does not load: {error}"
    return None


def select(op: str, device: torch.device, requested: str = "auto") -> str:
    """The backend that will run `op` on `device`: "reference", "cpu", "cuda" or "triton".

    "auto" falls back to the reference. Any other request that cannot be met raises: ValueError for an unknown name,
    RuntimeError with the reason for a backend that does not serve this operator here.
    """
    if requested == "reference":
        return "reference"
    if requested not in BACKENDS:
        raise ValueError(f"backend={requested!r}: allowed are {', '.join(map(repr, BACKENDS))}")
    wanted = _home(op, device) if requested == "auto" else requested
    reason = obstacle(op, device, wanted)
    if reason is None:
        return wanted
    if requested == "auto":
        return "reference"
    raise RuntimeError(f"backend={requested!r} cannot serve {op} on {device}: {reason}")


def has_compiled(op: str, name: str) -> bool:
    """Whether the library compiled for this type of device is loaded and has `op`."""
    return _problems[name] is None and op in _served[name]


def _home(op: str, device: torch.device) -> str:
    """The one accelerated backend of an operator on a device type."""
    return "triton" if device.type == "cuda" and op in TRITON else device.type


def obstacle(op: str, device: torch.device, name: str) -> str | None:
    """Why `name` cannot serve `op` on `device`, or None if it can."""
    if name == "triton":
        return _no_triton_version(op) or _triton_problem(device)
    if name not in COMPILED:
        return f"this version has no {name} operators"
    if device.type != name:
        return f"the {TITLES[name]} library serves {name} tensors, not {device.type}"
    if name == "cuda" and not torch.compiler.is_compiling() and (reason := _launch_problem(device)):
        return reason
    if op not in COMPILED[name]:
        return f"no {TITLES[name]} version of {op} in this version"
    if _problems[name] is None and op not in _served[name]:
        library = f"the {TITLES[name]} library {LIBRARIES[name].name}"
        return f"{library} is of a version without {op}: install palp_fast again"
    return _problems[name]


def _no_triton_version(op: str) -> str | None:
    return None if op in TRITON else f"no Triton version of {op} in this version"


@lru_cache
def _triton_problem(device: torch.device) -> str | None:
    """Why Triton cannot serve this device. Its interpreter, switched on by TRITON_INTERPRET=1, serves the CPU."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"Triton serves cuda tensors, not {device.type} (its interpreter would: TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    return None if (major, minor) >= (7, 5) else f"it needs sm_75 or later, this card is sm_{major}{minor}"


@lru_cache
def _launch_problem(device: torch.device) -> str | None:
    """Why no kernel of the loaded CUDA library runs on this device: one is tried, once. None where there is no GPU."""
    if _problems["cuda"] is not None or not torch.cuda.is_available():
        return None
    try:
        torch.ops.palp_fast.write_words(torch.empty(1, dtype=torch.int64, device=device), [0])
    except RuntimeError as error:
        return f"the CUDA library does not run on {torch.cuda.get_device_name(device)}: {str(error).splitlines()[0]}"
    return None


def report(devices: tuple[str, ...] = ("cpu", "cuda")) -> list[Row]:
    """One row per operator and device, for `palp-fast doctor`."""
    rows = []
    for name in devices:
        device = torch.device(name)
        for op in OPERATORS:
            home = _home(op, device)
            reason = obstacle(op, device, home)
            serves = "by Triton" if home == "triton" else f"loaded {LIBRARIES[name].name}"
            rows.append(Row(op, name, select(op, device), reason or serves))
    return rows


def is_capturing() -> bool:
    """Whether what is called now becomes part of a CUDA graph, and does not run."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def deterministic(enabled: bool = True) -> None:
    """Allow only repeatable backends (the default), or all. Of this version, only providers of attention differ."""
    global _deterministic
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled={enabled!r}: allowed are True and False")
    _deterministic = enabled


@contextlib.contextmanager
def repeatable_cudnn(device: torch.device) -> Iterator[None]:
    """Within, cuDNN picks among repeatable algorithms, by rule and not by timing, unless all are allowed."""
    flags = torch.backends.cudnn
    before = flags.deterministic, flags.benchmark
    if device.type == "cuda" and _deterministic:
        flags.deterministic, flags.benchmark = True, False
    try:
        yield
    finally:
        flags.deterministic, flags.benchmark = before


def is_deterministic() -> bool:
    """Whether only repeatable backends are allowed."""
    return _deterministic
