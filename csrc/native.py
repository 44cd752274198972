"""How csrc/ becomes shared libraries: one for the CPU, kernels compiled once per instruction set, and one for CUDA."""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path("csrc")
_SUFFIX = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}.get(sys.platform, ("lib", ".so"))
LIBRARIES = {device: f"{_SUFFIX[0]}palp_fast_{device}{_SUFFIX[1]}" for device in ("cpu", "cuda")}
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]

# Contraction would round differently from machine to machine.
FLAGS = {
    "unix": ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
             "-ffp-contract=off"],
    "msvc": ["/std:c++17", "/O2", "/EHsc", "/permissive-", "/fp:precise"],
}
_V3 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mf16c", "-mlzcnt", "-mmovbe", "-mpopcnt"]
_V4 = [*_V3, *(f"-mavx512{part}" for part in ("f", "bw", "cd", "dq", "vl"))]
LEVELS = {"unix": {"base": [], "v3": _V3, "v4": _V4}, "msvc": {"base": [], "v3": ["/arch:AVX2"], "v4": ["/arch:AVX512"]}}

CUDA_TARGETS = (75, 80, 86, 89, 90, 120)
PTX_TARGETS = (90, 120)  # compiled by the driver for what comes after each
# Contraction off: the CPU's results to the last bit, where only + - * / and square roots are involved.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v"]
RESOURCES = "cuda_resources.txt"


class BuildProblem(Exception):
    """Why a library was not built."""


def has_levels() -> bool:
    """Whether this machine is x86-64, where kernels are compiled per instruction set (universal macOS builds apart)."""
    return platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "darwin"


def _require(torch: Path | None) -> Path:
    if torch is None:
        raise BuildProblem("no torch >= 2.10 with its headers was found")
    return torch


def build_cpu(compiler, torch: Path | None, work: Path, folder: Path) -> None:
    """libpalp_fast_cpu into `folder`. compiler: a distutils compiler. Raises BuildProblem with the reason."""
    torch, kind = _require(torch), compiler.compiler_type
    levels = LEVELS.get(kind, {"base": []}) if has_levels() else {"base": []}
    macros = [*MACROS, *([("PALP_FAST_LEVELS", None)] if has_levels() else [])]
    kernels = [path for path in sorted((ROOT / "cpu").glob("*.cpp")) if path.name != "dispatch.cpp"]
    plain = [ROOT / "cpu" / "dispatch.cpp", *sorted((ROOT / "bindings" / "cpu").glob("*.cpp"))]
    jobs = [(path, work / "plain", [], macros) for path in plain]
    for level, flags in levels.items():
        jobs += [(path, work / level, flags, [*macros, ("PALP_LEVEL", level)]) for path in kernels]
    include = [str(ROOT / "include"), str(torch / "include")]
    objects = _compile(compiler, jobs, include)
    _link(compiler, objects, folder / LIBRARIES["cpu"], ["torch_cpu"], [str(torch / "lib")])


def build_cuda(compiler, torch: Path | None, work: Path, folder: Path) -> None:
    """libpalp_fast_cuda into `folder`, for every target, whether or not a GPU or a CUDA build of torch is here.

    PALP_FAST_CUDA=0 skips it; =1 demands it: then SystemExit with the compiler's message instead of BuildProblem.
    """
    wish = os.environ.get("PALP_FAST_CUDA", "")
    if wish == "0":
        raise BuildProblem("PALP_FAST_CUDA=0")
    try:
        _build_cuda(compiler, _require(torch), work, folder)
    except BuildProblem as problem:
        if wish == "1":
            raise SystemExit(f"PALP_FAST_CUDA=1, but the CUDA library was not built: {problem}") from None
        raise


