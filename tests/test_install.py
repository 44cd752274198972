"""`pip install .`, `pip install -e .` and a built wheel, in environments of their own that see this one's torch."""

import sys
import venv
from pathlib import Path

import pytest
from building import ROOT, copy_source, output

from palp_fast import backend

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")

LIBRARY = backend.LIBRARIES["cpu"].name
PIP = ["-m", "pip", "-q", "--disable-pip-version-check"]
OFFLINE = ["--no-build-isolation", "--no-deps", "--no-index"]
PROBE = """
import torch, palp_fast
from palp_fast import doctor, functional
x = torch.ones(1, 1, 2, 2)
print(palp_fast.__file__)
print(functional.renoise(x, x, x, torch.full((1,), 0.5)).sum().item())
print(doctor.report())
"""


def environment(folder: Path) -> Path:
    """The Python of a new environment with every package of this one but palp_fast."""
    packages = folder / "packages"
    packages.mkdir(parents=True)
    for site in (Path(entry) for entry in sys.path if entry.endswith("-packages")):
        for path in site.iterdir() if site.is_dir() else ():
            link = packages / path.name
            if not path.name.startswith(("palp_fast", "__editable__")) and path.suffix != ".pth" and not link.exists():
                link.symlink_to(path)
    venv.create(folder / "env", symlinks=True)
    (own,) = (folder / "env" / "lib").glob("python*/site-packages")
    (own / "packages.pth").write_text(str(packages) + "\n")
    return folder / "env" / "bin" / "python"


def install(python: Path, source: Path, how: str, **variables: str) -> None:
    variables["PALP_FAST_CUDA"] = "0"
    if how == "wheel":
        output([python, *PIP, "wheel", *OFFLINE, "-w", source.parent / "wheels", "."], source, **variables)
        (built,) = (source.parent / "wheels").glob("*.whl")
        output([python, *PIP, "install", *OFFLINE, built], source.parent)
    else:
        output([python, *PIP, "install", *OFFLINE, *(["-e"] if how == "editable" else []), "."], source, **variables)


def probe(python: Path, folder: Path) -> tuple[Path, float, str]:
    """From another folder: where the package is, what an operator gave, the doctor's line on it."""
    where, value, *report = output([python, "-c", PROBE], folder, PYTHONPATH="", OMP_NUM_THREADS="1").splitlines()
    (line,) = (line for line in report if line.split()[:3] == ["renoise", "on", "cpu"])
    return Path(where), float(value), line


@pytest.mark.parametrize("how", ["folder", "editable", "wheel"])
def test_an_installation_serves_from_anywhere(how, compiler, tmp_path):
    python, source = environment(tmp_path), copy_source(tmp_path)
    install(python, source, how, **compiler)
    where, value, line = probe(python, tmp_path)
    assert where.is_relative_to(source if how == "editable" else tmp_path / "env") and value == 4.0
    assert line.endswith(f": cpu (loaded {LIBRARY})")
    if how != "wheel":
        return
    library = where.parent / "lib" / LIBRARY
    library.write_bytes(library.read_bytes()[:100])
    assert_serves_without(python, tmp_path, f"{LIBRARY} does not load")
    library.unlink()
    assert_serves_without(python, tmp_path, "the C++ library was not built")
    assert "does not load" not in output([python.with_name("palp-fast"), "doctor"], tmp_path, PYTHONPATH="")


def assert_serves_without(python: Path, folder: Path, reason: str) -> None:
    _, value, line = probe(python, folder)
    assert value == 4.0 and ": reference (" in line and reason in line
