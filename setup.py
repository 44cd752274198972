"""Builds the C++ operator library; without a working compiler the package installs all the same and says so."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, "csrc")
from build_backend import torch_folder  # noqa: E402

FOLDER = Path("palp_fast", "lib")
LIBRARY = {"win32": "palp_fast_cpu.dll", "darwin": "libpalp_fast_cpu.dylib"}.get(sys.platform, "libpalp_fast_cpu.so")
NOTE = "build.txt"
GCC_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
# Contraction would round differently from machine to machine.
FLAGS = {
    "unix": [*GCC_FLAGS, "-ffp-contract=off"],
    "msvc": ["/std:c++17", "/O2", "/EHsc", "/permissive-", "/fp:precise"],
}


class BuildLibrary(build_ext):
    """Compiles an Extension to a plain shared library (no Python module), which torch.ops.load_library loads."""

    def run(self) -> None:
        self.problem = None
        folder = FOLDER if self.inplace else Path(self.build_lib, FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        super().run()
        if self.problem:
            print(f"palp_fast: {self.problem}; it runs on its PyTorch operators", file=sys.stderr)
            (folder / LIBRARY).unlink(missing_ok=True)
            (folder / NOTE).write_text(self.problem + "\n", encoding="utf-8")
        else:
            (folder / NOTE).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        torch = torch_folder()
        if torch is None:
            self.problem = "the C++ library was not built: no torch >= 2.10 with its headers was found"
            return
        ext.include_dirs.append(str(torch / "include"))
        ext.library_dirs.append(str(torch / "lib"))
        ext.extra_compile_args = FLAGS.get(self.compiler.compiler_type, [])
        try:
            super().build_extension(ext)
        except Exception as error:
            what = f"{error.cmd[0]} failed with exit code {error.returncode}" if hasattr(error, "cmd") else error
            self.problem = f"the C++ library was not built: {what} (pip install -v shows the compiler's messages)"

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # registration runs when the library loads; there is no PyInit function to export


class PlatformWheel(bdist_wheel):
    """One wheel per platform for every Python: the library uses no Python API and torch's stable ABI only."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


library = Extension(
    "palp_fast.lib.palp_fast_cpu",
    sources=sorted(str(path) for folder in ("cpu", "bindings") for path in Path("csrc", folder).glob("*.cpp")),
    depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
    include_dirs=["csrc/include"],
    define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
    libraries=["torch_cpu"],
    language="c++",
    optional=True,
)
packages, package_dir = find_packages(include=["palp_fast", "palp_fast.*"]), {}
if Path("kernels", "palp").is_dir():
    # Kept apart from the package: a top-level folder "kernels" with an __init__ would shadow another package.
    packages.append("palp_fast.kernels")
    package_dir["palp_fast.kernels"] = "kernels/palp"

setup(
    packages=packages,
    package_dir=package_dir,
    ext_modules=[library],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