def _build_cuda(compiler, torch: Path, work: Path, folder: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildProblem("nvcc was not found (PATH, CUDA_HOME)")
    toolkit = toolkit_folder(nvcc)
    runtime = _runtime_folder(toolkit)
    work.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda source: _nvcc(nvcc, source, work), sorted((ROOT / "cuda").glob("*.cu"))))
    objects = [target for target, _ in results]
    (folder / RESOURCES).write_text("".join(report for _, report in results), encoding="utf-8")
    include = [str(path) for path in (ROOT / "include", torch / "include", toolkit / "include")]
    jobs = [(path, work, [], MACROS) for path in sorted((ROOT / "bindings" / "cuda").glob("*.cpp"))]
    objects += _compile(compiler, jobs, include)
    libraries = ["torch_cpu", "cudart_static", *([] if sys.platform == "win32" else ["dl", "rt", "pthread"])]
    _link(compiler, objects, folder / LIBRARIES["cuda"], libraries, [str(torch / "lib"), str(runtime)])


def find_nvcc() -> Path | None:
    """The CUDA compiler of CUDA_HOME, or else of PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    return Path(found) if found else None


def toolkit_folder(nvcc: Path) -> Path:
    """Where the headers beside this nvcc lie; it tells in a dry run. Raises BuildProblem."""
    run = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    for line in run.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip().strip('"'))
    raise BuildProblem(f"{nvcc} --dryrun names no toolkit folder: {run.stderr.strip()[-500:]}")


def _runtime_folder(toolkit: Path) -> Path:
    """Where the static CUDA runtime lies. Raises BuildProblem."""
    for name in ("lib64", "lib/x64", "lib"):
        if any((toolkit / name / file).is_file() for file in ("libcudart_static.a", "cudart_static.lib")):
            return toolkit / name
    raise BuildProblem(f"{toolkit} has no static CUDA runtime (cudart_static)")


def _nvcc(nvcc: Path, source: Path, work: Path) -> tuple[str, str]:
    """(object file, what ptxas reports of its kernels)."""
    target = work / f"{source.stem}.cu.o"
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    known = [number for number in CUDA_TARGETS if f"sm_{number}" in listed]  # an older nvcc knows fewer
    if not known:
        raise BuildProblem(f"{nvcc} compiles for none of sm_{', sm_'.join(map(str, CUDA_TARGETS))}")
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in known]
    forward = {known[-1], *PTX_TARGETS} & set(known)
    codes += [f"-gencode=arch=compute_{number},code=compute_{number}" for number in sorted(forward)]
    host = ["-Xcompiler", "/MD" if sys.platform == "win32" else "-fPIC,-fvisibility=hidden"]
    command = [nvcc, *NVCC_FLAGS, *codes, *host, "-I", ROOT / "include", "-c", source, "-o", target]
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if run.returncode:
        raise BuildProblem(f"nvcc failed with exit code {run.returncode}:\n{run.stdout}{run.stderr}")
    return str(target), f"{source.name}\n{run.stderr}"


def _compile(compiler, jobs: list[tuple], include: list[str]) -> list[str]:
    flags = FLAGS.get(compiler.compiler_type, [])

    def one(job: tuple) -> list[str]:
        source, work, extra, macros = job
        return compiler.compile(
            [str(source)], output_dir=str(work), macros=macros, include_dirs=include, extra_postargs=[*flags, *extra])

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [target for targets in pool.map(one, jobs) for target in targets]
    except Exception as error:
        raise _problem(error) from error


def _link(compiler, objects: list[str], target: Path, libraries: list[str], folders: list[str]) -> None:
    try:
        compiler.link_shared_object(
            objects, str(target), libraries=libraries, library_dirs=folders, target_lang="c++")
    except Exception as error:
        raise _problem(error) from error


def _problem(error: Exception) -> BuildProblem:
    cause = error.__cause__ or error
    what = f"{cause.cmd[0]} failed with exit code {cause.returncode}" if hasattr(cause, "cmd") else error
    return BuildProblem(f"{what} (pip install -v shows the compiler's messages)")
