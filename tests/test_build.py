"""Building and installing: wheel contents, a missing compiler, a broken library, what `report` says."""

import os
import re
import subprocess
import sys
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from building import ROOT, copy_source, output
from bench.guard import NOT_IN_WHEEL
from close import NEEDS_CUDA_LIBRARY
from palp_fast import backend, ops  # noqa: F401  (ops loads the library)

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")

CPU_LIBRARY, CUDA_LIBRARY = backend.LIBRARIES["cpu"].name, backend.LIBRARIES["cuda"].name
MOST_BYTES = 38e6
DATA = (
    "zoo/world.json",
    "zoo/emoji-64/model_index.json",
    "zoo/emoji-64/LICENSE",
    "zoo/emoji-64/unet/*.safetensors",
    "zoo/emoji-64/vae/*.safetensors",
    "zoo/emoji-64/text_encoder/*.safetensors",
    "zoo/emoji-64/tokenizer/*",
    "zoo/demo_subject/LICENSE",
    "zoo/demo_subject/truth.png",
    *(f"zoo/demo_subject/photos/photo_{i}.png" for i in range(4)),
)

PROBE = """
import torch
from palp_fast import backend, functional
rows = {row.operator: row for row in backend.report(("cpu",))}
x = torch.ones(1, 1, 2, 2)
print(rows["renoise"].backend, "|", rows["renoise"].reason)
print(functional.renoise(x, x, x, torch.full((1,), 0.5)).sum().item())
"""


KERNEL = re.compile(r"__global__\s+(?:__launch_bounds__\([^)]*\)\s+)?void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)")


