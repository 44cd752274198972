"""Our operators beside those of another commit, in two processes that take turns: palp-fast bench --base REV.

Both run the benchmarks of this checkout, on its palp_fast and on that of REV, whose files are kept under runs/base; the
compiled libraries there are this checkout's where csrc/ is the same, and are built there otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch

import palp_fast
from bench.core import Operator, bind
from bench.machine import ROOT, describe
from bench.timing import interleaved

BASES = ROOT / "runs" / "base"
ROUNDS = 5  # of each process in turn


class Side:
    """A process that times our operators on one palp_fast."""

    def __init__(self, package: Path | None, device: str, threads: int | None):
        # Python looks into the working directory first: a folder with palp_fast alone, so that bench/ is this one.
        folder, path = package or ROOT, [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONSAFEPATH": ""}
        command = [sys.executable, "-m", "bench.base", device, str(threads or torch.get_num_threads())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment)
        found = self.process.stdout.readline().strip()
        if found != str(folder / "palp_fast"):
            raise SystemExit(f"--base: palp_fast of {folder} was to be timed, and "
                             + (f"{found} was found" if found else "it cannot be imported"))

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
    if (package / "palp_fast").exists():
        return package
    shutil.rmtree(tree, ignore_errors=True)  # of a run that was broken off
    tree.mkdir(parents=True)
    _git("archive", "--output", str(tree / "all.zip"), name, check=True)
    with zipfile.ZipFile(tree / "all.zip") as archive:
        archive.extractall(tree)
    if _git("diff", "--quiet", name, "--", "csrc").returncode:
        subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tree, check=True)
    elif (ROOT / "palp_fast" / "lib").is_dir():
        shutil.copytree(ROOT / "palp_fast" / "lib", tree / "palp_fast" / "lib")
    shutil.move(tree / "kernels" / "palp", tree / "palp_fast" / "kernels")
    package.mkdir(exist_ok=True)
    shutil.move(tree / "palp_fast", package / "palp_fast")
    shutil.rmtree(tree)
    return package


def _git(*arguments: str, check: bool = False) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=check)


def serve(device: torch.device) -> None:
    """Prints the folder of its palp_fast, then answers the questions of a Side, a line of JSON each."""
    from bench.operators import load

    print(Path(palp_fast.__file__).parent, flush=True)
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
