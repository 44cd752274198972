"""Exact counters of every operator against committed limits; nothing is timed: python -m bench.guard [--write].

Limits are in bench/limits.csv: counter, case, limit. A counter above its limit fails; --write takes today's values.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from bench import operators
from bench.bench_optimizers import ADAMW, LION, sizes, stepping
from bench.core import Operator, bind
from bench.counters import Counter, launches, saved_bytes
from palp_fast import backend, optim

ROOT = Path(__file__).resolve().parent.parent
LIMITS = Path(__file__).with_name("limits.csv")
META, HALF = torch.device("meta"), torch.float16
FAMILY, TARGET = "consumer", 86  # the cards of most users
STATEFUL = ("AdamW8bit", "Lion8bit", "sampler")
COMPILED = ("geglu", "layer_norm", "lora_linear", "attention")  # whose Triton kernels are compiled here: seconds each
PACKAGED_STEP = 2**20
NOT_IN_WHEEL = "palp_fast/zoo/judges/emoji-64-second.*"  # exclude-package-data of pyproject.toml

Counts = dict[tuple[str, str], int]  # (counter, case) -> value


def count(operator: Operator, shape: str) -> Counts:
    """Of both passes on a layer in fp16: FLOPs by formula and in the reference, leaf calls, bytes kept, launches."""
    case = f"{operator.name}, {shape}"
    problem = operator.problem(shape, HALF, META)
    call = bind(partial(operator.ours, backend="reference"), problem)
    with Counter() as declared:
        call()
    with Counter("reference") as inside:
        call()
    found = {"declared flops": declared.flops, "flops": inside.flops, "leaf operators": len(inside.leaves)}
    if problem.upstream is not None:
        found["saved bytes"] = kept(operator, problem)
    if set(operator.registered) <= set(backend.TRITON) and _has_triton():
        with launches(FAMILY) as counter:
            call()
        found["launches"] = len(counter.leaves)
    return {(name, case): value for name, value in found.items()}


def kept(operator: Operator, problem) -> int:
    """Bytes kept for the backward pass; weights and factors, which are there anyway, are not counted."""
    made = operator.ours(problem, "reference")
    function, leaves = made if isinstance(made, tuple) else (made, None)
    leaves = leaves or [leaf.detach().requires_grad_() for leaf in problem.leaves]
    return saved_bytes(lambda: function(*leaves), [leaf for leaf in leaves if leaf.dim() > 2])


def resources(operator: Operator, shape: str, target: int = TARGET) -> Counts:
    """Of every Triton kernel of both passes, compiled for a card: shared memory, spilled bytes, matrix instructions."""
    sys.path.append(str(ROOT / "tests"))
    from assembler import compiled

    problem = operator.problem(shape, HALF, META)
    call = bind(partial(operator.ours, backend="reference"), problem)

    def launched() -> None:
        with Counter("triton"):
            call()

    counts = {}
    for kernel in compiled(launched, target=target):
        case = f"{operator.name}, {shape}, {kernel.kernel}, sm_{target}"
        for name in ("shared", "spilled", "products"):
            key = f"{name} of a kernel", case
            counts[key] = max(getattr(kernel, name), counts.get(key, 0))
    return counts


def optimizer_calls() -> Counts:
    """Dispatched calls in one step over 256 tensors, where the compiled step is there."""
    counts = {}
    for name, kind, options in (("AdamW8bit", optim.AdamW8bit, ADAMW), ("Lion8bit", optim.Lion8bit, LION)):
        params = [torch.randn(shape) for shape in sizes({8: 16}, 8)]
        if backend.obstacle(kind.RULE, params[0].device, "cpu") is None:
            step = stepping(_Given(params), kind, max_grad_norm=1.0, **options)
            step()
            with Counter() as counter:
                step()
            counts["calls of an optimizer step", f"{name}, {len(params)} tensors"] = len(counter.leaves)
    return counts


class _Given:
    """Parameters and gradients as `stepping` takes them."""

    def __init__(self, params):
        self.others = {"params": params, "grads": [torch.ones_like(param) for param in params]}


def cuda_library() -> Counts:
    """The assembler's report of the CUDA library, where one was built: spilled bytes of all, shared memory of any."""
    report = backend.LIBRARY_FOLDER / "cuda_resources.txt"
    if not report.exists():
        return {}
    text = report.read_text(encoding="utf-8")
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
    shared = max(map(int, re.findall(r"(\d+) bytes smem", text)), default=0)
    return {("spilled bytes", "CUDA library"): spilled, ("shared memory of a kernel", "CUDA library"): shared}


def packaged() -> Counts:
    """Bytes of all files in the wheel, before compression, and of the compiled libraries that were built here."""
    command = ["git", "-C", str(ROOT), "ls-files", "palp_fast", "kernels", f":!{NOT_IN_WHEEL}"]
    listed = subprocess.run(command, capture_output=True, text=True)
    files = [ROOT / name for name in listed.stdout.splitlines()]
    libraries = {
        ("packaged bytes", f"{backend.TITLES[device]} library"): path.stat().st_size
        for device, path in backend.LIBRARIES.items() if path.exists()
    }
    others = sum(file.stat().st_size for file in files if file.exists())
    return {("packaged bytes", "wheel without libraries"): others} | libraries


def counted(everything: bool = True) -> Iterator[tuple[tuple[str, str], int]]:
    """Every counter; without `everything` not those that compile."""
    for operator in operators.load().values():
        shape = next(iter(operator.shapes))
        if operator.name not in STATEFUL:
            yield from count(operator, shape).items()
        if everything and operator.name in COMPILED and _has_triton():
            yield from resources(operator, shape).items()
    for counts in (optimizer_calls(), cuda_library(), packaged()):
        yield from counts.items()


def read_limits() -> Counts:
    with LIMITS.open(newline="", encoding="utf-8") as file:
        return {(row["counter"], row["case"]): int(row["limit"]) for row in csv.DictReader(file)}


def over(found: Counts, limits: Counts) -> list[str]:
    """What is above its limit or has none."""
    problems = []
    for (counter, case), value in found.items():
        limit = limits.get((counter, case))
        if limit is None:
            problems.append(f"{counter}, {case}: {value}, and bench/limits.csv has no limit")
        elif value > limit:
            problems.append(f"{counter}, {case}: {value}, allowed are {limit}")
    return problems


def write(found: Counts) -> None:
    """Today's values as limits; those not counted here stay."""
    limits = read_limits() if LIMITS.exists() else {}
    for (counter, case), value in found.items():
        # Code grows, compilers differ: packaged bytes are allowed up to the next whole MiB.
        limits[counter, case] = -(-value // PACKAGED_STEP) * PACKAGED_STEP if counter == "packaged bytes" else value
    with LIMITS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["counter", "case", "limit"])
        writer.writerows(sorted((*key, value) for key, value in limits.items()))


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def main() -> None:
    """The command line. Raises SystemExit naming every counter above its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="take today's values as limits")
    found = dict(counted())
    if parser.parse_args().write:
        write(found)
    limits = read_limits()
    for key, value in found.items():
        print(f"{key[0]:28} {value:>14} of {limits.get(key, 0):>14}  {key[1]}")
    if problems := over(found, limits):
        raise SystemExit("\n".join(["over the limit:", *problems]))


if __name__ == "__main__":
    main()
