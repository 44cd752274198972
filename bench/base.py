"""Our operators beside those of another commit, in two processes that take turns: palp-fast bench --base REV.

Both run the benchmarks of this checkout, on palp_fast of this checkout and of a git worktree of REV. The worktree is
kept under runs/base; its compiled libraries are this checkout's where csrc/ is the same, and are built there otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from bench.core import Operator, bind
from bench.machine import ROOT, describe
from bench.timing import interleaved

BASES = ROOT / "runs" / "base"
ROUNDS = 5  # of each process in turn


class Side:
    """A process that times our operators on one palp_fast."""

    def __init__(self, package: Path | None, device: str, threads: int | None):
        # A folder with palp_fast alone comes first on the path: the other commit's bench/ must not be found.
        path = [str(package)] if package else []
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(ROOT)])}
        command = [sys.executable, "-m", "bench.base", device, str(threads or torch.get_num_threads())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)

    def time(self, operator: str, shape: str, dtype: str, seconds: float) -> dict:
        """{"median": seconds of a call} or {"error": why not}."""
        self.process.stdin.write(json.dumps([operator, shape, dtype, seconds]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else {"error": "the process ended"}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(args: argparse.Namespace, cases: Iterable[tuple[Operator, str, torch.dtype]]) -> None:
    """Prints, for each case, the median of each side and their ratio. Raises SystemExit for an unknown commit."""
    package = package_of(args.base)
    sides = {"here": Side(None, args.device, args.threads), "base": Side(package, args.device, args.threads)}
    print(describe(torch.device(args.device)).header())
    print(f"base: {args.base}; {ROUNDS} turns of each", flush=True)
    seconds = (args.seconds or (0.4 if args.quick else 2.0)) / ROUNDS / 2
    try:
        for operator, shape, dtype in cases:
            print(compared(sides, operator.name, shape, str(dtype).removeprefix("torch."), seconds), flush=True)
    finally:
        for side in sides.values():
            side.close()


def compared(sides: dict[str, Side], *case) -> str:
    """One line: the median of each side and how many times as fast as "base" this checkout ("here") is."""
    medians = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            answer = side.time(*case)
            if "error" in answer:
                return f"{case[0]}, {case[1]}, {case[2]}: {name} {answer['error']}"
            medians[name].append(answer["median"])
    here, base = (statistics.median(values) * 1e6 for values in medians.values())
    return f"{case[0]}, {case[1]}, {case[2]}: {here:.1f} us, base {base:.1f} us: {base / here:.2f}x the base's speed"


def package_of(revision: str) -> Path:
    """A folder that holds palp_fast as of a commit, ready to import. Raises SystemExit where git has no such commit."""
    found = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if found.returncode:
        raise SystemExit(f"--base {revision!r}: git knows no such commit here")
    name = found.stdout.strip()
    tree, package = BASES / name / "tree", BASES / name / "package"
    if package.exists():
        return package
    if not tree.exists():
        _git("worktree", "add", "--detach", str(tree), name, check=True)
    if _git("diff", "--quiet", name, "--", "csrc").returncode == 0:
        shutil.copytree(ROOT / "palp_fast" / "lib", tree / "palp_fast" / "lib", dirs_exist_ok=True)
    else:
        subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tree, check=True)
    shutil.copytree(tree / "palp_fast", package / "palp_fast")
    shutil.copytree(tree / "kernels" / "palp", package / "palp_fast" / "kernels")
    return package


def _git(*arguments: str, check: bool = False) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=check)


def serve(device: torch.device) -> None:
    """Answers the questions of a Side, a line of JSON each."""
    from bench.operators import load

    for line in sys.stdin:
        name, shape, dtype, seconds = json.loads(line)
        try:
            operator = load()[name]
            problem = operator.problem(shape, getattr(torch, dtype), device)
            call = bind(operator.providers()[operator.home(device)], problem)
            answer = {"median": interleaved({name: call}, device, seconds)[name].median}
        except Exception as error:  # an older commit may lack an operator or an argument
            answer = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    serve(torch.device(sys.argv[1]))
