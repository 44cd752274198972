"""The benchmarks by name: each bench_<name>.py beside this file holds one or more Operators."""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path

import torch

from bench.core import Operator


@lru_cache
def load() -> dict[str, Operator]:
    """{name: Operator}, in the order of the files."""
    files = sorted(Path(__file__).parent.glob("bench_*.py"))
    modules = [importlib.import_module(f"bench.{file.stem}") for file in files]
    return {operator.name: operator for module in modules for operator in module.OPERATORS}


def dtypes(operator: Operator, device: torch.device) -> tuple[torch.dtype, ...]:
    """Those that it is measured in, the first one with --quick."""
    if operator.dtypes is not None:
        return operator.dtypes
    return (torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float32, torch.bfloat16)
