"""What the tests of building and of installing share: a copy of the source tree, the compiler, what a process says."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def copy_source(folder: Path) -> Path:
    """Links to what a build reads, so that the source tree stays as it is."""
    source = folder / "source"
    ignored = shutil.ignore_patterns("lib", "__pycache__")
    for name in ("palp_fast", "kernels"):
        shutil.copytree(ROOT / name, source / name, copy_function=os.symlink, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            (source / name).write_bytes((ROOT / name).read_bytes())
    (source / "csrc").symlink_to(ROOT / "csrc")
    return source


def compilers() -> list[str]:
    """The C and the C++ compiler that a build takes."""
    from setuptools._distutils.ccompiler import new_compiler
    from setuptools._distutils.sysconfig import customize_compiler

    compiler = new_compiler()
    customize_compiler(compiler)
    return [compiler.compiler[0], compiler.compiler_cxx[0]]


def compiling(folder: Path) -> dict[str, str]:
    """Environment of a build by the compiler at hand, which keeps objects in `folder`; skips where there is none."""
    pytest.importorskip("setuptools", minversion="77")
    if sys.platform != "linux" or not all(map(shutil.which, compilers())):
        pytest.skip("no C++ compiler")
    script = Path(__file__).with_name("kept_compiler.py")
    return {
        variable: shlex.join([sys.executable, str(script), str(folder), name])
        for variable, name in zip(("CC", "CXX"), compilers())
    }


def output(command: list, folder: Path, **environment: str) -> str:
    """What a command prints, run in `folder`; it must succeed."""
    run = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