def build_wheel(folder: Path, **environment: str) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "-w", str(folder), "-q"]
    output(command, copy_source(folder), **environment)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def probe(folder: Path) -> tuple[str, float]:
    """What a fresh process says that imports the package from this folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", PROBE], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    line, value = run.stdout.splitlines()
    return line, float(value)


@pytest.fixture(scope="module")
def installed(tmp_path_factory, compiler):
    """A folder with the unpacked wheel of a build with the compiler at hand."""
    folder = tmp_path_factory.mktemp("built")
    with build_wheel(folder, **compiler) as wheel:
        wheel.extractall(folder / "site")
        return folder / "site", wheel.filename, wheel.namelist()


def test_wheel_is_for_every_python_of_the_platform(installed):
    _, filename, names = installed
    assert Path(filename).name.startswith("palp_fast-0.1.0-py3-none-linux_")
    assert f"palp_fast/lib/{CPU_LIBRARY}" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".cpp", ".cu", ".h", ".o"))]


def test_wheel_holds_the_model_and_the_demo(installed):
    _, filename, names = installed
    wanted = [f"palp_fast/{pattern}" for pattern in (*DATA, f"lib/{CPU_LIBRARY}")]
    missing = [pattern for pattern in wanted if not any(fnmatchcase(name, pattern) for name in names)]
    assert not missing
    assert not [name for name in names if fnmatchcase(name, NOT_IN_WHEEL)]
    assert Path(filename).stat().st_size <= MOST_BYTES


def test_built_library_serves(installed):
    line, value = probe(installed[0])
    assert line == f"cpu | loaded {CPU_LIBRARY}"
    assert value == 4.0


def test_library_needs_torchs_stable_interface_only(installed):
    """No Python symbol, and of torch C functions only: mangled names would tie the wheel to one torch version."""
    library = installed[0] / "palp_fast" / "lib" / CPU_LIBRARY
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert any(symbol.startswith("torch_") for symbol in symbols)
    assert not [name for name in symbols if name.startswith(("Py", "_Py"))]
    assert not [name for name in symbols if name.startswith("_Z") and any(n in name for n in ("3c10", "5torch", "2at"))]


def test_broken_library_falls_back_and_says_so(installed, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "palp_fast").symlink_to(installed[0] / "palp_fast")
    library = installed[0] / "palp_fast" / "lib" / CPU_LIBRARY
    content = library.read_bytes()
    try:
        library.write_bytes(content[:100])
        line, value = probe(site)
    finally:
        library.write_bytes(content)
    assert line.startswith("reference | ") and "does not load" in line
    assert value == 4.0


def test_failing_compiler_installs_all_the_same(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    with build_wheel(tmp_path, CC="/bin/false", CXX="/bin/false", PALP_FAST_CUDA="0") as wheel:
        wheel.extractall(tmp_path / "site")
    line, value = probe(tmp_path / "site")
    assert line.startswith("reference | ") and "was not built" in line and "/bin/false" in line
    assert value == 4.0


# A level above what this processor has is not taken, so on an old one some of these run the same code.
def test_levels_agree_to_the_last_bit():
    if backend.obstacle("renoise", torch.device("cpu"), "cpu"):
        pytest.skip("no C++ library")
    assert len({run_level(name) for name in ("base", "v3", "v4")}) == 1


def run_level(level: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PALP_FAST_CPU_LEVEL": level}
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "levels.py")], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_no_function_of_a_level_serves_another(installed):
    """Weak symbols are merged by the linker: one compiled for AVX-512 would then run on processors without it."""
    folder = next(installed[0].parent.glob("source/build/temp*/cpu/v4"), None)
    if folder is None:
        pytest.skip("no levels on this machine")
    assert len(list(folder.rglob("*.o"))) > 1
    for path in folder.rglob("*.o"):
        listing = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True)
        weak = [line for line in listing.stdout.splitlines() if line.split()[1] in "WVu"]
        assert all("palp_fast::cpu::v4::" in line for line in weak), weak




@NEEDS_CUDA_LIBRARY
def test_cuda_library_registers_without_a_gpu():
    assert all(backend.obstacle(op, torch.device("cuda"), "cuda") is None for op in backend.COMPILED["cuda"])


@NEEDS_CUDA_LIBRARY
@pytest.mark.parametrize("target", [75, 80, 86, 89, 90, 120])
def test_no_cuda_kernel_spills(target):
    """The assembler's report, kept by the build: registers that do not fit go to slow memory."""
    report = (backend.LIBRARY_FOLDER / "cuda_resources.txt").read_text()
    parts = re.split(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", report)
    rows = list(zip(parts[1::3], parts[2::3], parts[3::3], strict=True))
    found = {name: text for name, number, text in rows if int(number) == target}
    assert found.keys() == {name for name, _, _ in rows}
    kernels = [name for path in (ROOT / "csrc" / "cuda").glob("*.cu") for name in KERNEL.findall(path.read_text())]
    assert kernels and not [kernel for kernel in kernels if not any(kernel in name for name in found)]
    spills = {name: re.findall(r"(\d+) bytes (?:stack frame|spill)", text) for name, text in found.items()}
    assert not [name for name, bytes_ in spills.items() if len(bytes_) < 3 or set(bytes_) != {"0"}]


def test_demanded_cuda_build_fails_with_the_reason(tmp_path):
    """PALP_FAST_CUDA=1 where there is no nvcc."""
    sys.path.insert(0, str(ROOT / "csrc"))
    try:
        import native
    finally:
        sys.path.pop(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_HOME", str(tmp_path))
        patch.setenv("PALP_FAST_CUDA", "1")
        with pytest.raises(SystemExit, match="nvcc was not found"):
            native.build_cuda(None, tmp_path, tmp_path, tmp_path)
        patch.setenv("PALP_FAST_CUDA", "0")
        with pytest.raises(native.BuildProblem, match="PALP_FAST_CUDA=0"):
            native.build_cuda(None, tmp_path, tmp_path, tmp_path)


def test_report_names_every_operator_and_a_reason():
    rows = backend.report()
    assert [(row.device, row.operator) for row in rows] == [(d, o) for d in ("cpu", "cuda") for o in backend.OPERATORS]
    assert all(row.reason and row.backend in ("reference", row.device) for row in rows)


def test_requests_are_met_or_refused_with_the_reason():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert backend.select("renoise", cpu, "reference") == "reference"
    assert backend.select("renoise", meta) == "reference"
    with pytest.raises(RuntimeError, match="backend='cpu' cannot serve renoise on meta: .* not meta"):
        backend.select("renoise", meta, "cpu")
    with pytest.raises(RuntimeError, match="the CUDA library serves cuda tensors, not cpu"):
        backend.select("renoise", cpu, "cuda")
    with pytest.raises(RuntimeError, match="no Triton version of renoise"):
        backend.select("renoise", cpu, "triton")
    with pytest.raises(ValueError, match="backend='fast': allowed are 'auto'"):
        backend.select("renoise", cpu, "fast")


def test_deterministic_switch():
    assert backend.is_deterministic()
    backend.deterministic(False)
    try:
        assert not backend.is_deterministic()
    finally:
        backend.deterministic()
    with pytest.raises(TypeError, match="enabled=1"):
        backend.deterministic(1)
