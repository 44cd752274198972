"""compute-sanitizer finds nothing wrong with any compiled kernel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from close import NEEDS_CUDA, library_on

SCRIPT = Path(__file__).with_name("sanitized.py")


def run(device: str, *before: str, **variables: str) -> None:
    """The script on a device, with a command before it."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent), **variables}
    command = [*before, sys.executable, SCRIPT, device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@NEEDS_CUDA
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_nothing_is_found(tool):
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    # Memory of its own for each tensor: else a read behind one's end is in another's.
    kept = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run("cuda", sanitizer, "--tool", tool, "--error-exitcode", "1", **kept)


def test_what_is_watched_runs():
    run(library_on("cpu"))
