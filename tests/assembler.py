"""Compiles the Triton kernels that a launcher launches, for cards that are not there, and reads their resources."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from palp_fast.kernels.launch import FAMILIES, SHARED_KIB, watched

# Two cards stand for all but with PALP_FAST_EVERY_CARD=1: every card takes minutes.
EVERY = os.environ.get("PALP_FAST_EVERY_CARD") == "1"
TARGETS = {10 * major + minor: family for (major, minor), family in FAMILIES.items()}
CARDS = TARGETS if EVERY else {target: TARGETS[target] for target in (86, 90)}


@dataclass(frozen=True)
class Resources:
    """One kernel on one target: name, compute capability, per-thread registers, bytes, matrix instructions."""

    kernel: str
    target: int
    registers: int
    shared: int
    spilled: int
    products: int


class _Driver:
    """Answers as the driver of a card of the given capability: enough to compile for it."""

    def __init__(self, target: int):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return self.target

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _driver_of(target: int) -> Iterator[None]:
    config = triton.runtime.driver
    before = config._active
    config.set_active(_Driver(target))
    try:
        yield
    finally:
        config._active = before


def compiled(launcher: Callable, *args, target: int) -> list[Resources]:
    """Every kernel that launcher(*args) launches, with tensors on the meta device, compiled for `target`."""
    found = []

    def compile_only(kernel, grid, args, options):
        with _driver_of(target):
            made = kernel.warmup(*args, grid=grid, **options)
        found.append(_resources(kernel.__name__, target, made))

    with watched(compile_only, TARGETS[target]):
        launcher(*args)
    return found


def assert_fits(found: list[Resources], may_spill: int = 0) -> None:
    """Fail unless there are kernels, none spills more bytes than allowed, and shared memory is within the card's."""
    assert found
    for kernel in found:
        print(kernel)
        assert kernel.spilled <= may_spill, kernel
        assert kernel.shared <= 1024 * SHARED_KIB[TARGETS[kernel.target]], kernel


def launches(launcher: Callable, *args) -> list[str]:
    """Names of the kernels that launcher(*args) launches, in order; nothing runs."""
    names = []
    with watched(lambda kernel, *_: names.append(kernel.__name__), "generic"):
        launcher(*args)
    return names


def _resources(name: str, target: int, made) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([_cuobjdump(), "--dump-resource-usage", file.name], capture_output=True, text=True,
                               check=True).stdout
    figures = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    products = len(re.findall(r"\b(?:mma|wgmma)\.", made.asm["ptx"]))
    spilled = figures["STACK"] + figures["LOCAL"]
    return Resources(name, target, figures["REG"], made.metadata.shared, spilled, products)


def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
